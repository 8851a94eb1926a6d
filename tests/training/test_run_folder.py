"""A run's folder: it keeps the newest checkpoints, writes them atomically, and detects damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.training.checkpoints import MANIFEST_FILE
from ca2vdm_cli.training.run_folder import METRICS_FILE, STATE_FILE, WEIGHTS_FILE, RunFolder


def files(step: int) -> dict[str, dict[str, Tensor]]:
    return {WEIGHTS_FILE: {"w": torch.full((50,), float(step))}, STATE_FILE: {"model.w": torch.full((50,), 2.0 * step)}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of steps 2 and 3; that of step 1 was removed."""
    folder = RunFolder(tmp_path / "run", keep=2)
    assert folder.newest() == (None, []) and not folder.begun
    for step in (1, 2, 3):
        folder.save(step, {"seed": "7"}, files(step))
    return folder


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept_and_the_newest_weights_published(folder: RunFolder) -> None:
    assert names(folder) == ["step-00000002", "step-00000003"] and folder.begun
    last, problems = folder.newest()
    assert last is not None and (last.step, last.facts, problems) == (3, {"seed": "7"}, [])
    assert torch.equal(last.tensors(STATE_FILE)["model.w"], torch.full((50,), 6.0))
    weights, metadata = load_tensors(folder.path / WEIGHTS_FILE)
    assert torch.equal(weights["w"], torch.full((50,), 3.0)) and metadata["step"] == "3"


@pytest.mark.parametrize("name", [WEIGHTS_FILE, STATE_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["a bit", "half", "gone"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(folder: RunFolder, name: str, damage: str) -> None:
    path = folder.path / "checkpoints" / "step-00000003" / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[-3] ^= 4  # a bit of the last value, or of the manifest's brackets
        path.write_bytes(content if damage == "a bit" else content[: len(content) // 2])
    last, problems = folder.newest()
    assert last is not None and last.step == 2
    (problem,) = problems
    assert str(path) in problem or f"{path.parent}: {name if name != MANIFEST_FILE else 'its ' + name}" in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"step": 2, "facts": {}, "files": {}}',
        '{"step": 3, "facts": {}, "files": {}}',
        '{"step": 3, "facts": {}, "files": {"../../metrics.jsonl": {"bytes": 1, "sha256": ""}}}',
        '{"step": 3, "facts": [], "files": {}}',
        '{"step": Infinity, "facts": {}, "files": {}}',
        "[" * 100_000,
    ],
)
def test_a_manifest_is_not_trusted(folder: RunFolder, manifest: str) -> None:
    (folder.path / "checkpoints" / "step-00000003" / MANIFEST_FILE).write_text(manifest)
    last, problems = folder.newest()
    assert last is not None and last.step == 2 and len(problems) == 1


def test_a_step_can_be_saved_again_over_a_damaged_one(folder: RunFolder) -> None:
    (folder.path / "checkpoints" / "step-00000003" / STATE_FILE).unlink()
    folder.save(3, {}, files(9))
    last, problems = folder.newest()
    assert last is not None and not problems
    assert torch.equal(last.tensors(STATE_FILE)["model.w"], torch.full((50,), 18.0))
    assert names(folder) == ["step-00000002", "step-00000003"]


def test_a_damaged_checkpoint_does_not_displace_an_intact_one(folder: RunFolder) -> None:
    folder.save(5, {}, files(5))
    (folder.path / "checkpoints" / "step-00000005" / STATE_FILE).unlink()
    folder.save(4, {}, files(4))  # by a run that was resumed from step 3
    assert names(folder) == ["step-00000003", "step-00000004"]


def test_a_step_that_was_saved_before_is_left_alone(folder: RunFolder) -> None:
    (folder.path / WEIGHTS_FILE).unlink()  # as if the run was killed before publishing
    folder.save(3, {}, files(9))
    last, _ = folder.newest()
    assert last is not None and torch.equal(last.tensors(STATE_FILE)["model.w"], torch.full((50,), 6.0))
    assert torch.equal(load_tensors(folder.path / WEIGHTS_FILE)[0]["w"], torch.full((50,), 3.0))
    folder.save(3, {}, files(9))  # published already
    assert {path.name for path in folder.path.iterdir()} == {"checkpoints", WEIGHTS_FILE}


def test_leftovers_of_a_killed_save_are_removed(folder: RunFolder) -> None:
    leftover = folder.path / "checkpoints" / ".step-00000004.partial"
    leftover.mkdir()
    (leftover / STATE_FILE).write_text("half")
    assert folder.newest()[1] == []
    folder.save(5, {}, files(5))
    assert names(folder) == ["step-00000003", "step-00000005"]


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(folder: RunFolder) -> None:
    blocked = RunFolder(folder.path / METRICS_FILE)
    (folder.path / METRICS_FILE).write_text("")
    with pytest.raises(UserError, match="cannot be written") as error:
        blocked.save(1, {}, files(1))
    assert "\n" not in str(error.value)


def test_metrics_beyond_the_checkpoint_are_dropped(folder: RunFolder) -> None:
    path = folder.path / METRICS_FILE
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    folder.drop_lines_after(METRICS_FILE, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    folder.drop_lines_after(METRICS_FILE, 0)
    assert path.read_text() == ""
