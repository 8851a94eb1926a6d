"""``plan``: estimates against measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ca2vdm_cli import memory
from ca2vdm_cli.__main__ import main
from ca2vdm_cli.bench import estimate
from ca2vdm_cli.model.frame_plan import rope_angles

RUN = ["--device", "cpu", "--dtype", "float32", "--backend", "sdpa"]
MEDIUM = ["--preset", "tiny", "--set", "model.hidden_size=128", "--set", "model.latent_height=32"]
MEDIUM += ["--set", "model.latent_width=32", "--set", "video.height=128", "--set", "video.width=128"]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``report("plan", ...)``: the object that ``--json`` prints."""

    def report(command: str, *arguments: str) -> Any:
        assert main([command, *RUN, *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return report


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MEASURE_SECONDS", 0.1)


@pytest.mark.parametrize("settings", [[], ["--set", "model.text_channels=7", "--set", "model.text_tokens=5"]])
def test_bytes_and_operations_equal_those_of_the_benchmark(report: Callable[..., Any], settings: list[str]) -> None:
    request = ["--preset", "tiny", "--frames", "20", "--steps", "2", *settings]
    estimated = report("plan", *request)
    result = report("bench", "--compare", "cached", *request)
    cached = result["results"]["cached"]
    assert estimated["cache_bytes"] == cached["cache_bytes"]
    assert estimated["weights_bytes"] == result["weights_bytes"]
    assert estimated["flops_per_step"] == cached["flops_per_step"]
    assert estimated["cache_write_flops"] == cached["cache_write_flops"]
    assert estimated["flops"] == 5 * 2 * estimated["flops_per_step"] + 4 * estimated["cache_write_flops"]


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is glibc's")
def test_memory_is_close_to_what_the_benchmark_measures(
    report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the model alone, with an allocator that returns freed memory at once; other allocators retain varying
    amounts."""
    request = ["--preset", "bench-small", "--set", "model.depth=4", "--set", "model.hidden_size=192"]
    request += ["--frames", "16", "--steps", "1"]
    monkeypatch.setattr(memory, "HEAP", 1.0)
    estimated = report("plan", *request)
    command = [sys.executable, "-m", "ca2vdm_cli", "bench", "--compare", "cached", *RUN, *request, "--json"]
    process = subprocess.run(
        command, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}, check=True, capture_output=True
    )
    cached = json.loads(process.stdout)["results"]["cached"]
    assert estimated["step_rise_bytes"] > 15e6
    assert estimated["model_peak_memory_bytes"] == pytest.approx(cached["peak_memory_bytes"], rel=0.1)


def test_simulation_counts_only_tensors_that_are_alive(report: Callable[..., Any]) -> None:
    """Twice as many blocks need no more memory at a time; twice as many frames per chunk need twice as much."""
    shallow = report("plan", *MEDIUM, "--set", "model.depth=2")["step_rise_bytes"]
    assert report("plan", *MEDIUM, "--set", "model.depth=4")["step_rise_bytes"] == pytest.approx(shallow, rel=0.01)
    long = report("plan", *MEDIUM, "--set", "model.chunk_frames=8")["step_rise_bytes"]
    assert long == pytest.approx(2 * shallow, rel=0.2)


def test_time_of_a_video_is_about_right(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of four, since the machine may be busy."""
    monkeypatch.setattr(estimate, "MEASURE_SECONDS", 0.3)
    request = [*MEDIUM, "--frames", "24", "--steps", "2"]
    estimated = report("plan", *request, "--set", "model.depth=6")
    assert estimated["measured_depth"] < 6
    measured = report("bench", "--compare", "cached", *request, "--set", "model.depth=6")["results"]["cached"]
    assert 1 / 4 < estimated["network_seconds"] / measured["seconds"] < 4


def test_longer_videos_take_longer_and_no_more_memory(report: Callable[..., Any]) -> None:
    short, long = (report("plan", "--preset", "tiny", "--frames", frames) for frames in ("40", "4000"))
    assert long["flops"] > 90 * short["flops"]
    assert long["network_seconds"] > 20 * short["network_seconds"]
    assert long["cache_bytes"] == short["cache_bytes"]
    assert long["peak_memory_bytes"] < 1.2 * short["peak_memory_bytes"]


@pytest.mark.parametrize("positions", ["rope", "cyclic"])
def test_largest_window_fits_the_budget(report: Callable[..., Any], positions: str) -> None:
    request = ["plan", "--preset", "tiny", "--frames", "8", "--set", f"model.temporal_positions={positions}"]
    estimated = report(*request, "--cache-budget", "1MiB")
    assert estimated["cache_budget_bytes"] == 2**20
    window = estimated["largest_window_in_budget"]
    assert estimated["largest_window_of_positions"] == (9 if positions == "cyclic" else None)
    assert estimated["largest_window"] == 9 < window, "the weights were trained for no longer one"
    rope = [*request[:-1], "model.temporal_positions=rope"]
    sizes = [report(*rope, "--context-frames", str(frames))["cache_bytes"] for frames in (window, window + 1)]
    assert sizes[0] <= 2**20 < sizes[1]


def test_windows_are_those_of_training(report: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    rope = ["--preset", "tiny", "--frames", "8", "--set", "model.temporal_positions=rope"]
    short = [*rope, "--set", "training.prefix_lengths=[0, 5]"]
    estimated = report("plan", *short)
    assert (estimated["largest_window_in_training"], estimated["largest_window"]) == (5, 5)
    assert main(["plan", *RUN, *short, "--context-frames", "9"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "9 frames are more than the weights were trained for; at most --context-frames 5: training has " in text


def test_parts_of_the_cache(report: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    request = ["--preset", "tiny", "--frames", "40", "--set", "model.temporal_positions=rope"]
    request += ["--set", "model.sink_frames=2", "--set", "model.text_channels=7", "--set", "model.text_tokens=5"]
    estimated = report("plan", *request)
    frame = 2 * 16 * 2 * 48 * 4  # blocks, tokens, keys and values, width, bytes
    assert estimated["cache_parts_bytes"] == {
        "context": 9 * frame,
        "chunk": 4 * frame,
        "prefix": 3 * frame,
        "caption": 2 * 5 * 2 * 48 * 4 + 5,
        "sinks": 2 * frame // 2,
    }
    assert sum(estimated["cache_parts_bytes"].values()) == estimated["cache_bytes"]
    assert main(["plan", *RUN, *request]) == 0
    text = " ".join(capsys.readouterr().out.split())
    parts = "context 108.0 KiB, slots of a chunk 48.0 KiB, spatial prefix 36.0 KiB, caption 3.8 KiB, sinks 12.0 KiB"
    assert f"cache {parts}" in text


def test_a_window_that_the_model_does_not_support_is_not_proposed(report: Callable[..., Any]) -> None:
    request = ["--preset", "tiny", "--frames", "8", "--set", "model.temporal_positions=rope"]
    one = report("plan", *request, "--context-frames", "4")["cache_bytes"] * 2 // 11
    estimated = report("plan", *request, "--cache-budget", f"{4 * one}B")
    assert estimated["largest_window_in_budget"] < 3  # the spatial prefix has three
    assert estimated["largest_window"] == 0


def test_a_video_that_begins_with_a_given_frame_has_fewer_chunks(report: Callable[..., Any]) -> None:
    begun = ["--set", "diffusion.unconditional_start=false", "--set", "model.temporal_positions=absolute"]
    estimated = report("plan", "--preset", "tiny", "--frames", "13", "--steps", "2", *begun)  # all of the positions
    assert (estimated["chunks"], estimated["steps"]) == (3, 2)
    assert report("plan", "--preset", "tiny", "--frames", "13", "--steps", "2")["chunks"] == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_steps_are_those_that_the_scheduler_takes(report: Callable[..., Any]) -> None:
    pytest.importorskip("diffusers")
    estimated = report(
        "plan", "--preset", "tiny", "--frames", "8", "--steps", "5", "--sampler", "HeunDiscreteScheduler"
    )
    assert estimated["steps"] == 9


def test_positions_are_computed_on_the_cpu() -> None:
    """Even if another device is the default and tensors are fake, as in the simulation."""
    with FakeTensorMode(), torch.device("cuda"):
        cosines, _ = rope_angles(torch.arange(3), 8)
    assert cosines.shape == (3, 8) and cosines.device.type == "cpu"


def test_budget_is_what_is_available(report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda device: 3_000_000)
    estimated = report("plan", "--preset", "tiny", "--frames", "8")
    assert estimated["fits"] is True
    rest = estimated["weights_bytes"] + max(estimated[f"{part}_rise_bytes"] for part in ("step", "write", "decode"))
    assert estimated["cache_budget_bytes"] == 3_000_000 - rest


def test_plan_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    request = ["plan", "--preset", "tiny", "--frames", "20", *RUN]
    assert main([*request, "--cache-budget", "1kiB"]) == 2
    assert "--cache-budget 1kiB: must be a size such as 1GiB" in capsys.readouterr().err
    assert main([*request, "--cache-budget", "1KiB"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("20 frames in about ")
    for words in (
        "per cache write",
        "weights",
        "FLOP per step",
        "a cache of 1.0 KiB holds 0 frames",
        "too little for any window",
    ):
        assert words in text
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1000)
    assert main(request) == 0
    assert "more than is available" in capsys.readouterr().out


def test_large_autoencoder_and_text_encoder_are_left_out(report: Callable[..., Any]) -> None:
    """Those of diffusers and transformers would have to be downloaded first."""
    small = ["--set", "model.hidden_size=48", "--set", "model.num_heads=4", "--set", "model.depth=1"]
    small += ["--set", "text.path=not-fetched", "--set", "model.text_channels=8", "--set", "model.text_tokens=4"]
    estimated = report("plan", "--preset", "ca2-vdm-base", "--frames", "8", "--steps", "2", *small)
    assert estimated["decode_seconds"] == estimated["decode_rise_bytes"] == 0
    assert estimated["weights_bytes"] < 2_000_000
    assert [part.split(" (")[0] for part in estimated["left_out"]] == [
        "the autoencoder of diffusers",
        "the text encoder",
        "a prompt's guidance",
    ]


def test_invalid_requests(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, line in (
        (["--context-frames", "20"], "--context-frames: 20 is more than the 9 of the model's position table"),
        (["--sampler", "none"], "sampler: 'none' is not one of"),
        (
            ["--set", "model.temporal_positions=absolute", "--frames", "14"],
            "positions allow at most 13 frames",
        ),
    ):
        assert main(["plan", "--preset", "tiny", *RUN, *arguments]) == 2
        assert line in capsys.readouterr().err


def test_other_dtypes(report: Callable[..., Any]) -> None:
    """The same kernels take half the bytes, except for parts of GELU; PyTorch's default dtype is restored."""
    request = [*MEDIUM, "--frames", "4", "--backend", "eager"]
    whole, half = (report("plan", *request, "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    assert half["cache_bytes"] * 2 == whole["cache_bytes"]
    assert half["step_rise_bytes"] < 0.7 * whole["step_rise_bytes"]
    assert torch.get_default_dtype() is torch.float32
