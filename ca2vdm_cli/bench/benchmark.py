"""The benchmark: the cache and its opponents on the same weights, seed, backend and precision, taking turns."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ca2vdm_cli import __version__
from ca2vdm_cli.autoencoder import autoencoders, load_autoencoder
from ca2vdm_cli.config import ModelConfig
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import contexts
from ca2vdm_cli.generate.samplers import sampler_for
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.presets import dump_preset
from ca2vdm_cli.runtime import available_memory, device_name, dtype_name

from .baselines import fixed_window
from .costs import cache_bytes, per_step_cache_flops, recompute_flops, step_flops, text_bytes, write_flops
from .lockstep import ChunkComparison, MatrixProduct, SideBySide, first_frame
from .scaling import Curve
from .verify import agree

WARM_UP = 2
"""The first chunks, whatever they see, are not steady: the second one's cache write is the first of its shape."""
FLOPS_TOLERANCE = 0.01
"""Share by which counted operations may differ from the formula's."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    opponents: tuple[str, ...] = ("recompute",)
    """Whom the cache is compared with, each once."""
    frames: int | None = None
    """Length of the video; see ``whole_chunks``."""
    context_frames: tuple[int, ...] = ()
    """Windows: the first is that of the video, the preset's by default; at each other a chunk is measured."""
    fixed_frames: int | None = None
    """Window of ``fixed-window``."""
    steps: int | None = None
    """Denoising steps; the preset's by default."""
    sampler: str | None = None
    """By name; the preset's by default."""
    seed: int = 0
    """Of all randomness."""
    repeat: int = 1
    """How often the whole video is made."""


OnChunk = Callable[[ChunkComparison], None]


def whole_chunks(pipeline: Pipeline, frames: int | None, context_frames: int | None = None) -> int:
    """How many chunks ``frames`` frames are; by default up to two chunks past the window, where positions allow."""
    clock = TemporalWindow(pipeline.config.model, context_frames)
    if frames is not None:
        return math.ceil(frames / clock.chunk_frames)
    chunks = math.ceil((clock.context_frames + 2 * clock.chunk_frames) / clock.chunk_frames)
    if clock.longest is None:
        return chunks
    return min(chunks, (clock.longest - first_frame(pipeline)) // clock.chunk_frames)


def count_chunks(pipeline: Pipeline, settings: Settings) -> int:
    """Chunks that ``run_bench`` makes in all."""
    windows = settings.context_frames or (pipeline.config.model.context_frames,)
    return settings.repeat * whole_chunks(pipeline, settings.frames, windows[0]) + len(windows) - 1


def add_autoencoder(pipeline: Pipeline) -> None:
    """Give the pipeline the preset's own small autoencoder to time, with random weights if there are none."""
    preset, config = pipeline.preset, pipeline.config
    if config.video is None or not autoencoders[config.autoencoder.kind].trained_here:
        return
    weights = preset.autoencoder_weights_path
    autoencoder = load_autoencoder(config.autoencoder, config.video, config.model.in_channels, weights)
    pipeline.autoencoder = autoencoder.to(pipeline.model.device)


def environment(pipeline: Pipeline) -> dict[str, Any]:
    """The machine, the versions, and what is benchmarked."""
    model, config = pipeline.model, pipeline.config
    return {
        "version": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": device_name(model.device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "available_memory_bytes": available_memory(model.device),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "preset": pipeline.preset.name,
        "preset_sha256": hashlib.sha256(dump_preset(config).encode()).hexdigest(),
        "trained": pipeline.trained,
        "device": str(model.device),
        "dtype": dtype_name(model.dtype),
        "chunk_frames": config.model.chunk_frames,
        "tokens_per_frame": config.model.tokens_per_frame,
        "weights_bytes": pipeline.weights_bytes,
    }


def run_bench(pipeline: Pipeline, settings: Settings, on_chunk: OnChunk = lambda chunk: None) -> dict[str, Any]:
    """Measure all contestants on one backend; returns that part of the report of ``bench --json``.

    The steady state is every chunk that the cache sees a full window from, but for the first ones. Seconds per chunk
    count the network's denoising steps and the cache write, which only ``cached`` has. Peak memory is weights, kept
    context, and the highest rise in a step or a cache write, outside the clock. What was not measured is None.

    Raises:
        UsageError: a video that positions have no room for, or more caches than memory has.
    """
    windows = settings.context_frames or (pipeline.config.model.context_frames,)
    chunks = whole_chunks(pipeline, settings.frames, windows[0])
    contestants = ("cached", *settings.opponents)
    _check_memory(pipeline, settings, max(windows))
    product = MatrixProduct(pipeline.model.device, pipeline.model.dtype)

    def side_by_side(window: int, chunks: int, given_frames: int | None = None) -> SideBySide:
        return SideBySide(
            pipeline,
            chunks,
            contestants,
            steps=settings.steps,
            sampler=settings.sampler,
            seed=settings.seed,
            context_frames=window,
            fixed_frames=settings.fixed_frames,
            given_frames=given_frames,
            product=product,
            observe=True,
        )

    repeats = []
    for _ in range(settings.repeat):
        compared = side_by_side(windows[0], chunks)
        rows = []
        for row in compared:
            rows.append(row)
            on_chunk(row)
        repeats.append(rows)
    measured = _Run(pipeline, settings, windows[0], contestants, repeats, compared, product)
    points = {}
    for window in windows[1:]:
        for row in side_by_side(window, 1, given_frames=window):
            points[window] = row
            on_chunk(row)
    return measured.report() | {"growth": measured.growth(points)}


def formula_flops(contestant: str, config: ModelConfig, seen: int, window: int) -> int:
    """Operations of a contestant's denoising step at that window, where the chunk sees ``seen`` frames."""
    if contestant == "cached":
        return step_flops(config, window)
    if contestant == "per-step-cache":
        return per_step_cache_flops(config, window)
    return recompute_flops(config, seen)


def _check_memory(pipeline: Pipeline, settings: Settings, window: int) -> None:
    available, config = available_memory(pipeline.model.device), pipeline.config
    if "per-step-cache" not in settings.opponents or available is None:
        return
    steps = settings.steps or config.sampling.steps
    needed = steps * cache_bytes(config.model, window, pipeline.model.dtype.itemsize)
    if needed > available:
        raise UsageError(
            f"--compare per-step-cache: its {steps} caches take {needed / 2**30:.1f} GiB and {available / 2**30:.1f} "
            "are available; ask for fewer --steps, or leave it out"
        )


class _Run:
    """One video, made ``repeat`` times by all contestants, and what follows from it."""

    def __init__(
        self,
        pipeline: Pipeline,
        settings: Settings,
        window: int,
        contestants: Sequence[str],
        repeats: list[list[ChunkComparison]],
        compared: SideBySide,
        product: MatrixProduct,
    ) -> None:
        self.pipeline, self.config, self.settings = pipeline, pipeline.config.model, settings
        self.window, self.contestants, self.repeats, self.compared = window, contestants, repeats, compared
        self.rows = [row for rows in repeats for row in rows]
        self.steady = [row for row in self.rows if row.first_frame >= window and row.index >= WARM_UP]
        sampling = pipeline.config.sampling
        self.sampler = settings.sampler or sampling.sampler
        solver = sampler_for(pipeline.process, sampling, name=settings.sampler, steps=settings.steps)
        self.timesteps = list(solver.timesteps)
        self.product_seconds = list(product.seconds)  # so far: later ones belong to other windows
        self.product_shape = product.shape
        self.rate = product.flops / statistics.median(product.seconds)
        self.steps = len(self.rows[0].times["cached"].step_seconds)
        self.rises = {one: compared.rise(one) for one in contestants}
        self.write_flops = {one: compared.write_flops(one) if one == "cached" else 0 for one in contestants}

    def report(self) -> dict[str, Any]:
        """Everything but growth."""
        settings, pipeline, config = self.settings, self.pipeline, self.config
        results = {one: self._result(one) for one in self.contestants}

        def ratios(key: str) -> dict[str, float | None]:
            ours = results["cached"][key]
            theirs = {one: results[one][key] for one in settings.opponents}
            return {name: value / ours if value and ours else None for name, value in theirs.items()}

        before, after = ([row for row in self.rows if row.before_slide is slid] for slid in (True, False))
        exact = any(contexts[one].exact for one in settings.opponents)
        per_chunk = ratios("steady_seconds_per_chunk")
        return {
            "backend": pipeline.backend.name,
            "frames": len(self.repeats[0]) * config.chunk_frames,
            "first_frame": self.rows[0].first_frame,
            "context_frames": self.window,
            "fixed_window_frames": settings.fixed_frames or fixed_window(pipeline.model, self.window),
            "steps": self.steps,
            "timesteps": self.timesteps,
            "sampler": self.sampler,
            "seed": settings.seed,
            "repeat": settings.repeat,
            "results": results,
            "speedup_per_step": ratios("steady_seconds_per_step"),
            "speedup_per_chunk": per_chunk,
            "speedup": per_chunk.get("recompute"),
            "speedup_total": ratios("seconds").get("recompute"),
            "gemm_flops_per_second": self.rate,
            "gemm_seconds": self.product_seconds,
            "gemm_shape": list(self.product_shape),
            "outputs_agree": all(agree(row, pipeline.model.dtype) for row in before) if exact else None,
            "max_abs_difference_before_slide": max(row.difference for row in before) if exact else None,
            "max_abs_output": max(row.scale for row in self.rows),
            "max_abs_difference_after_slide": max(
                (row.differences["recompute"] for row in after if "recompute" in row.differences),
                default=None,
            ),
            "max_abs_difference_per_chunk": [row.difference for row in self.repeats[0]] if exact else None,
            "flops_agree": all(result["flops_error"] <= FLOPS_TOLERANCE for result in results.values()),
            "cache_bytes_agree": all(
                result["cache_bytes"] == result["cache_bytes_by_formula"] for result in results.values()
            ),
        }

    def _result(self, contestant: str) -> dict[str, Any]:
        every, steady = ([row.times[contestant] for row in some] for some in (self.rows, self.steady))
        first = [rows[0] for rows in self.repeats]
        decode = [row.decode_seconds for row in self.steady if row.decode_seconds is not None]
        encode = [row.encode_seconds for row in self.steady if row.encode_seconds is not None]
        chunk_seconds = [times.seconds for times in steady]
        step_seconds = [seconds for times in steady for seconds in times.step_seconds]
        per_chunk, pixels = _median(chunk_seconds), _median(decode)
        total = None if per_chunk is None else per_chunk + (pixels or 0.0)
        kept, rise, weights = every[-1].kept_bytes, self.rises[contestant], self.pipeline.weights_bytes
        observation = self.compared.lockstep.observations[contestant]
        expected = [formula_flops(contestant, self.config, times.seen_frames, self.window) for times in every]
        errors = [abs(times.step_flops / flops - 1) for times, flops in zip(every, expected, strict=True)]
        writes, writes_expected = self.write_flops[contestant], 0
        if contestant == "cached":
            writes_expected = write_flops(self.config, self.window, self.config.chunk_frames)
            errors += [abs(writes / writes_expected - 1)] if writes else []
        utilization = [times.step_flops / seconds / self.rate for times in steady for seconds in times.step_seconds]
        seconds = [sum(row.times[contestant].seconds for row in rows) for rows in self.repeats]
        own = self.repeats[0]
        return {
            "seconds": _median(seconds),
            "seconds_per_chunk": [row.times[contestant].seconds for row in own],
            "seconds_per_step": [list(row.times[contestant].step_seconds) for row in own],
            "write_seconds_per_chunk": [row.times[contestant].write_seconds for row in own],
            "decode_seconds_per_chunk": [row.decode_seconds for row in own],
            "encode_seconds_per_chunk": [row.encode_seconds for row in own],
            "seen_frames_per_chunk": [row.times[contestant].seen_frames for row in own],
            "kept_bytes_per_chunk": [row.times[contestant].kept_bytes for row in own],
            "step_rise_bytes_per_chunk": [row.times[contestant].rise_bytes for row in own],
            "step_flops_per_chunk": [row.times[contestant].step_flops for row in own],
            "repeats": [
                {
                    "seconds_per_step": [list(row.times[contestant].step_seconds) for row in rows],
                    "write_seconds_per_chunk": [row.times[contestant].write_seconds for row in rows],
                    "decode_seconds_per_chunk": [row.decode_seconds for row in rows],
                    "encode_seconds_per_chunk": [row.encode_seconds for row in rows],
                }
                for rows in self.repeats
            ],
            "warm_up_seconds": observation.warm_up_seconds,
            "first_chunk_seconds": _median([row.times[contestant].seconds for row in first]),
            "first_chunk_latency_seconds": _median(
                [row.times[contestant].seconds + (row.decode_seconds or 0.0) for row in first]
            ),
            "steady_chunks": len(steady),
            "steady_seconds_per_chunk": per_chunk,
            "steady_seconds_per_chunk_spread": _spread(chunk_seconds),
            "steady_seconds_per_step": _median(step_seconds),
            "steady_seconds_per_step_spread": _spread(step_seconds),
            "steady_denoise_seconds": _median([sum(times.step_seconds) for times in steady]),
            "cache_write_seconds": _median([times.write_seconds for times in steady]),
            "cache_write_seconds_spread": _spread([times.write_seconds for times in steady]),
            "decode_seconds": pixels,
            "encode_seconds": _median(encode),
            "steady_total_seconds": total,
            "steady_frames_per_second": None if total is None else self.config.chunk_frames / total,
            "cache_bytes": kept if contexts[contestant].caches else 0,
            "cache_bytes_by_formula": self._cache_bytes(contestant),
            "context_bytes": kept,
            "peak_memory_bytes": None if rise is None else weights + kept + rise,
            "peak_memory_above_weights_bytes": None if rise is None else kept + rise,
            "flops_per_step": every[-1].step_flops,
            "flops_per_step_by_formula": expected[-1],
            "cache_write_flops": writes,
            "cache_write_flops_by_formula": writes_expected,
            "flops_per_chunk": self.steps * every[-1].step_flops + (writes or 0),
            "flops_error": max(errors),
            "mfu": _median(utilization),
        }

    def _cache_bytes(self, contestant: str) -> int:
        if not contexts[contestant].caches:
            return 0
        slid = self.rows[-1].first_frame > self.window
        size = self.pipeline.model.dtype.itemsize
        one, text = cache_bytes(self.config, self.window, size, slid=slid), text_bytes(self.config, size)
        return text + (one - text) * (1 if contestant == "cached" else len(set(self.timesteps)))

    def growth(self, points: dict[int, ChunkComparison]) -> dict[str, Any]:
        """Curves against the video's length and against the context's."""
        return {
            "frames": {one: self._against_frames(one).as_report() for one in self.contestants},
            "context_frames": {one: self._against_context(one, points).as_report() for one in self.contestants},
        }

    def _against_frames(self, contestant: str) -> Curve:
        """Totals after each chunk of the video, medians over the repeats."""
        curve, flops = Curve([], [], [], []), 0
        totals = np.cumsum([[row.times[contestant].seconds for row in rows] for rows in self.repeats], axis=1)
        for row, seconds in zip(self.repeats[0], np.median(totals, axis=0).tolist(), strict=True):
            times = row.times[contestant]
            flops += self.steps * times.step_flops + ((self.write_flops[contestant] or 0) if row.index else 0)
            curve.frames.append(row.first_frame + self.config.chunk_frames)
            curve.seconds.append(seconds)
            curve.flops.append(flops)
            curve.memory_bytes.append(times.kept_bytes + times.rise_bytes)
        return curve

    def _against_context(self, contestant: str, points: dict[int, ChunkComparison]) -> Curve:
        """One denoising step at each length of context that was met.

        What is fed again grows with the frames that a chunk sees, so the chunks before the window is full count; a
        cache is as large as its window from the start, and ``fixed-window`` never sees more.
        """
        found: dict[int, list[ChunkComparison]] = {window: [row] for window, row in points.items()}
        if contexts[contestant].extendable or contestant == "recompute":
            for row in self.rows:
                found.setdefault(row.times[contestant].seen_frames, []).append(row)
        else:
            found[self.window] = self.steady or self.rows[-1:]
        curve = Curve([], [], [], [])
        for length in sorted(found):
            every = [row.times[contestant] for row in found[length]]
            curve.frames.append(length)
            curve.seconds.append(statistics.median(second for times in every for second in times.step_seconds))
            curve.flops.append(every[-1].step_flops)
            curve.memory_bytes.append(every[-1].kept_bytes + every[-1].rise_bytes)
        return curve


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """The least, the quartiles and the most."""
    if not values:
        return None
    names = ("min", "quarter", "three_quarters", "max")
    return dict(zip(names, np.quantile(values, [0, 0.25, 0.75, 1]).tolist(), strict=True))
