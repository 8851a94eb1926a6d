"""Strategies side by side: the same weights, backend, precision and inputs, step by step in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .config import Prediction
from .diffusion import NoiseProcess
from .errors import UsageError
from .generation import Context, SeededNoise, Strategy, generate, make_context, stored_caption
from .kv_cache import TextKeysValues
from .model import CausalVideoTransformer
from .pipeline import Pipeline, check_finite
from .runtime import PeakMemory, synchronize
from .sampler import make_sampler


@dataclass(frozen=True)
class ChunkTimes:
    """What one chunk cost by one strategy, in seconds."""

    write_seconds: float
    """Making the frames before it context: the cache write."""
    step_seconds: tuple[float, ...]
    """Each of the network's denoising forwards. The sampler's own arithmetic, the same for all, is not counted."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.write_seconds + sum(self.step_seconds)


@dataclass(frozen=True)
class ChunkComparison:
    """One chunk, made by every strategy."""

    index: int
    first_frame: int
    times: dict[Strategy, ChunkTimes]
    difference: float
    """Largest absolute difference, over all denoising steps, of any strategy's output from the first one's."""
    scale: float
    """Largest absolute output of the first strategy."""
    before_slide: bool
    """Whether the window has not slid yet, so that all strategies see the same frames."""


class Lockstep(Context):
    """Several contexts that are given the same frames and asked the same question in every denoising step.

    The first one's answer is what goes on. Where the outputs of two free runs are compared, a rounding error of the
    first step grows in all that follow, without bound where weights are random; here every step is compared on its own.

    Times are taken around each call, in alternating order, so that a noisy machine hits all alike. A chunk that sees
    more frames than any before it has new shapes: each context answers once outside the clock before it is timed.
    """

    def __init__(self, contexts: dict[Strategy, Context]) -> None:
        self.contexts = contexts
        self.first = next(iter(contexts.values()))
        self.model, self.clock = self.first.model, self.first.clock
        self.write_seconds = dict.fromkeys(contexts, 0.0)
        """Of the last frames appended."""
        self.step_seconds: dict[Strategy, list[float]] = {}
        """Of this chunk's steps."""
        self.differences: list[float] = []
        """Of this chunk's steps."""
        self.scale = 0.0
        """Of this chunk."""
        self._calls = 0
        self._warm: int | None = None  # frames of context that the last warmed-up chunk saw

    def set_text(self, text: list[TextKeysValues]) -> None:
        for context in self.contexts.values():
            context.set_text(text)

    @property
    def frames(self) -> int:
        return self.first.frames

    @property
    def nbytes(self) -> int:
        return self.first.nbytes

    def append(self, latents: Tensor) -> None:
        timed = self._timed(lambda context: context.append(latents))
        self.write_seconds = {strategy: seconds for strategy, (_, seconds) in timed.items()}

    def open_chunk(self) -> None:
        for context in self.contexts.values():
            context.open_chunk()
        self.step_seconds = {strategy: [] for strategy in self.contexts}
        self.differences, self.scale = [], 0.0

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        if (seen := len(self.clock.context(self.frames))) != self._warm:
            self._timed(lambda context: context.predict(x, timestep))
            self._warm = seen
        timed = self._timed(lambda context: context.predict(x, timestep))
        outputs = [timed[strategy][0] for strategy in self.contexts]
        for output in outputs:
            check_finite(output, self.frames, self.model.dtype)
        self.differences += [(output - outputs[0]).abs().max().item() for output in outputs[1:]]
        self.scale = max(self.scale, outputs[0].abs().max().item())
        for strategy, (_, seconds) in timed.items():
            self.step_seconds[strategy].append(seconds)
        return outputs[0]

    def _timed(self, call: Callable[[Context], Tensor | None]) -> dict[Strategy, tuple[Tensor, float]]:
        """Every context's answer and how many seconds it took."""
        self._calls += 1
        answers = {}
        for strategy, context in list(self.contexts.items())[:: 1 if self._calls % 2 else -1]:
            synchronize(self.model.device)
            began = time.perf_counter()
            answer = call(context)
            synchronize(self.model.device)
            answers[strategy] = (answer, time.perf_counter() - began)
        return answers  # type: ignore[return-value]


class SideBySide:
    """One video, made by several strategies in lockstep. Iterate over it to make the chunks.

    The video begins from an empty context, or from one random latent frame if the weights can't do that.

    Args:
        pipeline: model and settings; no autoencoder is needed.
        chunks: how many.
        strategies: which; the first is what the others are compared with.
        steps, sampler, seed, context_frames: as in ``Pipeline.sample``.

    Raises:
        UsageError: fewer than one chunk, or more than positions that do not wrap have room for.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        chunks: int,
        strategies: Sequence[Strategy] = (Strategy.CACHED, Strategy.RECOMPUTE),
        *,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        context_frames: int | None = None,
    ) -> None:
        config, model = pipeline.config, pipeline.model
        if chunks < 1:
            raise UsageError("--frames: at least one chunk is needed")
        self.model: CausalVideoTransformer = model
        self.lockstep = Lockstep(
            {strategy: make_context(model, strategy, 1, context_frames=context_frames) for strategy in strategies}
        )
        self.clock = self.lockstep.clock
        start = first_frame(pipeline)
        self.clock.check_length(start + chunks * config.model.chunk_frames)
        shape = (
            config.model.in_channels,
            config.model.chunk_frames,
            config.model.latent_height,
            config.model.latent_width,
        )
        given = None
        if start:
            generator = torch.Generator().manual_seed(seed)
            given = torch.randn(1, shape[0], start, *shape[2:], generator=generator).to(model.device)
        process = pipeline.process
        if not pipeline.trained:  # whatever random weights put out is no noise; taken for v, latents stay of order 1
            process = NoiseProcess(replace(config.diffusion, prediction=Prediction.V))
        solver = make_sampler(sampler or config.sampling.sampler, process, steps or config.sampling.steps)
        self._last = torch.zeros(1, *shape, device=model.device)
        self._run = generate(
            self.lockstep,
            process,
            solver,
            SeededNoise(seed, [0], shape, model.device),
            chunks,
            given=given,
            caption=stored_caption(model, 1),
        )

    def __iter__(self) -> Iterator[ChunkComparison]:
        lockstep = self.lockstep
        for chunk in self._run:
            self._last = chunk.latents
            times = {
                strategy: ChunkTimes(lockstep.write_seconds[strategy], tuple(lockstep.step_seconds[strategy]))
                for strategy in lockstep.contexts
            }
            yield ChunkComparison(
                chunk.index,
                chunk.first_frame,
                times,
                float(np.max(lockstep.differences, initial=0.0)),
                lockstep.scale,
                before_slide=chunk.first_frame <= self.clock.context_frames,
            )

    @torch.inference_mode()
    def growth(self, strategy: Strategy) -> int | None:
        """By how many bytes memory rises, at the highest, while the last chunk is made context and a step denoised.

        The context has moved on afterwards. None where positions that do not wrap leave no room for another chunk.
        """
        context = self.lockstep.contexts[strategy]
        memory = PeakMemory(self.model.device)
        try:
            context.append(self._last)
            context.open_chunk()
        except UsageError:
            return None
        context.predict(self._last, torch.zeros(1, device=self.model.device))
        return memory.growth()


def first_frame(pipeline: Pipeline) -> int:
    """Number of the first frame that is made: 1 for weights that were not trained to begin from an empty context."""
    return 0 if pipeline.config.diffusion.unconditional_start else 1
