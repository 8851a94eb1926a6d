"""The comparison: cached against recompute, with the same weights, seed and backend, in one run."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch

from . import __version__
from .compare import ChunkComparison, SideBySide, first_frame
from .frame_plan import FrameClock
from .generation import Strategy
from .pipeline import Pipeline
from .runtime import processor
from .verify import agree

WARM_UP = 2
"""The first chunks, whatever they see, are not steady: the second one's cache write is the first of its shape."""


def whole_chunks(pipeline: Pipeline, frames: int | None, context_frames: int | None = None) -> int:
    """How many chunks ``frames`` frames are; by default up to two chunks past the window, where positions allow."""
    clock = FrameClock(pipeline.config.model, context_frames)
    if frames is not None:
        return math.ceil(frames / clock.chunk_frames)
    chunks = math.ceil((clock.context_frames + 2 * clock.chunk_frames) / clock.chunk_frames)
    if clock.longest is None:
        return chunks
    return min(chunks, (clock.longest - first_frame(pipeline)) // clock.chunk_frames)


def run_bench(
    pipeline: Pipeline,
    chunks: int,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    context_frames: int | None = None,
    on_chunk: Callable[[ChunkComparison], None] = lambda chunk: None,
) -> dict[str, Any]:
    """Measure both strategies; returns the report of ``bench --json``.

    The steady state is every chunk that sees a full window, but for the first ones. Seconds per chunk count the
    network's denoising steps and the cache write; ``recompute`` has no write. Peak memory is weights, kept context, and
    the highest rise while a chunk is made context and one more step is denoised, whose time is not counted.

    Args:
        chunks: length of the video; see ``whole_chunks``.
        steps, sampler, seed, context_frames: as in ``Pipeline.sample``.
        on_chunk: called with each chunk as soon as it is there.

    Raises:
        UsageError: a video that positions have no room for.
    """
    config, model = pipeline.config.model, pipeline.model
    window = context_frames or config.context_frames
    steps = steps or pipeline.config.sampling.steps
    compared = SideBySide(pipeline, chunks, steps=steps, sampler=sampler, seed=seed, context_frames=context_frames)
    rows: list[ChunkComparison] = []
    for row in compared:
        rows.append(row)
        on_chunk(row)
    steady = [row for row in rows if row.first_frame >= window and row.index >= WARM_UP]
    results = {strategy.value: _measure(pipeline, compared, strategy, rows, steady) for strategy in rows[0].times}
    cached, recompute = results["cached"], results["recompute"]

    def ratio(key: str) -> float | None:
        return recompute[key] / cached[key] if cached[key] and recompute[key] else None

    before = [row for row in rows if row.before_slide]
    after = [row for row in rows if not row.before_slide]
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(model.device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "preset": pipeline.preset.name,
        "trained": pipeline.trained,
        "backend": pipeline.backend.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "frames": chunks * config.chunk_frames,
        "chunk_frames": config.chunk_frames,
        "context_frames": window,
        "tokens_per_frame": config.tokens_per_frame,
        "steps": steps,
        "sampler": sampler or pipeline.config.sampling.sampler,
        "seed": seed,
        "weights_bytes": pipeline.weights_bytes,
        "results": results,
        "speedup": ratio("steady_seconds_per_chunk"),
        "speedup_per_step": ratio("steady_seconds_per_step"),
        "speedup_total": ratio("seconds"),
        "outputs_agree": all(agree(row, model.dtype) for row in before),
        "max_abs_difference_before_slide": max(row.difference for row in before),
        "max_abs_output": max(row.scale for row in rows),
        "max_abs_difference_after_slide": max((row.difference for row in after), default=None),
    }


def _measure(
    pipeline: Pipeline,
    compared: SideBySide,
    strategy: Strategy,
    rows: list[ChunkComparison],
    steady: list[ChunkComparison],
) -> dict[str, Any]:
    def median(values: list[float]) -> float | None:
        return statistics.median(values) if values else None

    every, steady_times = ([row.times[strategy] for row in some] for some in (rows, steady))
    context, growth = compared.lockstep.contexts[strategy].nbytes, compared.growth(strategy)
    return {
        "seconds": sum(times.seconds for times in every),
        "seconds_per_chunk": [times.seconds for times in every],
        "seconds_per_step": [list(times.step_seconds) for times in every],
        "first_chunk_seconds": every[0].seconds,
        "steady_chunks": len(steady),
        "steady_seconds_per_chunk": median([times.seconds for times in steady_times]),
        "steady_seconds_per_step": median([seconds for times in steady_times for seconds in times.step_seconds]),
        "cache_write_seconds": median([times.write_seconds for times in steady_times]),
        "cache_bytes": context if strategy is Strategy.CACHED else 0,
        "context_bytes": context,
        "peak_memory_bytes": None if growth is None else pipeline.weights_bytes + context + growth,
    }
