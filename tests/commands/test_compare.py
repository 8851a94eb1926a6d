"""``ca2vdm bench`` and ``verify``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_kit import CHUNK, ROOT, RUN, WINDOW, Refused, Report, ca2vdm

from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.model.frame_plan import CachePlan
from ca2vdm_cli.model.kv_cache import KVCache
from ca2vdm_cli.training.run_folder import WEIGHTS_FILE

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
GOLDEN = ROOT / "tests" / "golden" / "cyclic_prev2.safetensors"


EXACT = ["--preset", "tiny", *RUN, "--dtype", "float32", "--steps", 2]


def test_bench_as_json(report: Report) -> None:
    result = report("bench", "--compare", "recompute", *EXACT)
    frames = -(-(WINDOW + 2 * CHUNK) // CHUNK) * CHUNK
    assert result["frames"] == frames
    assert result["outputs_agree"] is True
    assert result["max_abs_difference_before_slide"] < 1e-5 * result["max_abs_output"]
    assert result["max_abs_difference_after_slide"] > 1e-3 * result["max_abs_output"]
    cached, recompute = result["results"]["cached"], result["results"]["recompute"]
    for measured in (cached, recompute):
        assert 0 < measured["steady_seconds_per_chunk"] < measured["seconds"]
        assert len(measured["seconds_per_chunk"]) == frames // CHUNK
        assert [len(steps) for steps in measured["seconds_per_step"]] == [2] * (frames // CHUNK)
        assert sum(measured["seconds_per_chunk"]) == pytest.approx(measured["seconds"])
        assert measured["peak_memory_bytes"] >= result["weights_bytes"] + measured["context_bytes"]
    ratio = recompute["steady_seconds_per_chunk"] / cached["steady_seconds_per_chunk"]
    assert result["speedup"] == pytest.approx(ratio)
    assert cached["cache_bytes"] == 2 * 2 * (WINDOW + CHUNK + 3) * 16 * 48 * 4
    assert recompute["cache_bytes"] == 0


def test_bench_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("bench", *EXACT) == 0
    text = capsys.readouterr().out
    assert re.search(r"cached is \d+\.\d\d× (faster|slower) than recompute at a 9-frame window", text)
    for words in ("random weights", "cached", "recompute", "×", "chunk", "video", "peak", "time ∝", "framesᵉ"):
        assert words in text


def test_bench_of_one_chunk_has_no_ratio(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("bench", *EXACT, "--frames", 4)["speedup"] is None
    assert ca2vdm("bench", *EXACT, "--frames", 4) == 0
    assert "measure more frames" in capsys.readouterr().out


def test_bench_uses_weights_if_there_are_some(report: Report, weights: Path) -> None:
    for option, value in (("--preset", weights), ("--checkpoint", weights), ("--checkpoint", weights / WEIGHTS_FILE)):
        result = report("bench", option, value, *RUN, "--steps", 1, "--frames", 4)
        assert result["trained"] is True and result["chunk_frames"] == CHUNK
    assert report("bench", *EXACT, "--frames", 4)["trained"] is False


def shifted_mask(plan: CachePlan) -> CachePlan:
    """A chunk sees the wrong slot of the ring."""
    assert plan.temporal_mask is not None
    return replace(plan, temporal_mask=plan.temporal_mask.roll(1, 1))


def shifted_position(plan: CachePlan) -> CachePlan:
    """Finished frames are written one place too late in time."""
    return replace(plan, positions=(plan.positions + 1) % (WINDOW + CHUNK)) if plan.clean_frames else plan


def shifted_slot(plan: CachePlan) -> CachePlan:
    """Finished frames are written one slot too far."""
    return replace(plan, slots=(plan.slots + 1) % (WINDOW + CHUNK)) if plan.clean_frames else plan


def hidden_prefix(plan: CachePlan) -> CachePlan:
    """A chunk does not see the spatial prefix."""
    return replace(plan, has_prefix=torch.zeros_like(plan.has_prefix))


@pytest.mark.parametrize("fault", [shifted_mask, shifted_position, shifted_slot, hidden_prefix])
def test_fault_in_the_cache_is_found(
    report: Report,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[CachePlan], CachePlan],
) -> None:
    plan = KVCache.plan

    def faulty(cache: KVCache, frames: int, *, clean: bool) -> CachePlan:
        return fault(plan(cache, frames, clean=clean))

    monkeypatch.setattr(KVCache, "plan", faulty)
    result = report("bench", *EXACT, "--frames", 8)
    assert result["max_abs_difference_before_slide"] > 1e-3 * result["max_abs_output"]
    assert result["outputs_agree"] is False
    assert ca2vdm("bench", *EXACT, "--frames", 8) == 0
    assert "outputs DIFFER by" in capsys.readouterr().out
    result = report("verify", *EXACT, code=1)
    assert result["ok"] is False
    assert [row["ok"] for row in result["results"]] != [True] * 3 + [None] * 2


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_latents_need_no_autoencoder(report: Report, weights: Path, refused: Refused, command: str) -> None:
    shutil.copy(weights / WEIGHTS_FILE, "alone.safetensors")
    assert report(command, *EXACT, "--checkpoint", "alone.safetensors")
    assert "autoencoder has no weights" in refused(2, "sample", *EXACT, "--checkpoint", "alone.safetensors")


def test_positions_that_end(report: Report) -> None:
    """A table of 13 entries has room for three whole chunks; the last one sees nearly a full window."""
    absolute = [*EXACT, "--set", "model.temporal_positions=absolute"]
    result = report("verify", *absolute)
    assert [row["tensor"] for row in result["results"]] == ["frames 0–3", "frames 4–7", "frames 8–11"]
    assert report("bench", *absolute)["frames"] == 12


def test_random_weights_of_many_steps_are_compared_step_by_step(report: Report) -> None:
    """In independent runs with random weights, rounding errors would grow without bound."""
    for seed in range(3):
        request = ["verify", "--preset", "tiny", *RUN, "--dtype", "float32", "--seed", seed]
        results = report(*request, "--set", "model.depth=4")["results"]
        assert all(row["max_abs_difference"] < 1e-3 for row in results[:3])
        assert all(row["max_abs_difference"] > 1e-3 for row in results[3:])


@pytest.mark.parametrize("trained", [False, True])
def test_verify(capsys: pytest.CaptureFixture[str], report: Report, weights: Path, trained: bool) -> None:
    request = ["verify", *EXACT[2:], "--preset", weights if trained else "tiny"]
    result = report(*request)
    assert result["ok"] is True
    assert [row["tensor"] for row in result["results"]] == [f"frames {4 * k}–{4 * k + 3}" for k in range(5)]
    assert [row["ok"] for row in result["results"]] == [True] * 3 + [None] * 2
    assert all(row["max_abs_difference"] > 1e-3 for row in result["results"][3:])
    assert ca2vdm(*request) == 0
    out, text = capsys.readouterr()
    assert out.count("equal") == 3
    assert "all equal" in text
    assert ("random weights" in text) == (not trained)


def test_verify_of_a_recorded_run(capsys: pytest.CaptureFixture[str], report: Report) -> None:
    result = report("verify", "--recorded", GOLDEN, *RUN)
    assert result["ok"] is True
    names = {"window_cached", "window_recompute", "video_cached", "video_recompute"}
    assert {row["tensor"] for row in result["results"]} == names
    assert all(row["max_abs_difference"] <= 1e-4 for row in result["results"])

    tensors, metadata = load_tensors(GOLDEN)
    tensors["expected.window_cached"][0, 0, 0, 0, 0] += 0.01
    save_tensors(Path("changed.safetensors"), tensors, metadata)
    assert ca2vdm("verify", "--recorded", "changed.safetensors", *RUN) == 1
    out, text = capsys.readouterr()
    assert re.search(r"window_cached +1\.00e-02 .* differs", out)
    assert "NOT EQUAL: window_cached" in text


def test_verify_refuses_files_that_are_no_recordings(weights: Path, refused: Refused) -> None:
    assert "no such file" in refused(2, "verify", "--recorded", "nope.safetensors")
    assert "not a recorded run" in refused(1, "verify", "--recorded", weights / WEIGHTS_FILE)
    tensors, metadata = load_tensors(GOLDEN)
    less = {key: value for key, value in tensors.items() if not key.startswith("expected.")}
    save_tensors(Path("less.safetensors"), less, metadata)
    assert "nothing to check" in refused(2, "verify", "--recorded", "less.safetensors", *RUN)
