"""The benchmark: ``cached`` and its baselines on the same weights, seed, backend and dtype, taking turns."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ca2vdm_cli import __version__
from ca2vdm_cli.autoencoder import autoencoders, load_autoencoder
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import CachedContext, RecomputedContext, contexts
from ca2vdm_cli.memory import cache_bytes, text_bytes
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.presets import dump_preset
from ca2vdm_cli.runtime import available_memory, device_name, dtype_name

from .baselines import PerStepCachedContext, fixed_window
from .costs import per_step_cache_flops, recompute_flops, step_flops, write_flops
from .lockstep import ChunkComparison, MatrixProduct, SideBySide, first_frame
from .results import (
    BackendRun,
    Environment,
    Exactness,
    Growth,
    Memory,
    MethodResult,
    Operations,
    Repeat,
    Spread,
    SteadyState,
)
from .scaling import Curve
from .verify import tolerance

WARM_UP = 2
"""Chunks that never count as steady state: the second chunk's cache write is the first of its shape."""
FLOPS_TOLERANCE = 0.01
"""Largest relative difference between counted operations and the formula."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    baselines: tuple[str, ...] = ("recompute",)
    """Names of contexts; ``cached`` is always measured."""
    frames: int | None = None
    """Length of the video; see ``whole_chunks``."""
    context_frames: tuple[int, ...] = ()
    """Windows: the first is the video's (by default the preset's); at each of the others, one chunk is measured."""
    fixed_frames: int | None = None
    """Window of ``fixed-window``."""
    steps: int | None = None
    """Denoising steps; by default the preset's."""
    sampler: str | None = None
    """By default the preset's."""
    seed: int = 0
    """Seed of all randomness."""
    repeat: int = 1
    """How many times the whole video is generated."""


OnChunk = Callable[[ChunkComparison], None]


def whole_chunks(pipeline: Pipeline, frames: int | None, context_frames: int | None = None) -> int:
    """Whole chunks in ``frames`` frames; by default up to two chunks past the window, as far as positions allow."""
    window = TemporalWindow(pipeline.config.model, context_frames)
    if frames is not None:
        return math.ceil(frames / window.chunk_frames)
    chunks = math.ceil(window.context_frames / window.chunk_frames) + 2
    if window.longest is None:
        return chunks
    return min(chunks, (window.longest - first_frame(pipeline.config)) // window.chunk_frames)


def count_chunks(pipeline: Pipeline, settings: Settings) -> int:
    """Chunks that ``run_bench`` generates in all."""
    windows = settings.context_frames or (pipeline.config.model.context_frames,)
    return settings.repeat * whole_chunks(pipeline, settings.frames, windows[0]) + len(windows) - 1


def add_autoencoder(pipeline: Pipeline) -> None:
    """Give the pipeline the preset's own small autoencoder to time, with random weights if there are no others."""
    preset, config = pipeline.preset, pipeline.config
    if config.video is None or not autoencoders[config.autoencoder.kind].trained_here:
        return
    weights = preset.autoencoder_weights_path
    autoencoder = load_autoencoder(config.autoencoder, config.video, config.model.in_channels, weights)
    pipeline.autoencoder = autoencoder.to(pipeline.model.device)


def environment(pipeline: Pipeline) -> Environment:
    """The machine, the versions, and the model that is benchmarked."""
    model, config = pipeline.model, pipeline.config
    return Environment(
        version=__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        processor=device_name(model.device),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        available_memory_bytes=available_memory(model.device),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        preset=pipeline.preset.name,
        preset_sha256=hashlib.sha256(dump_preset(config).encode()).hexdigest(),
        trained=pipeline.trained,
        device=str(model.device),
        dtype=dtype_name(model.dtype),
        chunk_frames=config.model.chunk_frames,
        tokens_per_frame=config.model.tokens_per_frame,
        weights_bytes=pipeline.weights_bytes,
    )


def run_bench(pipeline: Pipeline, settings: Settings, on_chunk: OnChunk = lambda chunk: None) -> BackendRun:
    """Measure all methods on the pipeline's backend.

    The steady state is every chunk for which ``cached`` sees a full window, except the first ``WARM_UP`` chunks.
    Seconds per chunk are those of the network's denoising steps and of the cache write, which only ``cached`` has. Peak
    memory is the sum of weights, context, and the highest rise in an untimed step or cache write.

    Raises:
        UsageError: the video is longer than the model's positions allow, or the caches don't fit in memory.
    """
    windows = settings.context_frames or (pipeline.config.model.context_frames,)
    chunks = whole_chunks(pipeline, settings.frames, windows[0])
    _check_memory(pipeline, settings, max(windows))
    product = MatrixProduct(pipeline.model.device, pipeline.model.dtype)

    def generate(window: int, chunks: int, given_frames: int | None = None) -> tuple[SideBySide, list[ChunkComparison]]:
        video = SideBySide(
            pipeline,
            chunks,
            ("cached", *settings.baselines),
            steps=settings.steps,
            sampler=settings.sampler,
            seed=settings.seed,
            context_frames=window,
            fixed_frames=settings.fixed_frames,
            given_frames=given_frames,
            product=product,
            observe=True,
        )
        rows = []
        for row in video:
            rows.append(row)
            on_chunk(row)
        return video, rows

    repeats = []
    for _ in range(settings.repeat):
        video, rows = generate(windows[0], chunks)
        repeats.append(rows)
    evaluation = _Evaluation(pipeline, settings, windows[0], repeats, video, product)
    return evaluation.run({window: generate(window, 1, given_frames=window)[1][0] for window in windows[1:]})


def _check_memory(pipeline: Pipeline, settings: Settings, window: int) -> None:
    available, config = available_memory(pipeline.model.device), pipeline.config
    if "per-step-cache" not in settings.baselines or available is None:
        return
    steps = settings.steps or config.sampling.steps
    needed = steps * cache_bytes(config.model, window, pipeline.model.dtype.itemsize)
    if needed > available:
        raise UsageError(
            f"baselines: the {steps} caches of per-step-cache take {needed / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB are available; use fewer steps, or leave it out"
        )


@dataclass(frozen=True)
class _Formulas:
    """Operations and cache size of a method; None if unknown, as for a user's own context."""

    step_flops: Callable[[int], int] | None = None
    """From the number of frames that a chunk sees."""
    write_flops: int | None = None
    cache_bytes: int | None = None


class _Evaluation:
    """What follows from the chunks of one video, generated ``repeat`` times.

    Args:
        window: the video's.
        repeats: its chunks, for each repeat.
        video: the last repeat; its contexts are measured further.
        product: the machine's matrix product, as measured so far.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: Settings,
        window: int,
        repeats: list[list[ChunkComparison]],
        video: SideBySide,
        product: MatrixProduct,
    ) -> None:
        self.pipeline, self.config, self.settings = pipeline, pipeline.config.model, settings
        self.window, self.repeats, self.video = window, repeats, video
        self.methods = tuple(video.lockstep.contexts)
        self.rows = [row for rows in repeats for row in rows]
        self.steady = [row for row in self.rows if row.first_frame >= window and row.index >= WARM_UP]
        self.product_seconds, self.product_shape = list(product.seconds), product.shape
        self.rate = product.flops / statistics.median(product.seconds)
        self.rise_bytes = {method: video.rise(method) for method in self.methods}
        self.write_flops = {method: video.write_flops(method) for method in self.methods}

    def run(self, points: dict[int, ChunkComparison]) -> BackendRun:
        """The report of this backend; ``points`` are the chunks measured at further windows."""
        pipeline, settings = self.pipeline, self.settings
        results = {method: self._result(method) for method in self.methods}

        def ratios(value: Callable[[MethodResult], float | None]) -> dict[str, float | None]:
            ours = value(results["cached"])
            theirs = {method: value(results[method]) for method in settings.baselines}
            return {method: seconds / ours if seconds and ours else None for method, seconds in theirs.items()}

        per_chunk = ratios(lambda result: result.steady_seconds_per_chunk)
        return BackendRun(
            backend=pipeline.backend.name,
            frames=len(self.repeats[0]) * self.config.chunk_frames,
            first_frame=self.rows[0].first_frame,
            context_frames=self.window,
            fixed_window_frames=settings.fixed_frames or fixed_window(pipeline.model, self.window),
            steps=len(self.rows[0].times["cached"].step_seconds),
            timesteps=self.video.timesteps,
            sampler=settings.sampler or pipeline.config.sampling.sampler,
            seed=settings.seed,
            repeat=settings.repeat,
            results=results,
            speedup_per_step=ratios(lambda result: result.steady_seconds_per_step),
            speedup_per_chunk=per_chunk,
            speedup=per_chunk.get("recompute"),
            speedup_total=ratios(lambda result: result.seconds).get("recompute"),
            gemm_flops_per_second=self.rate,
            gemm_seconds=self.product_seconds,
            gemm_shape=list(self.product_shape),
            flops_agree=all((result.flops_error or 0) <= FLOPS_TOLERANCE for result in results.values()),
            cache_bytes_agree=all(
                result.cache_bytes_by_formula in (result.cache_bytes, None) for result in results.values()
            ),
            growth=Growth(
                frames={method: self._against_frames(method) for method in self.methods},
                context_frames={method: self._against_context(method, points) for method in self.methods},
            ),
            **vars(self._exactness()),
        )

    def _result(self, method: str) -> MethodResult:
        times = [row.times[method] for row in self.repeats[0]]
        repeats = [self._repeat(rows, method) for rows in self.repeats]
        first = [(rows[0].times[method].seconds, rows[0].decode_seconds or 0.0) for rows in self.repeats]
        return MethodResult(
            seconds=statistics.median(sum(row.times[method].seconds for row in rows) for rows in self.repeats),
            seconds_per_chunk=[chunk.seconds for chunk in times],
            seen_frames_per_chunk=[chunk.seen_frames for chunk in times],
            kept_bytes_per_chunk=[chunk.kept_bytes for chunk in times],
            step_rise_bytes_per_chunk=[chunk.rise_bytes for chunk in times],
            step_flops_per_chunk=[chunk.step_flops for chunk in times],
            repeats=repeats,
            warm_up_seconds=self.video.lockstep.observations[method].warm_up_seconds,
            first_chunk_seconds=statistics.median(seconds for seconds, _ in first),
            first_chunk_latency_seconds=statistics.median(map(sum, first)),
            **vars(repeats[0]),
            **vars(self._steady_state(method)),
            **vars(self._memory(method)),
            **vars(self._operations(method)),
        )

    @staticmethod
    def _repeat(rows: list[ChunkComparison], method: str) -> Repeat:
        return Repeat(
            seconds_per_step=[list(row.times[method].step_seconds) for row in rows],
            write_seconds_per_chunk=[row.times[method].write_seconds for row in rows],
            decode_seconds_per_chunk=[row.decode_seconds for row in rows],
            encode_seconds_per_chunk=[row.encode_seconds for row in rows],
        )

    def _steady_state(self, method: str) -> SteadyState:
        times = [row.times[method] for row in self.steady]
        chunks = [chunk.seconds for chunk in times]
        steps = [seconds for chunk in times for seconds in chunk.step_seconds]
        writes = [chunk.write_seconds for chunk in times]
        decode = _median([row.decode_seconds for row in self.steady if row.decode_seconds is not None])
        per_chunk = _median(chunks)
        total = None if per_chunk is None else per_chunk + (decode or 0.0)
        return SteadyState(
            steady_chunks=len(times),
            steady_seconds_per_chunk=per_chunk,
            steady_seconds_per_chunk_spread=_spread(chunks),
            steady_seconds_per_step=_median(steps),
            steady_seconds_per_step_spread=_spread(steps),
            steady_denoise_seconds=_median([sum(chunk.step_seconds) for chunk in times]),
            cache_write_seconds=_median(writes),
            cache_write_seconds_spread=_spread(writes),
            decode_seconds=decode,
            encode_seconds=_median([row.encode_seconds for row in self.steady if row.encode_seconds is not None]),
            steady_total_seconds=total,
            steady_frames_per_second=None if total is None else self.config.chunk_frames / total,
            mfu=_median([t.step_flops / seconds / self.rate for t in times for seconds in t.step_seconds]),
        )

    def _memory(self, method: str) -> Memory:
        context, rise = self.rows[-1].times[method].kept_bytes, self.rise_bytes[method]
        above_weights = None if rise is None else context + rise
        return Memory(
            cache_bytes=context if contexts[method].caches else 0,
            cache_bytes_by_formula=self._formulas(method).cache_bytes,
            context_bytes=context,
            peak_memory_bytes=None if above_weights is None else self.pipeline.weights_bytes + above_weights,
            peak_memory_above_weights_bytes=above_weights,
        )

    def _operations(self, method: str) -> Operations:
        times, write = [row.times[method] for row in self.rows], self.write_flops[method]
        formulas = self._formulas(method)
        expected = None if formulas.step_flops is None else [formulas.step_flops(chunk.seen_frames) for chunk in times]
        errors = [abs(chunk.step_flops / flops - 1) for chunk, flops in zip(times, expected or [], strict=False)]
        if write and formulas.write_flops:
            errors.append(abs(write / formulas.write_flops - 1))
        return Operations(
            flops_per_step=times[-1].step_flops,
            flops_per_step_by_formula=expected[-1] if expected else None,
            cache_write_flops=write,
            cache_write_flops_by_formula=formulas.write_flops,
            flops_per_chunk=len(times[-1].step_seconds) * times[-1].step_flops + (write or 0),
            flops_error=max(errors, default=None),
        )

    def _formulas(self, method: str) -> _Formulas:
        context, config, window = contexts[method], self.config, self.window
        itemsize = self.pipeline.model.dtype.itemsize
        if issubclass(context, RecomputedContext):
            return _Formulas(lambda seen: recompute_flops(config, seen), 0, None if context.caches else 0)
        cache = cache_bytes(config, window, itemsize, slid=self.rows[-1].first_frame > window)
        if context is CachedContext:
            return _Formulas(
                lambda seen: step_flops(config, window), write_flops(config, window, config.chunk_frames), cache
            )
        if context is PerStepCachedContext:
            text = text_bytes(config, itemsize)
            caches = text + (cache - text) * len(set(self.video.timesteps))
            return _Formulas(lambda seen: per_step_cache_flops(config, window), 0, caches)
        return _Formulas()

    def _exactness(self) -> Exactness:
        exact = any(contexts[method].exact for method in self.settings.baselines)
        before = [row for row in self.rows if row.before_slide]
        after = [row.differences.get("recompute", 0.0) for row in self.rows if not row.before_slide]
        dtype = self.pipeline.model.dtype
        return Exactness(
            outputs_agree=all(row.difference <= tolerance(row, dtype) for row in before) if exact else None,
            max_abs_difference_before_slide=max(row.difference for row in before) if exact else None,
            max_abs_output=max(row.scale for row in self.rows),
            max_abs_difference_after_slide=max(after) if after and "recompute" in self.methods else None,
            max_abs_difference_per_chunk=[row.difference for row in self.repeats[0]] if exact else None,
        )

    def _against_frames(self, method: str) -> Curve:
        """Totals after each chunk of the video, medians over the repeats."""
        times = [row.times[method] for row in self.repeats[0]]
        seconds = np.cumsum([[row.times[method].seconds for row in rows] for rows in self.repeats], axis=1)
        flops = [len(chunk.step_seconds) * chunk.step_flops for chunk in times]
        flops[1:] = [chunk + (self.write_flops[method] or 0) for chunk in flops[1:]]
        return Curve(
            frames=[row.first_frame + self.config.chunk_frames for row in self.repeats[0]],
            seconds=np.median(seconds, axis=0).tolist(),
            flops=np.cumsum(flops).tolist(),
            memory_bytes=[chunk.kept_bytes + chunk.rise_bytes for chunk in times],
        )

    def _against_context(self, method: str, points: dict[int, ChunkComparison]) -> Curve:
        """One denoising step at each context length.

        A method that recomputes has a cost for every number of frames that a chunk saw, so the chunks before the window
        is full count too. A cache has its full size from the start, and ``fixed-window`` sees the same few frames at
        every window, so their length is that of the window.
        """
        context = self.video.lockstep.contexts[method]
        rows = {window: [row] for window, row in points.items()}
        if context.caches or not (context.extendable or context.window.context_frames == self.window):
            rows[self.window] = self.steady or self.rows[-1:]
        else:
            for row in self.rows:
                rows.setdefault(row.times[method].seen_frames, []).append(row)
        lengths = sorted(rows)
        times = [[row.times[method] for row in rows[length]] for length in lengths]
        return Curve(
            frames=lengths,
            seconds=[statistics.median(s for chunk in chunks for s in chunk.step_seconds) for chunks in times],
            flops=[chunks[-1].step_flops for chunks in times],
            memory_bytes=[chunks[-1].kept_bytes + chunks[-1].rise_bytes for chunks in times],
        )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(*np.quantile(values, [0, 0.25, 0.75, 1]).tolist()) if values else None
