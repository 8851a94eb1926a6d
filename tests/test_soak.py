"""Long videos: flat memory, no open files, and the same step at any frame number."""

from __future__ import annotations

import pytest
import soak
import torch

from ca2vdm_cli.generate.context import CachedContext, RecomputedContext, make_context
from ca2vdm_cli.pipeline import Pipeline


@pytest.mark.slow
def test_a_run_of_60_chunks() -> None:
    """``python tests/soak.py`` runs 2,000."""
    run = soak.soak(60, videos=3, guided=True)
    assert run.problems(240) == []


def test_a_soak_sees_what_is_wrong() -> None:
    good = soak.Soak("", memory=[100] * 20, files=[3] * 20, frames=80, difference=0.0)
    assert good.problems(80) == []
    grown = soak.Soak("", memory=[50] * 9 + [100] * 9 + [104] * 2, files=[3] * 19 + [4], frames=84, difference=1e-3)
    assert grown.problems(80) == [
        "memory rises by 4.0%",
        "3 to 4 open files",
        "the cache counts 84 frames, not 80",
        "the next step differs by 1.0e-03",
    ]


def contexts_at(pipeline: Pipeline, frame: int) -> tuple[CachedContext, RecomputedContext]:
    """A cache and a window of latents with the same last chunks, which end before this frame of a long video."""
    model, window = pipeline.model, pipeline.config.model.context_frames
    cached, recomputed = make_context(model, "cached", 1), make_context(model, "recompute", 1)
    assert isinstance(cached, CachedContext) and isinstance(recomputed, RecomputedContext)
    chunks = torch.randn(4, 1, *pipeline.config.model.chunk_shape, generator=torch.Generator().manual_seed(3))
    cached.cache.frames = frame - 16
    for chunk in chunks:
        cached.append(chunk)
    recomputed._frames, recomputed._latents = frame, torch.cat(list(chunks), dim=2)[:, :, -window:]
    return cached, recomputed


@torch.inference_mode()
def next_step(context: CachedContext | RecomputedContext) -> torch.Tensor:
    noisy = torch.randn(1, *context.model.config.chunk_shape, generator=torch.Generator().manual_seed(2))
    context.open_chunk()
    return context.predict(noisy, torch.full((1,), 500))


@pytest.mark.parametrize("positions", ["cyclic", "rope"])
@pytest.mark.parametrize("frame", [10**6, 10**7, 10**9 + 7])
@torch.inference_mode()
def test_the_same_step_at_large_frame_numbers(positions: str, frame: int) -> None:
    """Like the step at a small number with the same slots and positions, and like a model that recomputes.

    With one block a frame remembers nothing from before the window, so both agree after the window has slid too.
    """
    pipeline = soak.load(depth=1, temporal_positions=positions)
    cached, recomputed = contexts_at(pipeline, frame)
    output = next_step(cached)
    assert float((output - next_step(recomputed)).abs().max()) <= 1e-5
    period = 39  # frames: 13 slots and positions, 3 slots of the spatial prefix
    small, _ = contexts_at(pipeline, frame % period + 2 * period)  # with rope, any number gives the same
    assert float((output - next_step(small)).abs().max()) <= 1e-5
    other, _ = contexts_at(pipeline, frame % period + 2 * period + 1)
    if positions == "cyclic":
        assert float((output - next_step(other)).abs().max()) > 1e-3, "positions count"
