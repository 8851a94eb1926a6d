"""The comparison: cached against recompute, with the same weights, seed and backend, in one run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from .compare import ChunkComparison, SideBySide
from .generation import Strategy
from .pipeline import Pipeline
from .verify import tolerance


def run_bench(
    pipeline: Pipeline,
    frames: int,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    context_frames: int | None = None,
    on_chunk: Callable[[ChunkComparison], None] = lambda chunk: None,
) -> dict[str, Any]:
    """Measure both strategies; returns the report of ``bench --json``.

    The steady state is every chunk that sees a full window, but for the very first chunk, which warms up. Seconds per
    chunk count the denoising steps and the cache write; ``recompute`` has no write. Peak memory is weights, kept
    context, and the highest rise while one more chunk is made, whose time is not counted.
    """
    config = pipeline.config.model
    window = context_frames or config.context_frames
    chunks = math.ceil(frames / config.chunk_frames)
    steps = steps or pipeline.config.sampling.steps
    rows: list[ChunkComparison] = []
    compared = SideBySide(pipeline, chunks, steps=steps, sampler=sampler, seed=seed, context_frames=context_frames)
    for row in compared:
        rows.append(row)
        on_chunk(row)
    steady = [row for row in rows if row.first_frame >= window and row.index > 0]
    results = {
        strategy.value: _measure(pipeline, compared, strategy, rows, steady, steps) for strategy in rows[0].chunks
    }
    cached, recompute = results["cached"], results["recompute"]

    def ratio(key: str) -> float | None:
        return recompute[key] / cached[key] if cached[key] and recompute[key] else None

    before = [row for row in rows if row.before_slide]
    after = [row for row in rows if not row.before_slide]
    return {
        "preset": pipeline.preset.name,
        "trained": pipeline.trained,
        "backend": pipeline.backend.name,
        "device": str(pipeline.model.device),
        "dtype": str(pipeline.model.dtype).removeprefix("torch."),
        "frames": chunks * config.chunk_frames,
        "chunk_frames": config.chunk_frames,
        "context_frames": window,
        "tokens_per_frame": config.tokens_per_frame,
        "steps": steps,
        "seed": seed,
        "weights_bytes": pipeline.weights_bytes,
        "results": results,
        "speedup": ratio("steady_seconds_per_chunk"),
        "speedup_per_step": ratio("steady_seconds_per_step"),
        "speedup_total": ratio("seconds"),
        "outputs_agree": all(row.difference <= tolerance(pipeline.model.dtype, row.scale) for row in before),
        "max_abs_difference_before_slide": max(row.difference for row in before),
        "max_abs_latent": max(row.scale for row in rows),
        "max_abs_difference_after_slide": max((row.difference for row in after), default=None),
    }


def _measure(
    pipeline: Pipeline,
    compared: SideBySide,
    strategy: Strategy,
    rows: list[ChunkComparison],
    steady: list[ChunkComparison],
    steps: int,
) -> dict[str, Any]:
    def seconds(row: ChunkComparison) -> float:
        chunk = row.chunks[strategy]
        return chunk.denoise_seconds + chunk.write_seconds

    def median(values: list[float]) -> float | None:
        return statistics.median(values) if values else None

    context, growth = compared.contexts[strategy].nbytes, compared.growth(strategy)
    return {
        "seconds": sum(map(seconds, rows)),
        "seconds_per_chunk": [seconds(row) for row in rows],
        "first_chunk_seconds": seconds(rows[0]),
        "steady_chunks": len(steady),
        "steady_seconds_per_chunk": median([seconds(row) for row in steady]),
        "steady_seconds_per_step": median([row.chunks[strategy].denoise_seconds / steps for row in steady]),
        "cache_write_seconds": median([row.chunks[strategy].write_seconds for row in steady]),
        "cache_bytes": context if strategy is Strategy.CACHED else 0,
        "context_bytes": context,
        "peak_memory_bytes": None if growth is None else pipeline.weights_bytes + context + growth,
    }
