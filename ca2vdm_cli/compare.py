"""Strategies side by side: the same weights, seed, backend and precision, chunk by chunk in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .errors import UsageError
from .generation import Context, LatentChunk, SeededNoise, Strategy, generate, make_context
from .pipeline import Pipeline, check_finite
from .runtime import PeakMemory
from .sampler import make_sampler


@dataclass(frozen=True)
class ChunkComparison:
    """One chunk, made by every strategy."""

    index: int
    first_frame: int
    chunks: dict[Strategy, LatentChunk]
    contexts: dict[Strategy, Context]
    growth_bytes: dict[Strategy, int]
    """By how much memory rose, at the highest, while the chunk was made."""
    difference: float
    """Largest absolute difference of any strategy's latents from the first one's."""
    scale: float
    """Largest absolute latent."""
    before_slide: bool
    """Whether the window has not slid yet, so that all strategies see the same frames."""


def side_by_side(
    pipeline: Pipeline,
    chunks: int,
    strategies: Sequence[Strategy] = (Strategy.CACHED, Strategy.RECOMPUTE),
    *,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    context_frames: int | None = None,
) -> Iterator[ChunkComparison]:
    """Generate the same video by several strategies, taking turns chunk by chunk so that a noisy machine hits all.

    The video begins from an empty context, or from one random latent frame if the weights can't do that.

    Args:
        pipeline: model and settings; no autoencoder is needed.
        chunks: how many.
        strategies: which; the first is what the others are compared with.
        steps, sampler, seed, context_frames: as in ``Pipeline.sample``.
    """
    config, model = pipeline.config, pipeline.model
    if chunks < 1:
        raise UsageError("--frames: at least one chunk is needed")
    shape = (config.model.in_channels, config.model.chunk_frames, config.model.latent_height, config.model.latent_width)
    given = None
    if not config.diffusion.unconditional_start:
        generator = torch.Generator().manual_seed(seed)
        given = torch.randn(1, shape[0], 1, *shape[2:], generator=generator).to(model.device)
    runs: dict[Strategy, tuple[Context, Iterator[LatentChunk]]] = {}
    for strategy in strategies:
        context = make_context(model, strategy, 1, context_frames=context_frames)
        solver = make_sampler(sampler or config.sampling.sampler, pipeline.process, steps or config.sampling.steps)
        noise = SeededNoise(seed, [0], shape, model.device)
        caption = pipeline.no_caption(1)
        # one chunk more than asked for, so that the last one is followed by a cache write like all others
        runs[strategy] = (
            context,
            generate(context, pipeline.process, solver, noise, chunks + 1, given=given, caption=caption),
        )
    for index in range(chunks):
        made: dict[Strategy, LatentChunk] = {}
        growth: dict[Strategy, int] = {}
        for strategy in strategies if index % 2 == 0 else reversed(strategies):
            memory = PeakMemory(model.device)
            made[strategy] = next(runs[strategy][1])
            check_finite(made[strategy], model.dtype)
            growth[strategy] = memory.growth()
        reference = made[strategies[0]].latents
        apart = max(((made[s].latents - reference).abs().max().item() for s in strategies[1:]), default=0.0)
        first = made[strategies[0]].first_frame
        yield ChunkComparison(
            index,
            first,
            made,
            {strategy: context for strategy, (context, _) in runs.items()},
            growth,
            apart,
            reference.abs().max().item(),
            before_slide=first <= runs[strategies[0]][0].clock.context_frames,
        )
