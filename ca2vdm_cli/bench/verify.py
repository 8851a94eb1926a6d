"""Exactness: exact contexts against ``cached`` on the user's own weights; tolerances, also for recorded runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.pipeline import Pipeline

from .lockstep import ChunkComparison, SideBySide, first_frame

RUN_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest absolute difference allowed from a recorded run, whose values are of order 1.

float32 leaves room for a different order of summation, accumulated over all denoising steps. The half-precision types
round every activation to 11 and 8 bits; the same margin in units of their last place would be 0.8 and 6.5, so these
bounds catch a wrong frame or position but not subtle errors, which need a check in float32.
"""
STEP_TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest difference between two forwards on the same inputs that counts as equal, relative to the largest output.

Measured on correct code: 1e-6 in float32 and 1e-2 in bfloat16. A position that is off by one, a slot too many or a lost
causal mask causes 1e-3 and more: float32 can tell these from rounding; half precision reveals only gross errors.
"""


def tolerance(chunk: ChunkComparison, dtype: torch.dtype) -> float:
    """Largest difference between outputs for a chunk that counts as equal."""
    return STEP_TOLERANCE[dtype] * chunk.scale


def verify_methods(
    pipeline: Pipeline,
    baselines: Sequence[str] = ("recompute",),
    *,
    steps: int | None = None,
    seed: int = 0,
    chunks_after_slide: int = 2,
) -> Iterator[ChunkComparison]:
    """``cached`` and exact baselines in lockstep until the window has slid, and a little further to show the drift."""
    window, start = TemporalWindow(pipeline.config.model), first_frame(pipeline.config)
    chunks = (window.context_frames - start) // window.chunk_frames + 1 + chunks_after_slide
    if window.longest is not None:
        chunks = min(chunks, (window.longest - start) // window.chunk_frames)
    return iter(SideBySide(pipeline, chunks, ("cached", *baselines), steps=steps, seed=seed))
