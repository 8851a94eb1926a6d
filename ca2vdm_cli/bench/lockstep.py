"""Methods in lockstep: the same weights, backend, dtype and inputs, one denoising step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ca2vdm_cli.config import Prediction, Preset
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.generate.checks import check_finite
from ca2vdm_cli.generate.context import Context, RecomputedContext, make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import SeededNoise, generate, stored_caption
from ca2vdm_cli.generate.samplers import sampler_for
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.kv_cache import TextKeysValues
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.runtime import PeakMemory, synchronize

from .baselines import PerStepCachedContext

T = TypeVar("T")

PRODUCT = (2048, 384, 1536)
"""The matrix product that gives the machine's rate: rows, inner size, columns."""
GPU_ROWS = 2**17
"""Rows of that product on a GPU, where launching a smaller one would take longer than computing it."""


@dataclass(frozen=True)
class ChunkTimes:
    """What one chunk cost with one method."""

    write_seconds: float
    """Time spent writing the preceding frames to the context: the cache write."""
    step_seconds: tuple[float, ...]
    """Time of each denoising forward of the network, without the sampler's arithmetic, which all methods share."""
    seen_frames: int
    """Number of finished frames that the chunk saw."""
    kept_bytes: int
    """Bytes held between chunks, measured after the chunk."""
    rise_bytes: int
    """Highest rise in memory during a denoising step of these shapes; 0 if not observed."""
    step_flops: int
    """Floating-point operations of a denoising step, as PyTorch counts them; 0 if not observed."""

    @property
    def seconds(self) -> float:
        """Cache write and denoising steps."""
        return self.write_seconds + sum(self.step_seconds)


@dataclass(frozen=True)
class ChunkComparison:
    """One chunk with every method."""

    index: int
    first_frame: int
    times: dict[str, ChunkTimes]
    differences: dict[str, float]
    """Largest absolute difference of each exact method's outputs from the first method's, over all denoising steps."""
    scale: float
    """Largest absolute output of the first method."""
    before_slide: bool
    """Whether the window has not slid yet, so that all exact methods see the same frames."""
    decode_seconds: float | None
    """Latents to pixels, the same for all methods; None without an autoencoder."""
    encode_seconds: float | None
    """The same pixels back to latents."""

    @property
    def difference(self) -> float:
        """The largest of ``differences``; 0 if there are none."""
        return max(self.differences.values(), default=0.0)


class MatrixProduct:
    """The machine's rate in ``PRODUCT``, measured repeatedly, between the denoising steps."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        rows, inner, columns = PRODUCT
        rows = rows if device.type == "cpu" else GPU_ROWS
        self.shape = (rows, inner, columns)
        self.flops = 2 * rows * inner * columns
        self._x = torch.ones(rows, inner, dtype=dtype, device=device)
        self._weight = torch.ones(columns, inner, dtype=dtype, device=device)
        self._out = torch.empty(rows, columns, dtype=dtype, device=device)  # an allocation would disturb the heap
        self.seconds: list[float] = []
        """One value per product; the first product is warm-up and does not count."""
        self.measure()
        self.seconds.clear()

    def measure(self) -> None:
        """Compute and time the product once."""
        _, seconds = timed(lambda: torch.mm(self._x, self._weight.T, out=self._out), self._x.device)
        self.seconds.append(seconds)


@dataclass
class Observation:
    """Results of a context's untimed calls, which are repeated when its shapes change."""

    seen_frames: int = -1
    warm_up_seconds: float = 0.0
    """Time of all untimed calls together."""
    rise_bytes: int = 0
    step_flops: int = 0


class Lockstep(Context):
    """Several contexts that get the same frames and, in every denoising step, the same input.

    The first one's outputs are used to continue. If two independent runs were compared, a rounding error in the first
    step would grow in all later ones, without bound if weights are random; here every step is compared on its own.

    Each call is timed on its own, in alternating order, so that noise on the machine affects all methods alike. When a
    context's length changes, its shapes are new, and it gets one untimed warm-up call. A cache has the same shapes in
    every chunk, so it is warmed up only once.

    Args:
        contexts: one per method, by name.
        product: measured in every step as well.
        observe: measure memory and count operations whenever shapes are new.
    """

    def __init__(
        self, contexts: dict[str, Context], product: MatrixProduct | None = None, *, observe: bool = False
    ) -> None:
        self.contexts, self.product, self.observe = contexts, product, observe
        self.first_method, self.first = next(iter(contexts.items()))
        self.model, self.window = self.first.model, self.first.window
        self.write_seconds = dict.fromkeys(contexts, 0.0)
        """Time taken by the last ``append``."""
        self.step_seconds: dict[str, list[float]] = {}
        """Times of this chunk's steps."""
        self.differences: dict[str, float] = {}
        """Largest difference from the first method's outputs in this chunk, by exact method."""
        self.scale = 0.0
        """Largest output in this chunk."""
        self.observations = {method: Observation() for method in contexts}
        self._appends = self._chunks = 0
        if observe:
            with count_flops():  # memory that the counter itself loads must not count as a method's
                torch.zeros(1)

    def set_text(self, text: list[TextKeysValues]) -> None:
        for context in self.contexts.values():
            context.set_text(text)

    @property
    def frames(self) -> int:
        return self.first.frames

    @property
    def nbytes(self) -> int:
        return self.first.nbytes

    def append(self, latents: Tensor) -> None:
        self._appends += 1
        answers = self._timed(lambda context: context.append(latents), self._appends)
        self.write_seconds = {method: seconds for method, (_, seconds) in answers.items()}

    def open_chunk(self) -> None:
        for context in self.contexts.values():
            context.open_chunk()
        self.step_seconds = {method: [] for method in self.contexts}
        self.differences, self.scale = {}, 0.0
        self._chunks += 1

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        for method, context in self.contexts.items():
            observation, seen = self.observations[method], len(context.window.context(context.frames))
            if observation.seen_frames < 0 or (seen != observation.seen_frames and not context.caches):
                self._warm_up(context, observation, x, timestep)
            observation.seen_frames = seen
        turn = self._chunks + len(self.step_seconds[self.first_method])
        answers = self._timed(lambda context: context.predict(x, timestep), turn)
        if self.product is not None:
            self.product.measure()
        first, _ = answers[self.first_method]
        self.scale = max(self.scale, first.abs().max().item())
        for method, context in self.contexts.items():
            output, seconds = answers[method]
            if output.shape != first.shape:
                raise UserError(
                    f"context {method!r}: its output has shape {tuple(output.shape)}; it must be {tuple(first.shape)}"
                )
            check_finite(output, self.frames, self.model.dtype)
            self.step_seconds[method].append(seconds)
            if method != self.first_method and context.exact and self.first.exact:
                difference = (output - first).abs().max().item()
                self.differences[method] = max(self.differences.get(method, 0.0), difference)
        return first

    def _warm_up(self, context: Context, observation: Observation, x: Tensor, timestep: Tensor) -> None:
        began = time.perf_counter()
        if observation.seen_frames < 0 or not self.observe:  # the first call's one-time costs are not a step's
            context.predict(x, timestep)
        if self.observe:
            observation.rise_bytes, observation.step_flops = observe(self.model, lambda: context.predict(x, timestep))
        observation.warm_up_seconds += time.perf_counter() - began

    def _timed(self, call: Callable[[Context], Any], turn: int) -> dict[str, tuple[Any, float]]:
        """Every context's result and the seconds it took; on every other turn the order is reversed."""
        answers = {}
        for method, context in list(self.contexts.items())[:: 1 if turn % 2 else -1]:
            answers[method] = timed(partial(call, context), self.model.device)
        return answers


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """A call's result, and the seconds it took."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - began


def observe(model: CausalVideoTransformer, call: Callable[[], object]) -> tuple[int, int]:
    """The highest rise in memory (bytes) during a call, and its counted operations. May call twice."""
    memory = PeakMemory(model.device)
    if type(model.backend).prepare is Backend.prepare:
        with count_flops() as counter:
            call()
        return memory.growth(), counter.get_total_flops()
    call()
    return memory.growth(), count_uncompiled(call)


def count_uncompiled(call: Callable[[], object]) -> int:
    """Counted operations of a call, without compilation: operations in compiled code can't be counted."""
    with torch.compiler.set_stance("force_eager"), count_flops() as counter:
        call()
    return counter.get_total_flops()


def count_flops() -> FlopCounterMode:
    """PyTorch's counter, extended to the CPU's fused attention."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def flops(q: Any, k: Any, v: Any, *arguments: Any, **named: Any) -> int:
        return sdpa_flop_count(q, k, v)

    return FlopCounterMode(display=False, custom_mapping={attention: flops})


class SideBySide:
    """One video, generated by several methods in lockstep. Iterate over it to generate the chunks.

    The video begins from an empty context, or from one random latent frame if the model needs a first frame.

    Args:
        pipeline: model and settings; its autoencoder, if any, is timed on every chunk.
        chunks: number of chunks.
        methods: names of contexts; the others are compared with the first.
        steps, sampler, seed, context_frames: as in ``Pipeline.sample``.
        fixed_frames: window of ``fixed-window``.
        given_frames: begin from this many random latent frames instead.
        product: measured between the steps.
        observe: measure memory and count operations too.

    Raises:
        UsageError: fewer than one chunk, or more than absolute positions allow.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        chunks: int,
        methods: Sequence[str] = ("cached", "recompute"),
        *,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        context_frames: int | None = None,
        fixed_frames: int | None = None,
        given_frames: int | None = None,
        product: MatrixProduct | None = None,
        observe: bool = False,
    ) -> None:
        config, model = pipeline.config, pipeline.model
        if chunks < 1:
            raise UsageError("frames: the video must have at least one whole chunk")
        self.pipeline, self.model = pipeline, model
        start = first_frame(config) if given_frames is None else given_frames
        shape = config.model.chunk_shape
        given = None
        if start:
            generator = torch.Generator().manual_seed(seed)
            given = torch.randn(1, shape[0], start, *shape[2:], generator=generator).to(model.device)
        process = pipeline.process
        if not pipeline.trained and not config.diffusion.flow:
            # outputs of random weights are not noise; interpreted as v, they keep the latents of order 1
            process = NoiseProcess(replace(config.diffusion, prediction=Prediction.V))
        solver = sampler_for(process, config.sampling, name=sampler, steps=steps)
        options: dict[str, Any] = {"context_frames": context_frames, "fixed_frames": fixed_frames}
        options["timesteps"] = solver.timesteps
        contexts = {method: make_context(model, method, 1, **options) for method in methods}
        self.lockstep = Lockstep(contexts, product, observe=observe)
        self.window = self.lockstep.window
        self.window.check_length(start + chunks * config.model.chunk_frames)
        self._last = torch.zeros(1, *shape, device=model.device)
        self.timesteps = list(solver.timesteps)
        noise = SeededNoise(seed, [0], shape, model.device)
        caption = stored_caption(model, 1)
        self._chunks = generate(self.lockstep, process, solver, noise, chunks, given=given, caption=caption)

    def __iter__(self) -> Iterator[ChunkComparison]:
        lockstep = self.lockstep
        for chunk in self._chunks:
            self._last = chunk.latents
            times = {}
            for method, context in lockstep.contexts.items():
                observation = lockstep.observations[method]
                times[method] = ChunkTimes(
                    lockstep.write_seconds[method],
                    tuple(lockstep.step_seconds[method]),
                    observation.seen_frames,
                    context.nbytes,
                    observation.rise_bytes,
                    observation.step_flops,
                )
            decode_seconds, encode_seconds = self._autoencoder_seconds(chunk.latents)
            yield ChunkComparison(
                chunk.index,
                chunk.first_frame,
                times,
                lockstep.differences,
                lockstep.scale,
                before_slide=chunk.first_frame <= self.window.context_frames,
                decode_seconds=decode_seconds,
                encode_seconds=encode_seconds,
            )

    def _autoencoder_seconds(self, latents: Tensor) -> tuple[float | None, float | None]:
        """Seconds to decode a chunk, and to encode it again."""
        if self.pipeline.autoencoder is None or not self.lockstep.observe:
            return None, None
        pixels, decode_seconds = timed(lambda: self.pipeline.decode(latents), self.model.device)
        _, encode_seconds = timed(lambda: self.pipeline.encode(pixels), self.model.device)
        return decode_seconds, encode_seconds

    @torch.inference_mode()
    def rise(self, method: str) -> int | None:
        """The highest rise in memory (bytes) while the last chunk is written to the context and a step is denoised.

        For a context that runs the network when it is written, write and step are repeated, and it then has one more
        chunk; the steps of other contexts were observed already. None if absolute positions leave no room for another
        chunk.
        """
        context = self.lockstep.contexts[method]
        if not _writes(context):
            return self.lockstep.observations[method].rise_bytes
        memory = PeakMemory(self.model.device)
        try:
            context.append(self._last)
            context.open_chunk()
        except UsageError:
            return None
        context.predict(self._last, torch.full((1,), self.timesteps[-1], device=self.model.device))
        return memory.growth()

    @torch.inference_mode()
    def write_flops(self, method: str) -> int | None:
        """Counted operations of writing the last chunk to the context once more, which adds a chunk; None as in
        ``rise``."""
        context = self.lockstep.contexts[method]
        if not _writes(context):
            return 0
        try:
            return count_uncompiled(lambda: context.append(self._last))
        except UsageError:
            return None


def _writes(context: Context) -> bool:
    """Whether adding frames may run the network; not if frames are recomputed, or cached during denoising."""
    return not isinstance(context, RecomputedContext | PerStepCachedContext)


def first_frame(config: Preset) -> int:
    """The first frame that is generated: 1 if the model was not trained to begin from an empty context, else 0."""
    return 0 if config.diffusion.unconditional_start else 1
