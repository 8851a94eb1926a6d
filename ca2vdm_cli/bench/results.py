"""The benchmark's report as dataclasses; ``as_json`` gives the object that ``bench --json`` prints.

Times are in seconds, sizes in bytes. Unless a list says otherwise, a value is the median over all repeats. None means
that a value was not measured, or that no formula is known for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .scaling import Curve


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine, the versions, and the model that is benchmarked."""

    version: str
    torch: str
    numpy: str
    python: str
    platform: str
    processor: str
    cores: int | None
    threads: int
    available_memory_bytes: int | None
    date: str
    preset: str
    preset_sha256: str
    trained: bool
    device: str
    dtype: str
    chunk_frames: int
    tokens_per_frame: int
    weights_bytes: int


@dataclass(frozen=True)
class Spread:
    """Extremes and quartiles."""

    min: float
    quarter: float
    three_quarters: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """Raw times of one repeat, a value or a list per chunk."""

    seconds_per_step: list[list[float]]
    write_seconds_per_chunk: list[float]
    decode_seconds_per_chunk: list[float | None]
    encode_seconds_per_chunk: list[float | None]


@dataclass(frozen=True, kw_only=True)
class SteadyState:
    """Times of the chunks that see a full window, except warm-up chunks; None if there are none."""

    steady_chunks: int
    steady_seconds_per_chunk: float | None
    """Denoising steps and cache write."""
    steady_seconds_per_chunk_spread: Spread | None
    steady_seconds_per_step: float | None
    steady_seconds_per_step_spread: Spread | None
    steady_denoise_seconds: float | None
    """All denoising steps of a chunk."""
    cache_write_seconds: float | None
    cache_write_seconds_spread: Spread | None
    decode_seconds: float | None
    encode_seconds: float | None
    steady_total_seconds: float | None
    """A chunk, including decoding."""
    steady_frames_per_second: float | None
    mfu: float | None
    """A denoising step's share of the machine's rate in matrix products."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory at the end of the video."""

    cache_bytes: int
    """0 for methods without a cache."""
    cache_bytes_by_formula: int | None
    context_bytes: int
    """Everything held between chunks: a cache, or latents."""
    peak_memory_bytes: int | None
    """Weights, context, and the highest rise in a denoising step or a cache write."""
    peak_memory_above_weights_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Floating-point operations at the end of the video, as PyTorch counts them."""

    flops_per_step: int
    flops_per_step_by_formula: int | None
    cache_write_flops: int | None
    cache_write_flops_by_formula: int | None
    flops_per_chunk: int
    flops_error: float | None
    """Largest relative error of the formula, over all chunks."""


@dataclass(frozen=True, kw_only=True)
class MethodResult(Repeat, SteadyState, Memory, Operations):
    """What one method cost. Raw values per chunk are those of the first repeat."""

    seconds: float
    """The whole video, without decoding."""
    seconds_per_chunk: list[float]
    seen_frames_per_chunk: list[int]
    kept_bytes_per_chunk: list[int]
    step_rise_bytes_per_chunk: list[int]
    step_flops_per_chunk: list[int]
    repeats: list[Repeat]
    warm_up_seconds: float
    """All untimed warm-up calls together."""
    first_chunk_seconds: float
    first_chunk_latency_seconds: float
    """With decoding."""


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """How far the exact methods' outputs are from those of ``cached``; None if only ``cached`` is exact."""

    outputs_agree: bool | None
    """Whether all differences before the window slides are rounding errors."""
    max_abs_difference_before_slide: float | None
    max_abs_output: float
    max_abs_difference_after_slide: float | None
    """For ``recompute``: its frames no longer see those before the window, as the cached frames did."""
    max_abs_difference_per_chunk: list[float] | None


@dataclass(frozen=True)
class Growth:
    """Costs against length, by method."""

    frames: dict[str, Curve]
    """A whole video of that length."""
    context_frames: dict[str, Curve]
    """A denoising step with that much context."""


@dataclass(frozen=True, kw_only=True)
class BackendRun(Exactness):
    """All methods on one backend. Speed-ups are ratios of a baseline's median to that of ``cached``."""

    backend: str
    frames: int
    first_frame: int
    context_frames: int
    fixed_window_frames: int
    steps: int
    timesteps: list[float]
    sampler: str
    seed: int
    repeat: int
    results: dict[str, MethodResult]
    speedup_per_step: dict[str, float | None]
    speedup_per_chunk: dict[str, float | None]
    speedup: float | None
    """Per chunk, over ``recompute``."""
    speedup_total: float | None
    """Whole video, over ``recompute``."""
    gemm_flops_per_second: float
    gemm_seconds: list[float]
    gemm_shape: list[int]
    flops_agree: bool
    cache_bytes_agree: bool
    growth: Growth


@dataclass(frozen=True)
class Report:
    """Everything that ``bench`` measured."""

    verdict: str
    environment: Environment
    runs: list[BackendRun]
    """One per backend."""

    def as_json(self) -> dict[str, Any]:
        """One flat object with the figures of the first backend."""
        first, *others = map(asdict, self.runs)
        return {"verdict": self.verdict, **asdict(self.environment), **first, "other_backends": others}
