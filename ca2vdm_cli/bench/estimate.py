"""What a run will take, before it is run: cache, memory, operations and time.

Bytes and operations are computed: the cache and the operations by formula, the memory of a forward by going through it
with tensors that have shapes and no numbers. Time is measured for about two seconds, on a model of the same width and
window that has as few blocks as that takes, and carried on to the full depth by the operations that it has to do.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ca2vdm_cli import STARTED
from ca2vdm_cli.autoencoder import Autoencoder, autoencoders, load_autoencoder
from ca2vdm_cli.config import ModelConfig, TemporalPositions
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import CachedContext, make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import stored_caption
from ca2vdm_cli.generate.samplers import Sampler, sampler_for
from ca2vdm_cli.loading import build_model, randomize
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.presets import LoadedPreset
from ca2vdm_cli.runtime import PeakMemory, available_memory, dtype_name, resident_memory, synchronize

from .costs import cache_bytes, largest_window, step_flops, write_flops

MEASURE_SECONDS = 2.0
"""How long the machine is measured, about."""
HEAP = 1.5
"""What a forward takes on a CPU, as a multiple of the tensors that are alive at a time: the system's allocator keeps
pieces of freed memory. Measured from 1.1 to 2.3."""


@dataclass(frozen=True)
class Request:
    """The run in question: one video, made with the cache."""

    preset: LoadedPreset
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    frames: int
    steps: int
    sampler: str
    context_frames: int | None = None
    """Window; the preset's by default."""
    cache_budget: int | None = None
    """Bytes that the cache may take; by default all that is available beside the rest."""
    weights_file_bytes: int = 0
    """Size of the weights' file, which is in memory beside the model while that is loaded."""


def estimate(request: Request) -> dict[str, Any]:
    """Predict; returns the report of ``plan --json``.

    Raises:
        UsageError: a window, length, sampler or number of steps that the model can't have.
    """
    model_config = request.preset.config.model
    startup_seconds = time.perf_counter() - STARTED
    clock = TemporalWindow(model_config, request.context_frames)
    window, length = clock.context_frames, model_config.chunk_frames
    first = 0 if request.preset.config.diffusion.unconditional_start else 1  # a frame that must be given
    chunks = max(1, math.ceil((request.frames - first) / length))
    clock.check_length(first + chunks * length)
    steps = len(_sampler(request).timesteps)  # some schedulers make more
    size = request.dtype.itemsize
    slid = first + (chunks - 1) * length > window
    cache = cache_bytes(model_config, window, size, slid=slid)
    autoencoder = _load_autoencoder(request)
    times = _measure(request, autoencoder)
    base = 0 if request.device.type == "cuda" else resident_memory()  # before the simulation, which loads more of torch
    memory = _simulate(request, autoencoder)

    per_chunk = steps * (times.step + times.sampler) + times.write + times.decode
    model_peak = memory.weights + cache + max(memory.step, memory.write)
    running = memory.weights + memory.autoencoder + cache + max(memory.step, memory.write, memory.decode)
    peak = base + max(running, memory.loading + request.weights_file_bytes)
    step, write = step_flops(model_config, window), write_flops(model_config, window, length)
    denoise_seconds = chunks * steps * (times.step + times.sampler)
    writes = chunks - 1 + first
    write_seconds = writes * times.write
    seconds = denoise_seconds + write_seconds + chunks * times.decode
    available = available_memory(request.device)
    budget = request.cache_budget
    if budget is None and available is not None:
        budget = max(0, available - (running - cache))
    return {
        "preset": request.preset.name,
        "backend": request.backend.name,
        "device": str(request.device),
        "dtype": dtype_name(request.dtype),
        "frames": request.frames,
        "chunks": chunks,
        "steps": steps,
        "sampler": request.sampler,
        "context_frames": window,
        "cache_bytes": cache,
        "weights_bytes": memory.weights + memory.autoencoder,
        "step_rise_bytes": memory.step,
        "write_rise_bytes": memory.write,
        "decode_rise_bytes": memory.decode,
        "model_peak_memory_bytes": model_peak,
        "process_bytes": base,
        "peak_memory_bytes": peak,
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
        "frames_per_second": request.frames / seconds,
        "measured_depth": times.depth,
        "available_memory_bytes": available,
        "fits": available is None or running <= available,
        "cache_budget_bytes": budget,
        **_windows(request, budget),
        "left_out": _left_out(request),
    }


def _left_out(request: Request) -> list[str]:
    """What the run takes beside what is predicted."""
    config, found = request.preset.config, []
    if config.video is not None and not autoencoders[config.autoencoder.kind].trained_here:
        found.append("the autoencoder of diffusers")
    if config.text is not None:
        found += ["the text encoder", "a prompt's guidance (twice the cache and the operations of a step)"]
    return found


def _windows(request: Request, budget: int | None) -> dict[str, int | None]:
    """The longest window that the budget has room for, and the longest that the model's positions express."""
    config = request.preset.config.model
    fits = None if budget is None else largest_window(config, budget, request.dtype.itemsize)
    longest = None
    if config.temporal_positions is not TemporalPositions.ROPE:
        longest = config.table_length - config.chunk_frames
    both = [frames for frames in (fits, longest) if frames is not None]
    if both and not _is_a_window(config, min(both)):
        both = [0]
    return {
        "largest_window_in_budget": fits,
        "largest_window_of_positions": longest,
        "largest_window": min(both) if both else None,
    }


def _is_a_window(config: ModelConfig, frames: int) -> bool:
    try:
        TemporalWindow(config, frames)
    except UsageError:
        return False
    return True


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Memory:
    """Bytes. ``step``, ``write`` and ``decode``: what a forward takes at the highest, beside what was there before."""

    weights: int
    autoencoder: int
    step: int
    write: int
    decode: int
    loading: int


class _Live(TorchDispatchMode):
    """Bytes of tensors that are alive, of those that came to be within."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


@torch.inference_mode()
def _simulate(request: Request, autoencoder: Autoencoder | None) -> _Memory:
    """Go through a step, a cache write and a decoding with tensors that have no numbers."""
    config = request.preset.config.model
    with FakeTensorMode(allow_non_fake_inputs=True), torch.compiler.set_stance("force_eager"), request.device:
        with _default_dtype(request.dtype):
            model = CausalVideoTransformer(config, request.backend).eval()
        context = _full_context(model, request.context_frames)
        noisy, timestep = torch.empty(_shape(config)), torch.zeros(1)
        known = [*model.state_dict().values(), *_buffers(context), noisy]
        with _Live(known) as step:
            context.predict(noisy, timestep)
        with _Live(known) as write:
            context.append(noisy)
        decode_peak = 0
        if autoencoder is not None:
            frames = torch.empty(_frames_shape(config))
            with _Live([*autoencoder.state_dict().values(), frames]) as decode:
                autoencoder.decode(frames)
            decode_peak = decode.peak
    heap = HEAP if request.device.type == "cpu" else 1.0
    return _Memory(
        weights=_bytes(model, request.dtype.itemsize),
        autoencoder=0 if autoencoder is None else _bytes(autoencoder),
        step=int(heap * step.peak),
        write=int(heap * write.peak),
        decode=int(heap * decode_peak),
        loading=_bytes(model, torch.float32.itemsize),
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _bytes(module: torch.nn.Module, itemsize: int | None = None) -> int:
    """Bytes of a module's numbers, as they are or in a format of ``itemsize`` bytes."""
    return sum(tensor.numel() * (itemsize or tensor.itemsize) for tensor in module.state_dict().values())


def _buffers(context: CachedContext) -> list[Tensor]:
    return [tensor for layer in context.cache.layers for tensor in layer if tensor is not None]


def _shape(config: ModelConfig) -> tuple[int, ...]:
    return (1, *config.chunk_shape)


def _frames_shape(config: ModelConfig) -> tuple[int, ...]:
    """The same as frames of the autoencoder."""
    return (config.chunk_frames, config.in_channels, config.latent_height, config.latent_width)


def _load_autoencoder(request: Request) -> Autoencoder | None:
    """The preset's own small autoencoder with random weights; None where there is none, or a large one."""
    config = request.preset.config
    if config.video is None or not autoencoders[config.autoencoder.kind].trained_here:
        return None
    return load_autoencoder(config.autoencoder, config.video, config.model.in_channels).to(request.device)


def _full_context(model: CausalVideoTransformer, window: int | None) -> CachedContext:
    """A cache that a chunk was written to, ready for a denoising step. A step costs the same however full it is."""
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
    """Seconds, carried on to the full depth."""

    step: float
    write: float
    sampler: float
    decode: float
    loading: float
    depth: int
    """That was measured."""


@torch.inference_mode()
def _measure(request: Request, autoencoder: Autoencoder | None) -> _Times:
    """Measure one block, then as many as the time allows, up to the full depth."""
    config = request.preset.config.model
    sampler = _sampler_seconds(request)
    decode = 0.0
    if autoencoder is not None:
        frames = torch.randn(_frames_shape(config), device=request.device)
        decode = _seconds(lambda: autoencoder.decode(frames), request.device, MEASURE_SECONDS / 8)
    one = _Probe(request, 1)
    once = one.step() + one.write()
    depth = max(1, min(config.depth, int(MEASURE_SECONDS / 4 / once)))  # one round to warm up, and three that count
    probe = one if depth == 1 else _Probe(request, depth)
    rounds: list[tuple[float, float]] = []
    began = time.perf_counter()
    while not rounds or (time.perf_counter() - began < 0.75 * MEASURE_SECONDS and len(rounds) < 50):
        rounds.append((probe.step(), probe.write()))
    step, write = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    making = probe.making_seconds * config.depth / depth
    step, write = step * probe.share(step_flops), write * probe.share(_chunk_write_flops)
    del one, probe
    gc.collect()
    PeakMemory(request.device)  # gives freed memory back
    return _Times(step, write, sampler, decode, making, depth)


def _chunk_write_flops(config: ModelConfig, context_frames: int) -> int:
    return write_flops(config, context_frames, config.chunk_frames)


class _Probe:
    """A model of the preset's width and window, ``depth`` blocks deep, with a cache."""

    def __init__(self, request: Request, depth: int) -> None:
        self.full = request.preset.config.model
        self.config = replace(self.full, depth=depth)
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            self._model = build_model(self.config, request.backend, device=request.device, dtype=request.dtype)
            self.making_seconds = time.perf_counter() - began
            randomize(self._model)
        self._context = _full_context(self._model, request.context_frames)
        self._plan = self._context.cache.plan(self.config.chunk_frames, clean=True)
        self._noisy = torch.randn(_shape(self.config), device=request.device)
        self._timestep = torch.full((1,), 500, device=request.device)
        self.step()  # warm-up
        self.write()

    def step(self) -> float:
        """Seconds of a denoising step."""
        return self._timed(lambda: self._context.predict(self._noisy, self._timestep))

    def write(self) -> float:
        """Seconds of a cache write, of the same chunk again and again."""
        cache = self._context.cache
        seconds = self._timed(lambda: self._model(self._noisy, self._timestep * 0, self._plan, cache))
        cache.frames -= self.config.chunk_frames
        return seconds

    def share(self, flops: Callable[[ModelConfig, int], int]) -> float:
        """How many times as much the full depth has to do."""
        window = self._context.window.context_frames
        return flops(self.full, window) / flops(self.config, window)

    def _timed(self, call: Callable[[], object]) -> float:
        synchronize(self._model.device)
        began = time.perf_counter()
        call()
        synchronize(self._model.device)
        return time.perf_counter() - began


def _sampler(request: Request) -> Sampler:
    config = request.preset.config
    return sampler_for(NoiseProcess(config.diffusion), config.sampling, name=request.sampler, steps=request.steps)


def _sampler_seconds(request: Request) -> float:
    """The sampler's own arithmetic and noise, a step."""
    config, sampler = request.preset.config, _sampler(request)
    x = torch.randn(_shape(config.model), device=request.device)
    output = torch.randn(1, config.model.out_channels, *x.shape[2:], device=request.device)

    def draw(index: int) -> Tensor:
        return torch.randn(x.shape).to(request.device)

    def first_step() -> None:
        sampler.step(0, sampler.scale_input(0, sampler.start(x)), output, draw)

    return _seconds(first_step, request.device, 0.02)


def _seconds(call: Callable[[], object], device: torch.device, at_most: float) -> float:
    """Median of a few calls, after one that does not count."""
    call()
    found: list[float] = []
    while not found or (sum(found) < at_most and len(found) < 20):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)
