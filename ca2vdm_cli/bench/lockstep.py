"""Contestants side by side: the same weights, backend, precision and inputs, step by step in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ca2vdm_cli.config import Prediction
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import Context, make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import SeededNoise, generate, stored_caption
from ca2vdm_cli.generate.samplers import sampler_for
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.kv_cache import TextKeysValues
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.pipeline import Pipeline, check_finite
from ca2vdm_cli.runtime import PeakMemory, synchronize

PRODUCT = (2048, 384, 1536)
"""The matrix product that measures the machine: rows, inner size, columns."""
GPU_ROWS = 2**17
"""Rows of that product on a GPU, where it would otherwise take less time than it takes to ask for it."""


@dataclass(frozen=True)
class ChunkTimes:
    """What one chunk cost one contestant, in seconds, and what it took."""

    write_seconds: float
    """Making the frames before it context: the cache write."""
    step_seconds: tuple[float, ...]
    """Each of the network's denoising forwards. The sampler's own arithmetic, the same for all, is not counted."""
    seen_frames: int = 0
    """Finished frames that the chunk saw."""
    kept_bytes: int = 0
    """Bytes kept between chunks, as measured after the chunk."""
    rise_bytes: int = 0
    """Highest rise of memory in a denoising step of these shapes; 0 unless asked for."""
    step_flops: int = 0
    """Floating-point operations of a denoising step, counted by PyTorch; 0 unless asked for."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.write_seconds + sum(self.step_seconds)


@dataclass(frozen=True)
class ChunkComparison:
    """One chunk, made by every contestant."""

    index: int
    first_frame: int
    times: dict[str, ChunkTimes]
    differences: dict[str, float]
    """Largest absolute difference, over all denoising steps, of each exact contestant's output from the first one's."""
    scale: float
    """Largest absolute output of the first contestant."""
    before_slide: bool
    """Whether the window has not slid yet, so that all exact contestants see the same frames."""
    decode_seconds: float | None = None
    """Latents to pixels, which is the same for all; None where there is no autoencoder to measure."""
    encode_seconds: float | None = None
    """The same pixels to latents, as for frames that a video is given."""

    @property
    def difference(self) -> float:
        """The largest of them; 0 without any."""
        return max(self.differences.values(), default=0.0)


class MatrixProduct:
    """The machine's rate in ``PRODUCT``, measured again and again between other things."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        rows, inner, columns = PRODUCT
        rows = rows if device.type == "cpu" else GPU_ROWS
        self.shape = (rows, inner, columns)
        self.flops = 2 * rows * inner * columns
        self._x = torch.ones(rows, inner, dtype=dtype, device=device)
        self._weight = torch.ones(columns, inner, dtype=dtype, device=device)
        self._out = torch.empty(rows, columns, dtype=dtype, device=device)  # to come and go would stir the heap
        self.seconds: list[float] = []
        """Of every product since the first, which is warm-up."""
        self.measure()
        self.seconds.clear()

    def measure(self) -> None:
        """Compute it once, by the clock."""
        synchronize(self._x.device)
        began = time.perf_counter()
        torch.mm(self._x, self._weight.T, out=self._out)
        synchronize(self._x.device)
        self.seconds.append(time.perf_counter() - began)


@dataclass
class Observation:
    """What is found out about a context outside the clock, when it first answers to new shapes."""

    seen_frames: int = -1
    warm_up_seconds: float = 0.0
    """All such answers together."""
    rise_bytes: int = 0
    step_flops: int = 0


class Lockstep(Context):
    """Several contexts that are given the same frames and asked the same question in every denoising step.

    The first one's answer is what goes on. Where the outputs of two free runs are compared, a rounding error of the
    first step grows in all that follow, without bound where weights are random; here every step is compared on its own.

    Times are taken around each call, in alternating order, so that a noisy machine hits all alike. Where a context that
    is fed again sees another number of frames than before, its shapes are new: it answers once outside the clock before
    it is timed. A cache's shapes are the same in every chunk, so it does that once.

    Args:
        contexts: by contestant.
        product: also measured in every step, between the others.
        observe: find out memory and operations of every new shape.
    """

    def __init__(
        self, contexts: dict[str, Context], product: MatrixProduct | None = None, *, observe: bool = False
    ) -> None:
        self.contexts, self.product, self.observe = contexts, product, observe
        self.first = next(iter(contexts.values()))
        self.model, self.window = self.first.model, self.first.window
        self.write_seconds = dict.fromkeys(contexts, 0.0)
        """Of the last frames appended."""
        self.step_seconds: dict[str, list[float]] = {}
        """Of this chunk's steps."""
        self.differences: dict[str, float] = {}
        """The largest of this chunk, from the first one's outputs, by exact contestant."""
        self.scale = 0.0
        """Of this chunk."""
        self.observations = {contestant: Observation() for contestant in contexts}
        self._appends = self._chunks = 0
        if observe:
            with count_flops():  # what the counter itself loads is no one's memory
                torch.zeros(1)

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
        self._appends += 1
        timed = self._timed(lambda context: context.append(latents), self._appends)
        self.write_seconds = {contestant: seconds for contestant, (_, seconds) in timed.items()}

    def open_chunk(self) -> None:
        for context in self.contexts.values():
            context.open_chunk()
        self.step_seconds = {contestant: [] for contestant in self.contexts}
        self.differences, self.scale = {}, 0.0
        self._chunks += 1

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        for contestant, context in self.contexts.items():
            found, seen = self.observations[contestant], seen_frames(context)
            if found.seen_frames < 0 or (seen != found.seen_frames and not context.caches):
                self._warm_up(context, found, x, timestep)
            found.seen_frames = seen
        turn = self._chunks + len(next(iter(self.step_seconds.values())))
        timed = self._timed(lambda context: context.predict(x, timestep), turn)
        if self.product is not None:
            self.product.measure()
        outputs = {contestant: timed[contestant][0] for contestant in self.contexts}
        for output in outputs.values():
            check_finite(output, self.frames, self.model.dtype)
        first, *others = outputs
        for one in others:
            if self.contexts[one].exact and self.first.exact:
                difference = (outputs[one] - outputs[first]).abs().max().item()
                self.differences[one] = max(self.differences.get(one, 0.0), difference)
        self.scale = max(self.scale, outputs[first].abs().max().item())
        for contestant, (_, seconds) in timed.items():
            self.step_seconds[contestant].append(seconds)
        return outputs[first]

    def _warm_up(self, context: Context, found: Observation, x: Tensor, timestep: Tensor) -> None:
        began = time.perf_counter()
        if found.seen_frames < 0 or not self.observe:  # what happens once in a process is not what a step takes
            context.predict(x, timestep)
        if self.observe:
            found.rise_bytes, found.step_flops = observe(self.model, lambda: context.predict(x, timestep))
        found.warm_up_seconds += time.perf_counter() - began

    def _timed(self, call: Callable[[Context], Tensor | None], turn: int) -> dict[str, tuple[Tensor, float]]:
        """Every context's answer and how many seconds it took; every other turn the last one goes first."""
        answers = {}
        for contestant, context in list(self.contexts.items())[:: 1 if turn % 2 else -1]:
            synchronize(self.model.device)
            began = time.perf_counter()
            answer = call(context)
            synchronize(self.model.device)
            answers[contestant] = (answer, time.perf_counter() - began)
        return answers  # type: ignore[return-value]


def seen_frames(context: Context) -> int:
    """Finished frames that the next chunk sees."""
    return len(context.window.context(context.frames))


def observe(model: CausalVideoTransformer, call: Callable[[], object]) -> tuple[int, int]:
    """Highest rise of memory in bytes, and counted operations, of a call; it may be called twice."""
    memory = PeakMemory(model.device)
    if type(model.backend).prepare is Backend.prepare:
        with count_flops() as counter:
            call()
        return memory.growth(), counter.get_total_flops()
    call()
    return memory.growth(), count_uncompiled(call)


def count_uncompiled(call: Callable[[], object]) -> int:
    """Counted operations of a call, with nothing compiled, since what is compiled can't be counted."""
    with torch.compiler.set_stance("force_eager"), count_flops() as counter:
        call()
    return counter.get_total_flops()


def count_flops() -> FlopCounterMode:
    """PyTorch's counter, which by itself leaves out the CPU's fused attention."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def flops(q: Any, k: Any, v: Any, *arguments: Any, **named: Any) -> int:
        return sdpa_flop_count(q, k, v)

    return FlopCounterMode(display=False, custom_mapping={attention: flops})


class SideBySide:
    """One video, made by several contestants in lockstep. Iterate over it to make the chunks.

    The video begins from an empty context, or from one random latent frame if the weights can't do that.

    Args:
        pipeline: model and settings; where it has an autoencoder, that is timed on every chunk.
        chunks: how many.
        contestants: which; the first is what the others are compared with.
        steps, sampler, seed, context_frames: as in ``Pipeline.sample``.
        fixed_frames: window of ``fixed-window``.
        given_frames: begin from so many random latent frames instead.
        product: measured between the steps.
        observe: find out memory and operations too.

    Raises:
        UsageError: fewer than one chunk, or more than positions that do not wrap have room for.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        chunks: int,
        contestants: Sequence[str] = ("cached", "recompute"),
        *,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        context_frames: int | None = None,
        fixed_frames: int | None = None,
        given_frames: int | None = None,
        product: MatrixProduct | None = None,
        observe: bool = False,
    ) -> None:
        config, model = pipeline.config, pipeline.model
        if chunks < 1:
            raise UsageError("--frames: at least one chunk is needed")
        self.pipeline = pipeline
        self.model: CausalVideoTransformer = model
        start = first_frame(pipeline) if given_frames is None else given_frames
        shape = config.model.chunk_shape
        given = None
        if start:
            generator = torch.Generator().manual_seed(seed)
            given = torch.randn(1, shape[0], start, *shape[2:], generator=generator).to(model.device)
        process = pipeline.process
        if (
            not pipeline.trained and not config.diffusion.flow
        ):  # whatever random weights put out is no noise; taken for v, latents stay of order 1
            process = NoiseProcess(replace(config.diffusion, prediction=Prediction.V))
        sampling = config.sampling
        solver = sampler_for(process, sampling, name=sampler, steps=steps)
        methods = {
            one: make_context(
                model, one, 1, context_frames=context_frames, timesteps=solver.timesteps, fixed_frames=fixed_frames
            )
            for one in contestants
        }
        self.lockstep = Lockstep(methods, product, observe=observe)
        self.window = self.lockstep.window
        self.window.check_length(start + chunks * config.model.chunk_frames)
        self._last = torch.zeros(1, *shape, device=model.device)
        self._last_timestep = solver.timesteps[-1]
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
                contestant: ChunkTimes(
                    lockstep.write_seconds[contestant],
                    tuple(lockstep.step_seconds[contestant]),
                    lockstep.observations[contestant].seen_frames,
                    context.nbytes,
                    lockstep.observations[contestant].rise_bytes,
                    lockstep.observations[contestant].step_flops,
                )
                for contestant, context in lockstep.contexts.items()
            }
            decode_seconds, encode_seconds = self._pixels(chunk.latents)
            yield ChunkComparison(
                chunk.index,
                chunk.first_frame,
                times,
                lockstep.differences,
                lockstep.scale,
                before_slide=chunk.first_frame <= self.window.context_frames,
                decode_seconds=decode_seconds,
                encode_seconds=encode_seconds,
            )

    def _pixels(self, latents: Tensor) -> tuple[float | None, float | None]:
        """Seconds to decode a chunk and to encode it again."""
        if self.pipeline.autoencoder is None or not self.lockstep.observe:
            return None, None
        began = time.perf_counter()
        pixels = self.pipeline.decode(latents)  # ends on the CPU
        decoded = time.perf_counter()
        self.pipeline.encode(pixels)
        synchronize(self.model.device)
        return decoded - began, time.perf_counter() - decoded

    @torch.inference_mode()
    def rise(self, contestant: str) -> int | None:
        """By how many bytes memory rises, at the highest, while the last chunk is made context and a step denoised.

        With ``cached`` both are done again, and the context has moved on afterwards; the others write nothing, and the
        last chunk's own steps were observed. None where positions that do not wrap leave no room for another chunk.
        """
        if contestant != "cached":
            return self.lockstep.observations[contestant].rise_bytes
        context = self.lockstep.contexts[contestant]
        memory = PeakMemory(self.model.device)
        try:
            context.append(self._last)
            context.open_chunk()
        except UsageError:
            return None
        context.predict(self._last, torch.full((1,), self._last_timestep, device=self.model.device))
        return memory.growth()

    @torch.inference_mode()
    def write_flops(self, contestant: str) -> int | None:
        """Counted operations of making the last chunk context, which moves on; None as in ``rise``."""
        try:
            return count_uncompiled(lambda: self.lockstep.contexts[contestant].append(self._last))
        except UsageError:
            return None


def first_frame(pipeline: Pipeline) -> int:
    """Number of the first frame that is made: 1 for weights that were not trained to begin from an empty context."""
    return 0 if pipeline.config.diffusion.unconditional_start else 1
