"""Exactness on the user's own weights: cached against recompute, and against recorded runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .compare import ChunkComparison, SideBySide
from .pipeline import Pipeline

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference allowed against a recorded run, whose numbers are of order 1.

float32 leaves room for another order of summation, carried through all denoising steps. The half-precision types round
every activation to 11 and 8 bits; the same margin in units of their last place would be 0.8 and 6.5, so these bounds
catch a wrong frame or position and not a subtle fault: that is what float32 is for.
"""


def tolerance(dtype: torch.dtype, scale: float = 1.0) -> float:
    """The largest difference that still counts as equal.

    Args:
        dtype: the model's number format.
        scale: the largest number compared; random weights may make latents that are far from order 1.
    """
    return TOLERANCE[dtype] * max(1.0, scale)


def verify_strategies(
    pipeline: Pipeline, *, steps: int | None = None, seed: int = 0, chunks_after_slide: int = 2
) -> Iterator[ChunkComparison]:
    """Cached and recompute side by side until the window has slid, and a little further to show the drift."""
    config = pipeline.config.model
    start = 0 if pipeline.config.diffusion.unconditional_start else 1
    until_slide = (config.context_frames - start) // config.chunk_frames + 1
    limit = until_slide + chunks_after_slide
    if config.temporal_positions.value == "absolute":
        limit = min(limit, (config.table_length - start) // config.chunk_frames - 1)
    return iter(SideBySide(pipeline, limit, steps=steps, seed=seed))
