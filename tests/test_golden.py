"""Every recorded run of the published code (see golden/README.md), on every built-in backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ca2vdm_cli.bench.reference import RecordedRun
from ca2vdm_cli.generate.context import CachedContext
from ca2vdm_cli.generate.loop import SeededNoise, generate
from ca2vdm_cli.generate.samplers import DdimSampler
from ca2vdm_cli.model.kv_cache import KVCache
from ca2vdm_cli.plugins import backends

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden"
WINDOWS = {"window_cached", "window_recompute"}
VIDEOS = {"video_cached", "video_recompute"}

FLOAT32 = 2e-5
"""Largest difference in float32; 5e-6 was measured. A wrong frame, position or mask causes 1e-2 or more."""
BFLOAT16 = 0.02
"""Largest difference in bfloat16, as a share of the largest recorded value; 0.01 was measured, and one rounding of
bfloat16 is 0.004. Only single forwards are compared: in a whole video, rounding errors are fed back over 60 steps, and
the result says more about the weights than about the code."""

every_file = pytest.mark.parametrize("name", ["cyclic_prev2", "mask_channel", "text_guided"])


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs PyTorch's compiler, whose import gives deprecation warnings."""
    reason = backends["compile"].unavailable(CPU, torch.float32)
    test = pytest.mark.skipif(reason is not None, reason=f"compile: {reason}")(test)
    return pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")(test)


def differences(name: str, backend: str, only: set[str], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Largest absolute difference from each recorded tensor; for bfloat16, as a share of its largest value."""
    run = RecordedRun(GOLDEN / f"{name}.safetensors")
    for tensor in (WINDOWS | VIDEOS) - only:
        del run.tensors[f"expected.{tensor}"]  # tensors that are not recorded are not checked
    largest = {each.name: each.difference for each in run.compare(run.model(backends[backend], CPU, dtype))}
    assert largest.keys() == only
    if dtype is torch.bfloat16:
        return {key: value / float(run.tensors[f"expected.{key}"].abs().max()) for key, value in largest.items()}
    return largest


def test_every_file_is_tested() -> None:
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(every_file.args[1])
    assert list(backends)[:3] == ["eager", "sdpa", "compile"]


@every_file
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_float32(name: str, backend: str) -> None:
    largest = differences(name, backend, WINDOWS | VIDEOS)
    assert max(largest.values()) < FLOAT32, largest


@every_file
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_bfloat16(name: str, backend: str) -> None:
    largest = differences(name, backend, WINDOWS, torch.bfloat16)
    assert max(largest.values()) < BFLOAT16, largest


# PyTorch's compiler has two halves. The first traces the blocks, guards the trace and handles in-place changes; the
# second generates machine code, which takes seconds per graph. Only the first depends on our code.
@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with the first half only."""
    compile_fully = nn.Module.compile

    def trace(block: nn.Module, **settings: Any) -> None:
        compile_fully(block, **settings, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", trace)
    torch.compiler.reset()


@compiles
def test_compiled_float32() -> None:
    largest = differences("cyclic_prev2", "compile", {"window_cached", "video_cached"})
    assert max(largest.values()) < FLOAT32, largest


@compiles
@every_file
@pytest.mark.usefixtures("traced")
def test_traced_float32(name: str) -> None:
    largest = differences(name, "compile", WINDOWS)
    assert max(largest.values()) < FLOAT32, largest


@compiles
@pytest.mark.usefixtures("traced")
def test_traced_bfloat16() -> None:
    largest = differences("cyclic_prev2", "compile", WINDOWS, torch.bfloat16)
    assert max(largest.values()) < BFLOAT16, largest


@compiles
@pytest.mark.usefixtures("traced")
def test_nothing_is_compiled_after_the_first_chunk() -> None:
    """Neither when the window slides and the ring wraps, nor for another video, even one that starts from an empty
    context."""
    run = RecordedRun(GOLDEN / "cyclic_prev2.safetensors")
    model, config = run.model(backends["compile"], CPU, torch.float32), run.config

    class Watched(CachedContext):
        def append(self, latents: Tensor) -> None:
            super().append(latents)
            if latents.shape[2] == config.chunk_frames:
                torch.compiler.set_stance("fail_on_recompile")

    def video(given: Tensor | None, videos: int = 2) -> None:
        context = Watched(model, KVCache(config, videos))
        noise = SeededNoise(0, range(videos), config.chunk_shape, CPU)
        for _ in generate(context, run.process, DdimSampler(run.process, 2), noise, 8, given=given):
            pass
        assert context.frames > 2 * context.window.slots

    try:
        video(torch.randn(2, config.in_channels, 1, config.latent_height, config.latent_width))
        video(None)
        with pytest.raises(RuntimeError, match="recompile"):  # the check works
            video(None, videos=3)
    finally:
        torch.compiler.set_stance("default")
