"""Exactness on the user's own weights: cached against recompute, and against recorded runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.pipeline import Pipeline

from .lockstep import ChunkComparison, SideBySide, first_frame

RUN_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest absolute difference allowed against a recorded run, whose numbers are of order 1.

float32 leaves room for another order of summation, carried through all denoising steps. The half-precision types round
every activation to 11 and 8 bits; the same margin in units of their last place would be 0.8 and 6.5, so these bounds
catch a wrong frame or position and not a subtle fault: that is what float32 is for.
"""
STEP_TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest difference of two forwards on the same inputs that still counts as equal, as a share of the largest output.

Measured on correct code: 1e-6 in float32 and 1e-2 in bfloat16. A position that is off by one, a slot too many or a lost
causal mask makes 1e-3 and more: float32 tells them from rounding, half precision only where they are gross.
"""


def agree(comparison: ChunkComparison, dtype: torch.dtype) -> bool:
    """Whether the contestants gave the same outputs for a chunk, up to rounding."""
    return comparison.difference <= STEP_TOLERANCE[dtype] * comparison.scale


def verify_strategies(
    pipeline: Pipeline, *, steps: int | None = None, seed: int = 0, chunks_after_slide: int = 2
) -> Iterator[ChunkComparison]:
    """Cached and recompute side by side until the window has slid, and a little further to show the drift."""
    clock, start = TemporalWindow(pipeline.config.model), first_frame(pipeline)
    chunks = (clock.context_frames - start) // clock.chunk_frames + 1 + chunks_after_slide
    if clock.longest is not None:
        chunks = min(chunks, (clock.longest - start) // clock.chunk_frames)
    return iter(SideBySide(pipeline, chunks, steps=steps, seed=seed))
