"""``ca2vdm runs``, ``--manifest`` and ``ca2vdm reproduce``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from command_kit import GENERATE, Refused, Report, ca2vdm, clip, load, save

from ca2vdm_cli.files import hold_lock
from ca2vdm_cli.video_io import write_image

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(scope="module")
def made_takes(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four chunks, and a take that branches off after the second."""
    folder = tmp_path_factory.mktemp("takes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        request = ["sample", "--preset", weights, *GENERATE, "--frames", 15, "-q", "--run", "first"]
        assert ca2vdm(*request, "--manifest") == 0
        branch = ["--from-frame", 8, "--seed", 7, "--run", "second", "--frames", 10, "--manifest"]
        assert ca2vdm("resume", "first", "-q", *branch) == 0
    return folder


@pytest.fixture
def takes(made_takes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders ``takes/first`` and ``takes/second``."""
    shutil.copytree(made_takes, tmp_path / "takes")
    monkeypatch.chdir(tmp_path)


def test_a_tree_of_takes(takes: None, report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = report("runs", "takes")["runs"]
    assert (first["path"], first["frames"], first["frames_wanted"]) == ("takes/first", 15, 15)
    assert (second["path"], second["frames"], second["frames_wanted"]) == ("takes/second", 10, 10)
    assert (first["status"], second["status"]) == ("finished", "finished")
    assert (first["parent"], second["parent"], second["from_frame"]) == (None, first["id"], 8)
    assert (first["seed"], second["seed"]) == (0, 7)
    assert first["bytes"] == sum(path.stat().st_size for path in Path("takes/first").rglob("*") if path.is_file())
    assert first["outputs"] == ["takes/first/sample.mp4"]
    assert ca2vdm("runs", "takes/second", "takes/first") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("takes/first ")
    assert lines[2].startswith("└─ takes/second  from 8  ")


def test_the_status_of_a_run(takes: None, report: Report) -> None:
    def statuses() -> list[tuple[str, int]]:
        return [(run["status"], run["frames"]) for run in report("runs", "takes")["runs"]]

    lock = hold_lock(Path("takes/second/lock"))
    assert lock is not None
    assert statuses() == [("finished", 15), ("running", 10)]
    os.close(lock)
    record = json.loads(Path("takes/first/run.json").read_text())
    Path("takes/first/run.json").write_text(json.dumps({**record, "finished": False}))
    Path("takes/second/batch-000/chunk-00000001.safetensors").write_text("damaged")
    assert statuses() == [("interrupted", 15), ("damaged", 4)]
    Path("takes/first/run.json").write_text("{}")
    assert statuses() == [("damaged", 0), ("damaged", 4)]


def test_folders_without_runs(refused: Refused) -> None:
    Path("empty").mkdir()
    assert refused(2, "runs", "empty") == "error: empty: no run there; sample and extend make one with --run DIR"
    assert refused(2, "runs", "nope") == "error: nope: no such folder"


def test_a_manifest_says_how_a_video_was_made(takes: None, weights: Path) -> None:
    manifest = json.loads(Path("takes/first/sample.mp4.json").read_text())
    assert manifest["request"]["options"]["seed"] == 0
    assert manifest["request"]["options"]["steps"] == 3
    assert manifest["frames"] == 15
    assert manifest["file_sha256"] == hashlib.sha256(Path("takes/first/sample.mp4").read_bytes()).hexdigest()
    provenance = manifest["provenance"]
    assert provenance["weights"]["sha256"] == hashlib.sha256((weights / "ema.safetensors").read_bytes()).hexdigest()
    assert provenance["settings"]["model"]["depth"] == 2
    assert {"ca2vdm", "torch", "numpy", "python"} <= provenance["versions"].keys()
    assert manifest["command_line"][0] == "ca2vdm"
    assert manifest["seconds"]["denoise"] > 0


def test_the_same_video_is_made_again(
    weights: Path, takes: None, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    """Each of several videos, and its frames are those that the digest is of."""
    request = ["sample", "--preset", weights, *GENERATE, "--frames", 6, "--num-videos", 2, "-q", "--seed", 3]
    assert ca2vdm(*request, "-o", "two.npz", "--manifest") == 0
    digest = hashlib.sha256(b"".join(frame.tobytes() for frame in load("two-01.npz"))).hexdigest()
    assert json.loads(Path("two-01.npz.json").read_text())["frames_sha256"] == digest
    assert ca2vdm("reproduce", "takes/first/sample.mp4.json", "-o", "again.npz") == 0
    assert capsys.readouterr().err.startswith("equal: 15 frames, sha256 ")
    assert len(load("again.npz")) == 15
    line = refused(1, "reproduce", "takes/second/sample.mp4.json")
    assert "a take that begins with chunks of" in line


def test_frames_that_differ(takes: None, refused: Refused, report: Report) -> None:
    path = Path("takes/first/sample.mp4.json")
    manifest = json.loads(path.read_text())
    manifest["frames_sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    line = refused(1, "reproduce", path)
    assert line == (
        f"error: {path}: the frames differ from the recorded ones (versions, device and threads are the same)"
    )
    manifest["provenance"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(manifest))
    assert "instead of 1.0)" in refused(1, "reproduce", path)
    assert report("reproduce", path, code=1)["equal"] is False


def test_what_is_missing_or_has_changed(takes: None, refused: Refused, weights: Path) -> None:
    path = Path("takes/first/sample.mp4.json")
    manifest = json.loads(path.read_text())
    for file, expected in (("nope.safetensors", "no such file"), (str(path), "changed since")):
        manifest["provenance"]["weights"]["path"] = file
        path.write_text(json.dumps(manifest))
        assert expected in refused(1, "reproduce", path)
    path.write_text("{}")
    assert "not a manifest of this version" in refused(1, "reproduce", path)
    assert refused(1, "reproduce", "nope.json") == "error: nope.json: missing or damaged"


def test_reproducing_what_began_with_given_frames(
    weights: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    save("given.npz", clip(11, 40, 60))
    write_image("given.png", clip(1)[0])
    request = ["--preset", weights, *GENERATE, "--frames", 5, "-q", "--manifest"]
    assert ca2vdm("extend", "given.npz", *request, "--aspect", "pad", "--run", "take") == 0
    assert ca2vdm("sample", "--first-frame", "given.png", *request, "-o", "out.npz") == 0
    assert ca2vdm("reproduce", "take/given-extended.mp4.json") == 0
    assert ca2vdm("reproduce", "out.npz.json", "-q") == 0
    assert capsys.readouterr().err.startswith("equal: 16 frames, sha256 ")
    write_image("given.png", clip(2)[1])
    assert "given.png: the input has changed" in refused(1, "reproduce", "out.npz.json")


def test_a_manifest_is_not_overwritten(weights: Path, refused: Refused) -> None:
    Path("out.npz.json").write_text("precious")
    request = ["sample", "--preset", weights, *GENERATE, "--frames", 2, "-o", "out.npz", "--manifest"]
    assert "out.npz.json: exists already" in refused(2, *request)
    assert "leave out --manifest" in refused(2, *request, "-o", "-")
    assert sorted(os.listdir()) == ["out.npz.json"]
