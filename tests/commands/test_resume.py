"""``--run`` and ``ca2vdm resume``: going on after an interruption, other takes, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_kit import GENERATE, Make, Refused, Report, apart, ca2vdm, clip, load, save

from ca2vdm_cli import atomic
from ca2vdm_cli.commands import generate
from ca2vdm_cli.files import hold_lock
from ca2vdm_cli.generate.context import Context
from ca2vdm_cli.generate.journal import Journal
from ca2vdm_cli.generate.loop import LatentChunk
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.video_io import Frame, VideoWriter, write_image

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

FRAMES = 18
"""Of a run: five chunks, the last of them cut."""


@pytest.fixture(scope="module")
def stopped(weights: Path) -> Callable[..., None]:
    """``stopped(3, "sample", ...)``: runs a command with ``--run take``, and presses Ctrl-C during chunk 3."""

    def stopped(chunk: int, *arguments: object) -> None:
        decode, calls = Pipeline.decode, iter(range(1000))

        def interrupting(pipeline: Pipeline, *arguments: Any) -> Any:
            if next(calls) == chunk:
                signal.raise_signal(signal.SIGINT)
            return decode(pipeline, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pipeline, "decode", interrupting)
            assert ca2vdm(*arguments, "--preset", weights, *GENERATE, "--frames", FRAMES, "--run", "take") == 130

    return stopped


@pytest.fixture(scope="module")
def stopped_take(stopped: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stopped(2, "sample", "-q")
    return folder / "take"


@pytest.fixture
def take(stopped_take: Path, in_an_empty_folder: None) -> None:
    """The folder ``take`` of a run that was interrupted in its third chunk."""
    shutil.copytree(stopped_take, "take")


def resume(*arguments: object) -> None:
    assert ca2vdm("resume", "take", "-q", *arguments) == 0


# --- going on ---------------------------------------------------------------------------------------------------------


def test_an_interrupt_finishes_the_chunk_and_says_how_to_go_on(
    make: Make, stopped: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make("sample", "--frames", FRAMES, out="whole.npz")
    stopped(2, "sample", "-o", "out.npz")
    assert capsys.readouterr().err == (
        "interrupted: finishing this chunk; press Ctrl-C again to stop at once\n"
        "interrupted: 12 new frames are in out.npz; continue with: ca2vdm resume take\n"
    )
    assert max(apart(load("out.npz"), whole[:12])) == 0
    resume()
    assert Path("out.npz").read_bytes() == Path("whole.npz").read_bytes()
    assert capsys.readouterr().err == ""


def test_a_second_interrupt_stops_at_once(
    make: Make, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make("sample", "--frames", FRAMES, out="whole.npz")
    count = [0]

    def interrupt_twice(journal: Journal, *_: object) -> None:
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        keep(journal, *_)  # type: ignore[arg-type]

    keep = Journal.keep
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep", interrupt_twice)
        request = ["sample", "--preset", weights, *GENERATE, "--frames", FRAMES, "--run", "take", "-o", "out.npz"]
        assert ca2vdm(*request) == 130
    assert "8 new frames are in out.npz; continue" in capsys.readouterr().err
    assert max(apart(load("out.npz"), whole[:8])) == 0
    resume()
    assert Path("out.npz").read_bytes() == Path("whole.npz").read_bytes()


@pytest.mark.parametrize("out", ["out.mp4", "out.gif", "out/"])
def test_files_of_every_format_equal_those_of_an_uninterrupted_run(
    out: str, weights: Path, stopped: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> list[bytes]:
        return [path.read_bytes() for path in sorted(Path(out).iterdir() if out.endswith("/") else [Path(out)])]

    monkeypatch.setattr(sys, "argv", ["ca2vdm"])  # an mp4 holds the command
    request = ["sample", "--preset", weights, *GENERATE, "--frames", FRAMES, "-q", "-o", out]
    assert ca2vdm(*request) == 0
    whole = content()
    stopped(3, "sample", "-q", "--overwrite", "-o", out)
    assert content() != whole
    resume()
    assert content() == whole


def test_several_videos_in_batches(
    make: Make, weights: Path, stopped: Callable[..., None], monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    monkeypatch.setattr(generate, "BATCH", 2)
    request = ["sample", "--preset", weights, *GENERATE, "--frames", FRAMES, "-q", "--num-videos", 3]
    assert ca2vdm(*request, "-o", "whole.npz") == 0
    stopped(7, "sample", "-q", "--num-videos", 3, "-o", "out.npz")  # in the second batch
    monkeypatch.setattr(generate, "BATCH", 4)  # the run keeps its own
    result = report("resume", "take")
    for k in range(3):
        assert Path(f"out-{k:02}.npz").read_bytes() == Path(f"whole-{k:02}.npz").read_bytes()
    assert result["resumed_frames"] == 2 * FRAMES + 12
    assert result["run"] == "take"
    assert result["output"] == [str(Path(f"out-{k:02}.npz").resolve()) for k in range(3)]


@pytest.mark.parametrize("strategy", ["cached", "recompute"])
def test_a_given_first_frame(make: Make, stopped: Callable[..., None], strategy: str) -> None:
    write_image("given.png", clip(1)[0])
    request = ["--first-frame", "given.png", "--strategy", strategy]
    whole = make("sample", "--frames", FRAMES, *request)
    stopped(2, "sample", "-q", *request, "-o", "take.npz")
    Path("given.png").unlink()  # not needed any more
    resume()
    assert max(apart(load("take.npz"), whole)) == 0


@pytest.mark.parametrize("options", [["--only-new"], ["--aspect", "pad", "--size", "48x48"]])
def test_extend(make: Make, stopped: Callable[..., None], options: list[object]) -> None:
    save("given.npz", clip(11, 40, 60))
    whole = make("extend", "given.npz", "--frames", FRAMES, *options)
    stopped(2, "extend", "given.npz", "-q", *options, "-o", "new.npz")
    if "--only-new" in options:
        Path("given.npz").unlink()  # not needed any more
    resume()
    assert max(apart(load("new.npz"), whole)) == 0


def test_extending_standard_input(make: Make, stopped: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    save("given.y4m", clip(11), fps=10)
    whole = make("extend", "given.y4m", "--frames", FRAMES)
    with open("given.y4m", "rb") as file, io.TextIOWrapper(file) as text:
        monkeypatch.setattr(sys, "stdin", text)
        stopped(2, "extend", "-", "-q")
    resume()
    assert max(apart(load("take/extended.mp4"), whole)) < 90  # a lossy codec
    resume("-o", "new.npz")
    assert max(apart(load("new.npz"), whole)) == 0


def test_an_input_that_changed_is_refused(stopped: Callable[..., None], refused: Refused) -> None:
    save("given.npz", clip(11))
    stopped(2, "extend", "given.npz", "-q", "-o", "new.npz")
    Path("given.npz").unlink()
    save("given.npz", clip(12))
    assert "the input has changed since the run began" in refused(1, "resume", "take")
    Path("given.npz").unlink()
    assert "the input is missing; put it back" in refused(1, "resume", "take")


def test_the_input_can_t_be_the_output(weights: Path, refused: Refused) -> None:
    save("given.npz", clip(11))
    request = ["extend", "given.npz", "--preset", weights, *GENERATE, "--run", "take", "--overwrite"]
    assert "given.npz is the input, which is needed later" in refused(2, *request, "-o", "given.npz")
    assert not Path("take").exists()


def test_more_frames(make: Make, take: None, refused: Refused) -> None:
    whole = make("sample", "--frames", FRAMES + 9)
    assert f"the run has {FRAMES}; ask for at least as many" in refused(2, "resume", "take", "--frames", 5)
    resume("--frames", FRAMES + 9, "-o", "take.npz")
    assert max(apart(load("take.npz"), whole)) == 0


def test_a_finished_run(weights: Path, capsys: pytest.CaptureFixture[str], report: Report) -> None:
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 6, "-q", "--run", "take") == 0
    video = Path("take/sample.mp4").read_bytes()
    assert ca2vdm("resume", "take") == 0
    assert capsys.readouterr().err == "finished already: take/sample.mp4\n"
    assert report("resume", "take") == {"run": "take", "output": "take/sample.mp4"}
    Path("take/sample.mp4").unlink()
    resume()
    assert Path("take/sample.mp4").read_bytes() == video


def test_an_output_that_someone_else_wrote_is_left_alone(stopped: Callable[..., None], refused: Refused) -> None:
    stopped(2, "sample", "-q", "-o", "out.npz")
    Path("out.npz").write_text("precious")
    assert "out.npz: changed since this run wrote it" in refused(2, "resume", "take")
    assert Path("out.npz").read_text() == "precious"
    resume("-o", "other.npz")
    assert len(load("other.npz")) == FRAMES
    assert Path("out.npz").read_text() == "precious"


def test_changed_weights_are_refused(take: None, refused: Refused, weights: Path) -> None:
    path = weights / "ema.safetensors"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "ema.safetensors: changed since" in refused(1, "resume", "take")
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["chunk-00000001.safetensors", "run.json", "given.npy"])
def test_damage(name: str, make: Make, stopped: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    write_image("given.png", clip(1)[0])
    whole = make("sample", "--frames", FRAMES, "--first-frame", "given.png")
    stopped(3, "sample", "--first-frame", "given.png", "-q", "-o", "take.npz")
    (path,) = Path("take").rglob(name)
    path.write_bytes(path.read_bytes()[:20])
    code = ca2vdm("resume", "take")
    text = capsys.readouterr().err
    if name.startswith("chunk"):
        assert code == 0
        assert f"{path}: damaged; it is generated again" in text
        assert max(apart(load("take.npz"), whole)) == 0
    else:
        assert code == 1
        assert text.startswith(f"error: {path}: missing or damaged")


def test_a_full_disk(make: Make, weights: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make("sample", "--frames", FRAMES)
    to_disk, calls = atomic.to_disk, iter(range(1000))

    def full(path: Path) -> None:
        if next(calls) == 12:
            raise OSError(28, "No space left on device")
        to_disk(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "to_disk", full)
        request = ["sample", "--preset", weights, *GENERATE, "--frames", FRAMES, "-q", "--run", "take", "-o", "o.npz"]
        line = refused(1, *request)
    assert "cannot be written (No space left on device); check permissions and free space; 1" in line
    assert line.endswith("finished frames are in o.npz; continue with: ca2vdm resume take")
    assert 0 < len(load("o.npz")) < FRAMES
    resume()
    assert max(apart(load("o.npz"), whole)) == 0


def test_python_can_do_the_same(weights: Path) -> None:
    pipeline = Pipeline.load(weights, device="cpu", backend="eager", dtype="float32")
    whole = list(pipeline.sample(FRAMES, steps=3))
    chunks = pipeline.sample(FRAMES, steps=3, journal="journal")
    for _ in range(3):
        next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    again = list(pipeline.sample(FRAMES, steps=3, journal="journal"))
    assert [chunk.from_journal for chunk in again] == [True] * 3 + [False] * 2
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(again, whole, strict=True))


# --- folders and names ------------------------------------------------------------------------------------------------


def test_a_run_that_generated_nothing_leaves_no_folder(weights: Path, refused: Refused) -> None:
    request = ["sample", "--preset", weights, *GENERATE, "--run", "a/take"]
    refused(2, *request, "--steps", 5000)
    refused(2, *request, "-o", "out.avi")
    Path("empty.y4m").touch()
    refused(1, "extend", "empty.y4m", "--preset", weights, *GENERATE, "--run", "a/take")
    assert not Path("a/take").exists()


def test_a_folder_in_use_is_refused(take: None, weights: Path, refused: Refused) -> None:
    request = ["sample", "--preset", weights, *GENERATE, "--run"]
    line = refused(2, *request, "take")
    assert line == "error: --run: take holds a run; continue it with `ca2vdm resume`, or name another folder"
    lock = hold_lock(Path("take/lock"))
    assert lock is not None
    line = refused(2, "resume", "take")
    assert line == "error: take: another process is writing this run; wait for it, or name another folder"
    os.close(lock)
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    assert "mine has other files in it, such as notes.txt" in refused(2, *request, "mine")
    assert "mine/notes.txt is not a folder" in refused(2, *request, "mine/notes.txt")
    assert "mine: not a run; name the folder" in refused(2, "resume", "mine")


def test_what_a_killed_start_left_is_no_obstacle(weights: Path) -> None:
    Path("take/batch-000").mkdir(parents=True)
    for name in ("lock", "input", ".run.json.abc.partial", "batch-000/chunk-00000000.safetensors"):
        Path("take", name).touch()
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 5, "-q", "--run", "take") == 0
    assert len(load("take/sample.mp4")) == 5


def test_default_names_are_reserved(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command is started while the first one has not written its file yet."""
    request = ["sample", "--preset", weights, *GENERATE, "--frames", 3, "-q"]
    write = VideoWriter.write
    started: list[bool] = []

    def start_another(writer: VideoWriter, frame: Frame) -> None:
        if not started:
            started.append(True)
            assert ca2vdm(*request, "--seed", 1) == 0
        write(writer, frame)

    monkeypatch.setattr(VideoWriter, "write", start_another)
    assert ca2vdm(*request) == 0
    assert sorted(os.listdir()) == ["sample-1.mp4", "sample.mp4"]


def test_a_named_output_that_another_process_writes(
    weights: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ["sample", "--preset", weights, *GENERATE, "--frames", 3, "-q", "-o", "out.npz"]
    write = VideoWriter.write
    lines: list[str] = []

    def start_another(writer: VideoWriter, frame: Frame) -> None:
        if not lines:
            lines.append("")
            lines[0] = refused(2, *request)
        write(writer, frame)

    monkeypatch.setattr(VideoWriter, "write", start_another)
    assert ca2vdm(*request) == 0
    assert lines == ["error: out.npz: another process is writing it; choose another output"]
    assert os.listdir() == ["out.npz"]


def test_a_name_that_a_killed_process_had_reserved(weights: Path) -> None:
    Path(".sample.mp4.reserved").touch()
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 3, "-q") == 0
    assert os.listdir() == ["sample.mp4"]


def test_overwriting_the_default_name(weights: Path) -> None:
    request = ["sample", "--preset", weights, *GENERATE, "-q"]
    assert ca2vdm(*request, "--frames", 2) == 0
    assert ca2vdm(*request, "--frames", 3, "--overwrite") == 0
    assert os.listdir() == ["sample.mp4"]
    assert len(load("sample.mp4")) == 3


# --- other takes ------------------------------------------------------------------------------------------------------


def test_another_take(
    make: Make, stopped: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make("sample", "--frames", FRAMES)
    stopped(3, "sample", "-q", "-o", "take.npz")
    denoised, keep = [], Journal.keep

    def count(journal: Journal, chunk: LatentChunk, context: Context) -> None:
        denoised.append(chunk.index)
        keep(journal, chunk, context)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep", count)
        request = ["--from-frame", 10, "--seed", 7, "--run", "other", "-o", "other.npz"]
        assert ca2vdm("resume", "take", *request) == 0
    assert "chunks begin every 4 frames: the take begins at frame 8\n" in capsys.readouterr().err
    assert denoised == [2, 3, 4]
    other = load("other.npz")
    assert max(apart(other[:8], whole[:8])) == 0
    assert min(apart(other[8:], whole[8:])) > 1
    assert len(load("take.npz")) == 16  # as it was

    for path in sorted(Path("other").rglob("chunk-*"))[3:]:  # interrupted, and continued
        path.unlink()
    Path("other.npz").unlink()
    assert ca2vdm("resume", "other", "-q") == 0
    assert max(apart(load("other.npz"), other)) == 0


def test_a_take_of_an_extended_video_counts_the_input_s_frames(make: Make, stopped: Callable[..., None]) -> None:
    save("given.npz", clip(11))
    whole = make("extend", "given.npz", "--frames", FRAMES)
    stopped(4, "extend", "given.npz", "-q", "-o", "take.npz")
    resume("--from-frame", 11 + 8, "--seed", 7, "--run", "other", "-o", "other.npz", "--frames", 12)
    other = load("other.npz")
    assert len(other) == 11 + 12
    assert max(apart(other[:19], whole[:19])) == 0
    assert min(apart(other[19:], whole[19:23])) > 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--from-frame", 8, "--seed", 7], "--run: name a folder for the new take"),
        (["--from-frame", 8, "--run", "other"], "give another --seed, --prompt or --guidance"),
        (["--from-frame", 8, "--seed", 0, "--run", "other"], "the take would be the same"),
        (["--from-frame", 3, "--seed", 7, "--run", "other"], "--from-frame: 3 must be from 4 to 12"),
        (["--from-frame", 16, "--seed", 7, "--run", "other"], "--from-frame: 16 must be from 4 to 12"),
        (["--from-frame", 8, "--seed", 7, "--run", "take"], "--run: take holds a run"),
        (["--seed", 7], "--from-frame: another take needs the frame"),
        (["--from-frame", 8, "--prompt", "a fox", "--run", "other"], "its model takes no text"),
    ],
    ids=str,
)
def test_impossible_takes(options: list[object], expected: str, take: None, refused: Refused) -> None:
    assert expected in refused(2, "resume", "take", *options)
    assert not Path("other").exists()


def test_the_record_says_what_was_asked_for(take: None) -> None:
    record = json.loads(Path("take/run.json").read_text())
    assert record["request"]["options"]["seed"] == 0
    assert record["request"]["frames"] == FRAMES
    assert record["provenance"]["weights"]["path"].endswith("ema.safetensors")
    assert {"ca2vdm", "torch", "python"} <= record["provenance"]["versions"].keys()
    assert record["finished"] is False


def test_processes_have_a_part_each(
    make: Make, weights: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them; one part after the other can be continued without it."""
    request = ["sample", "--preset", weights, *GENERATE, "--frames", 6, "-q", "--num-videos", 3]
    assert ca2vdm(*request, "-o", "whole.npz") == 0
    for rank in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("ca2vdm_cli.processes.launched", lambda rank=rank: (rank, 2))
            for module in ("generate", "outputs", "generation", "resume"):
                patch.setattr(f"ca2vdm_cli.commands.{module}.launched", lambda rank=rank: (rank, 2))
            assert ca2vdm(*request, "-o", "out.npz", "--run", "take") == 0
    line = refused(2, "resume", "take")
    assert line == (
        "error: take: 2 processes share this run; launch as many with torchrun, or continue one part after another, "
        "beginning with take/process-0"
    )
    for path in Path("take").rglob("chunk-00000001*"):
        path.unlink()
    for rank in range(2):
        for path in Path().glob("out-*.npz"):
            path.unlink()
        assert ca2vdm("resume", f"take/process-{rank}", "-q") == 0
        for path in Path().glob("out-*.npz"):
            assert path.read_bytes() == Path(path.name.replace("out", "whole")).read_bytes()
        assert len(list(Path().glob("out-*.npz"))) == (2, 1)[rank]
