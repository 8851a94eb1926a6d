"""Strategies side by side: the same weights, seed, backend and precision, chunk by chunk in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .errors import UsageError
from .generation import Context, LatentChunk, SeededNoise, Strategy, generate, make_context, stored_caption
from .pipeline import Pipeline, check_finite
from .runtime import PeakMemory
from .sampler import make_sampler


@dataclass(frozen=True)
class ChunkComparison:
    """One chunk, made by every strategy."""

    index: int
    first_frame: int
    chunks: dict[Strategy, LatentChunk]
    difference: float
    """Largest absolute difference of any strategy's latents from the first one's."""
    scale: float
    """Largest absolute latent."""
    before_slide: bool
    """Whether the window has not slid yet, so that all strategies see the same frames."""


class SideBySide:
    """The same video by several strategies, taking turns chunk by chunk so that a noisy machine hits all of them.

    The video begins from an empty context, or from one random latent frame if the weights can't do that. Iterate over
    it to make the chunks.

    Args:
        pipeline: model and settings; no autoencoder is needed.
        chunks: how many.
        strategies: which; the first is what the others are compared with.
        steps, sampler, seed, context_frames: as in ``Pipeline.sample``.
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
        self.model, self.chunks, self.strategies = model, chunks, strategies
        shape = (
            config.model.in_channels,
            config.model.chunk_frames,
            config.model.latent_height,
            config.model.latent_width,
        )
        given = None
        if not config.diffusion.unconditional_start:
            generator = torch.Generator().manual_seed(seed)
            given = torch.randn(1, shape[0], 1, *shape[2:], generator=generator).to(model.device)
        self.contexts: dict[Strategy, Context] = {}
        self._runs: dict[Strategy, Iterator[LatentChunk]] = {}
        for strategy in strategies:
            context = make_context(model, strategy, 1, context_frames=context_frames)
            solver = make_sampler(sampler or config.sampling.sampler, pipeline.process, steps or config.sampling.steps)
            noise = SeededNoise(seed, [0], shape, model.device)
            self.contexts[strategy] = context
            # one chunk more than asked for, on which memory is measured
            self._runs[strategy] = generate(
                context, pipeline.process, solver, noise, chunks + 1, given=given, caption=stored_caption(model, 1)
            )

    def __iter__(self) -> Iterator[ChunkComparison]:
        for index in range(self.chunks):
            made: dict[Strategy, LatentChunk] = {}
            for strategy in self.strategies if index % 2 == 0 else reversed(self.strategies):
                made[strategy] = next(self._runs[strategy])
                check_finite(made[strategy], self.model.dtype)
            chunks = [made[strategy] for strategy in self.strategies]
            reference, first = chunks[0].latents, chunks[0].first_frame
            yield ChunkComparison(
                index,
                first,
                made,
                max(((chunk.latents - reference).abs().max().item() for chunk in chunks[1:]), default=0.0),
                reference.abs().max().item(),
                before_slide=first <= self.contexts[self.strategies[0]].clock.context_frames,
            )

    def growth(self, strategy: Strategy) -> int | None:
        """By how many bytes memory rises, at the highest, while one more chunk is made, whose time counts nowhere.

        None where positions that do not wrap leave no room for another chunk.
        """
        memory = PeakMemory(self.model.device)
        try:
            next(self._runs[strategy])
        except UsageError:
            return None
        return memory.growth()
