"""Estimates of a video's cost before it is generated: cache, memory, operations and time.

Memory and the numbers of operations come from formulas. Time is measured for about two seconds on a model of the same
width and window with fewer blocks, and scaled to the full depth by the number of operations.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ca2vdm_cli import STARTED
from ca2vdm_cli.autoencoder import Autoencoder, autoencoders, load_autoencoder
from ca2vdm_cli.config import ModelConfig, TemporalPositions
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import CachedContext, make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import stored_caption
from ca2vdm_cli.generate.samplers import Sampler, sampler_for
from ca2vdm_cli.loading import build_model, randomize
from ca2vdm_cli.memory import MemoryNeeds, cache_parts, check_generation, generation_needs
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.presets import LoadedPreset
from ca2vdm_cli.runtime import PeakMemory, available_memory, dtype_name, resident_memory

from .costs import largest_window, step_flops, write_flops
from .lockstep import first_frame, timed

MEASURE_SECONDS = 2.0
"""Roughly how long the machine is measured."""


@dataclass(frozen=True)
class Workload:
    """One video, generated with the cache."""

    preset: LoadedPreset
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    frames: int
    steps: int
    sampler: str
    context_frames: int | None = None
    """Window in frames; by default the preset's."""
    cache_budget: int | None = None
    """Bytes that the cache may take; by default all memory that the rest leaves."""
    weights_file_bytes: int = 0
    """Size of the weights file, which is in memory together with the model during loading."""


def estimate(workload: Workload) -> dict[str, Any]:
    """The estimates, as ``plan --json`` prints them.

    Raises:
        UsageError: a window, length, sampler or number of steps that the model doesn't support.
    """
    model_config = workload.preset.config.model
    startup_seconds = time.perf_counter() - STARTED
    temporal_window = TemporalWindow(model_config, workload.context_frames)
    window, length = temporal_window.context_frames, model_config.chunk_frames
    first = first_frame(workload.preset.config)
    chunks = max(1, math.ceil((workload.frames - first) / length))
    temporal_window.check_length(first + chunks * length)
    steps = len(_sampler(workload).timesteps)  # some schedulers take more steps than requested
    slid = first + (chunks - 1) * length > window
    memory = generation_needs(
        workload.preset.config,
        workload.dtype,
        workload.device,
        scores=workload.backend.writes_scores,
        context_frames=window,
        slid=slid,
        weights_file_bytes=workload.weights_file_bytes,
    )
    available = available_memory(workload.device)
    needed = memory.peak if workload.device.type == "cpu" else memory.running
    fits = available is None or needed <= available
    _check_probe(workload, window, memory)
    autoencoder = _load_autoencoder(workload)
    times = _measure(workload, autoencoder)
    process = 0 if workload.device.type == "cuda" else resident_memory()

    per_chunk = steps * (times.step + times.sampler) + times.write + times.decode
    model_peak = memory.weights + memory.cache + max(memory.step, memory.write)
    step, write = step_flops(model_config, window), write_flops(model_config, window, length)
    denoise_seconds = chunks * steps * (times.step + times.sampler)
    writes = chunks - 1 + first
    write_seconds = writes * times.write
    seconds = denoise_seconds + write_seconds + chunks * times.decode
    budget = workload.cache_budget
    if budget is None and available is not None:
        budget = max(0, available - (memory.running - memory.cache))
    return {
        "preset": workload.preset.name,
        "backend": workload.backend.name,
        "device": str(workload.device),
        "dtype": dtype_name(workload.dtype),
        "frames": workload.frames,
        "chunks": chunks,
        "steps": steps,
        "sampler": workload.sampler,
        "context_frames": window,
        "cache_bytes": memory.cache,
        "cache_parts_bytes": cache_parts(model_config, window, workload.dtype.itemsize, slid=slid),
        "weights_bytes": memory.weights + memory.autoencoder,
        "step_rise_bytes": memory.step,
        "write_rise_bytes": memory.write,
        "decode_rise_bytes": memory.decode,
        "model_peak_memory_bytes": model_peak,
        "process_bytes": process,
        "peak_memory_bytes": process + memory.peak,
        "flops_per_step": step,
        "cache_write_flops": write,
        "flops": chunks * steps * step + (chunks - 1) * write + first * write_flops(model_config, window, first),
        "seconds_per_step": times.step,
        "cache_write_seconds": times.write,
        "sampler_seconds_per_step": times.sampler,
        "decode_seconds": times.decode,
        "seconds_per_chunk": per_chunk,
        "network_seconds": chunks * steps * times.step + write_seconds,
        "startup_seconds": startup_seconds + times.loading,
        "seconds": startup_seconds + times.loading + seconds,
        "first_chunk_seconds": startup_seconds + times.loading + per_chunk - times.write,
        "frames_per_second": workload.frames / seconds,
        "measured_depth": times.depth,
        "available_memory_bytes": available,
        "fits": fits,
        "cache_budget_bytes": budget,
        **_windows(workload, budget),
        "left_out": _left_out(workload),
    }


def _check_probe(workload: Workload, window: int, whole: MemoryNeeds) -> None:
    """Refuse to measure a machine that cannot even hold one block, with what the whole model needs."""
    preset, available = workload.preset.config, available_memory(workload.device)
    one = replace(preset, model=replace(preset.model, depth=1))
    scores = workload.backend.writes_scores
    needs = generation_needs(one, workload.dtype, workload.device, scores=scores, context_frames=window)
    if available is not None and needs.peak > available:
        check_generation(whole, workload.device, force=None)


def _left_out(workload: Workload) -> list[str]:
    """What the estimates do not include."""
    config, parts = workload.preset.config, []
    if config.video is not None and not autoencoders[config.autoencoder.kind].trained_here:
        parts.append("the autoencoder of diffusers")
    if config.text is not None:
        parts += ["the text encoder", "a prompt's guidance (twice the cache and the operations of a step)"]
    return parts


def _windows(workload: Workload, budget: int | None) -> dict[str, int | None]:
    """The longest window that fits the budget, that the model's positions allow, and that is in its training."""
    config, trained = workload.preset.config.model, max(workload.preset.config.trained_prefixes)
    fits = None if budget is None else largest_window(config, budget, workload.dtype.itemsize)
    longest = None
    if config.temporal_positions is not TemporalPositions.ROPE:
        longest = config.table_length - config.chunk_frames
    largest = min(frames for frames in (fits, longest, trained) if frames is not None)
    try:
        TemporalWindow(config, largest)
    except UsageError:
        largest = 0
    return {
        "largest_window_in_budget": fits,
        "largest_window_of_positions": longest,
        "largest_window_in_training": trained,
        "largest_window": largest,
    }


def _shape(config: ModelConfig) -> tuple[int, ...]:
    return (1, *config.chunk_shape)


def _frames_shape(config: ModelConfig) -> tuple[int, ...]:
    """A chunk as the autoencoder takes it: frames are its batch."""
    return (config.chunk_frames, config.in_channels, config.latent_height, config.latent_width)


def _load_autoencoder(workload: Workload) -> Autoencoder | None:
    """The preset's own small autoencoder with random weights; None if the preset has none, or a large one."""
    config = workload.preset.config
    if config.video is None or not autoencoders[config.autoencoder.kind].trained_here:
        return None
    return load_autoencoder(config.autoencoder, config.video, config.model.in_channels).to(workload.device)


def _full_context(model: CausalVideoTransformer, window: int | None) -> CachedContext:
    """A cache with one chunk, ready for a denoising step. A step costs the same however full the cache is."""
    context = make_context(model, "cached", 1, context_frames=window)
    assert isinstance(context, CachedContext)
    caption = stored_caption(model, 1)
    if caption is not None:
        context.set_text(model.text_keys_values(caption.embedding, caption.mask))
    context.append(torch.zeros(_shape(model.config), device=model.device))
    context.open_chunk()
    return context


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Times:
    """Seconds, scaled to the full depth."""

    step: float
    write: float
    sampler: float
    decode: float
    loading: float
    depth: int
    """Blocks of the measured model."""


@torch.inference_mode()
def _measure(workload: Workload, autoencoder: Autoencoder | None) -> _Times:
    """Measure one block, then as many as time allows, up to the full depth."""
    config = workload.preset.config.model
    sampler = _sampler_seconds(workload)
    decode = 0.0
    if autoencoder is not None:
        frames = torch.randn(_frames_shape(config), device=workload.device)
        decode = _seconds(lambda: autoencoder.decode(frames), workload.device, MEASURE_SECONDS / 8)
    one = _Probe(workload, 1)
    once = one.step() + one.write()
    depth = max(1, min(config.depth, int(MEASURE_SECONDS / 4 / once)))  # one warm-up round and three timed ones
    probe = one if depth == 1 else _Probe(workload, depth)
    rounds: list[tuple[float, float]] = []
    began = time.perf_counter()
    while not rounds or (time.perf_counter() - began < 0.75 * MEASURE_SECONDS and len(rounds) < 50):
        rounds.append((probe.step(), probe.write()))
    step, write = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    loading = probe.build_seconds * config.depth / depth
    step *= probe.scale(step_flops)
    write *= probe.scale(lambda config, window: write_flops(config, window, config.chunk_frames))
    del one, probe
    gc.collect()
    PeakMemory(workload.device)  # returns freed memory to the system
    return _Times(step, write, sampler, decode, loading, depth)


class _Probe:
    """A model of the preset's width and window with ``depth`` blocks, and a cache."""

    def __init__(self, workload: Workload, depth: int) -> None:
        self.full = workload.preset.config.model
        self.config = replace(self.full, depth=depth)
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            self._model = build_model(self.config, workload.backend, device=workload.device, dtype=workload.dtype)
            self.build_seconds = time.perf_counter() - began
            randomize(self._model)
        self._context = _full_context(self._model, workload.context_frames)
        self._write_plan = self._context.cache.plan(self.config.chunk_frames, clean=True)
        self._noisy = torch.randn(_shape(self.config), device=workload.device)
        self._timestep = torch.full((1,), 500, device=workload.device)
        self.step()  # warm-up
        self.write()

    def step(self) -> float:
        """Seconds of a denoising step."""
        return timed(lambda: self._context.predict(self._noisy, self._timestep), self._noisy.device)[1]

    def write(self) -> float:
        """Seconds of a cache write; repeated calls write the same chunk."""
        cache, clean = self._context.cache, self._timestep * 0
        _, seconds = timed(lambda: self._model(self._noisy, clean, self._write_plan, cache), self._noisy.device)
        cache.frames -= self.config.chunk_frames
        return seconds

    def scale(self, flops: Callable[[ModelConfig, int], int]) -> float:
        """Ratio of the full depth's operations to those of the measured model."""
        window = self._context.window.context_frames
        return flops(self.full, window) / flops(self.config, window)


def _sampler(workload: Workload) -> Sampler:
    config = workload.preset.config
    return sampler_for(NoiseProcess(config.diffusion), config.sampling, name=workload.sampler, steps=workload.steps)


def _sampler_seconds(workload: Workload) -> float:
    """Seconds per step of the sampler's arithmetic and noise."""
    config, sampler = workload.preset.config, _sampler(workload)
    x = torch.randn(_shape(config.model), device=workload.device)
    output = torch.randn(1, config.model.out_channels, *x.shape[2:], device=workload.device)

    def draw(index: int) -> Tensor:
        return torch.randn(x.shape).to(workload.device)

    def first_step() -> None:
        sampler.step(0, sampler.scale_input(0, sampler.start(x)), output, draw)

    return _seconds(first_step, workload.device, 0.02)


def _seconds(call: Callable[[], object], device: torch.device, at_most: float) -> float:
    """Median of a few calls, after a warm-up call."""
    call()
    times: list[float] = []
    while not times or (sum(times) < at_most and len(times) < 20):
        times.append(timed(call, device)[1])
    return statistics.median(times)
