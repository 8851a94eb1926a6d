"""The formulas against PyTorch's count of operations and the allocated bytes of the cache; fitted exponents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from ca2vdm_cli.bench.costs import (
    largest_window,
    per_step_cache_flops,
    recompute_flops,
    step_flops,
    write_flops,
)
from ca2vdm_cli.bench.lockstep import count_flops
from ca2vdm_cli.bench.scaling import Curve, fit_exponent
from ca2vdm_cli.config import ModelConfig, SpatialPrefix, TemporalPositions
from ca2vdm_cli.generate.context import make_context
from ca2vdm_cli.generate.loop import stored_caption
from ca2vdm_cli.memory import cache_bytes
from ca2vdm_cli.model.kv_cache import KVCache
from ca2vdm_cli.model.transformer import CausalVideoTransformer

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., CausalVideoTransformer]
WINDOW, CHUNK = 6, 2  # see conftest.py
VARIANTS = [
    {},
    {"spatial_prefix": "first_frame", "learn_variance": False},
    {"spatial_prefix": "none", "mlp_ratio": 2.5},
    {"temporal_positions": "rope", "mask_channel": True, "patch_size": 1, "in_channels": 3},
    {"text_channels": 12, "text_tokens": 5, "causality": "partial", "depth": 1},
]


def frames(count: int, model: CausalVideoTransformer) -> Tensor:
    return torch.zeros(1, model.config.in_channels, count, 4, 4)


@torch.inference_mode()
def counted(model: CausalVideoTransformer, method: str, seen: int) -> tuple[int, int]:
    """Operations of writing a chunk to the context after ``seen`` frames, and of a denoising step of that chunk."""
    context = make_context(model, method, 1, timesteps=[7])
    caption = stored_caption(model, 1)
    if caption is not None:
        context.set_text(model.text_keys_values(caption.embedding, caption.mask))
    if seen:
        context.append(frames(seen, model))
    context.open_chunk()
    with count_flops() as step:
        context.predict(frames(CHUNK, model), torch.tensor([7]))
    with count_flops() as write:
        context.append(frames(CHUNK, model))
    return write.get_total_flops(), step.get_total_flops()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seen", [0, 2, WINDOW])
def test_operations_equal_those_counted(
    make_model: MakeModel, backend: str, variant: dict[str, object], seen: int
) -> None:
    model = make_model(backend, **variant)
    config = model.config
    assert counted(model, "cached", seen) == (write_flops(config, WINDOW, CHUNK), step_flops(config, WINDOW))
    for method in ("recompute", "recompute-extendable", "bidirectional"):
        assert counted(model, method, seen) == (0, recompute_flops(config, seen))
    assert counted(model, "per-step-cache", seen) == (0, per_step_cache_flops(config, WINDOW))


@pytest.mark.parametrize("positions", TemporalPositions)
@pytest.mark.parametrize("prefix", SpatialPrefix)
@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_equal_those_allocated(
    make_model: MakeModel, positions: TemporalPositions, prefix: SpatialPrefix, text: int, dtype: torch.dtype
) -> None:
    model = make_model(temporal_positions=positions, spatial_prefix=prefix, text_channels=text, text_tokens=text)
    model = model.to(dtype)
    cache = KVCache(model.config, 1, context_frames=5, sink_frames=2, dtype=dtype)
    if (caption := stored_caption(model, 1)) is not None:
        cache.text = model.text_keys_values(caption.embedding, caption.mask)
    assert cache.nbytes == cache_bytes(model.config, 5, dtype.itemsize, sink_frames=2)
    if positions is TemporalPositions.ROPE:
        with torch.inference_mode():
            for _ in range(4):
                model.write(frames(2, model), cache)
        assert cache.nbytes == cache_bytes(model.config, 5, dtype.itemsize, sink_frames=2, slid=True)


def test_largest_window_is_the_last_that_fits(make_config: MakeConfig) -> None:
    config = make_config(text_channels=12, text_tokens=5)
    for window in (1, 6, 100):
        budget = cache_bytes(config, window, 2)
        assert largest_window(config, budget, 2) == window
        assert largest_window(config, budget - 1, 2) == window - 1
    assert largest_window(config, 10, 2) == 0


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 2.0])
def test_fitted_exponent(exponent: float) -> None:
    lengths = [2, 4, 6, 8, 10, 12]
    assert fit_exponent(lengths, [3 * n**exponent for n in lengths]) == pytest.approx(exponent, abs=1e-9)


def test_the_shorter_lengths_do_not_affect_an_exponent() -> None:
    lengths = [1, 2, 3, 4, 5, 6, 7, 8]
    assert fit_exponent(lengths, [50, 40, 60, 1, *(n**2 for n in lengths[4:])]) == pytest.approx(2, abs=1e-9)


def test_too_few_lengths_have_no_exponent() -> None:
    assert fit_exponent([1, 2], [1, 2]) is None
    assert asdict(Curve([1, 2, 4], [1.0, 2.0, 4.0], [0, 0, 0], [1, 4, 16])) == {
        "frames": [1, 2, 4],
        "seconds": [1.0, 2.0, 4.0],
        "flops": [0, 0, 0],
        "memory_bytes": [1, 4, 16],
        "seconds_exponent": pytest.approx(1),
        "flops_exponent": None,
        "memory_bytes_exponent": pytest.approx(2),
    }
