"""Writing: existing output, interruptions, failures and invalid requests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from video_kit import EXACT, LOSSY, assert_close, child, load, make_clip, save

from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.video_io import (
    open_reader,
    open_writer,
)


@pytest.mark.parametrize("name", [*LOSSY, *EXACT])
def test_existing_output_is_refused_and_replaced(tmp_path: Path, name: str) -> None:
    target = f"{tmp_path}/new/folder/{name}"
    save(target, make_clip(5))
    with pytest.raises(UsageError, match="--overwrite"):
        open_writer(target, fps=8)
    assert len(load(target)) == 5
    save(target, make_clip(3), overwrite=True)
    assert len(load(target)) == 3
    assert os.listdir(tmp_path / "new" / "folder") == [name.rstrip("/")]


@pytest.mark.parametrize("name", [*LOSSY, *EXACT])
def test_output_may_be_the_input(tmp_path: Path, name: str) -> None:
    target = f"{tmp_path}/{name}"
    clip = make_clip(5)
    save(target, clip)
    with open_reader(target) as reader, open_writer(target, fps=8, overwrite=True) as writer:
        for frame in reader:
            writer.write(frame)
        writer.write(clip[0])
    assert_close(load(target), [*clip, clip[0]], 25.0)


@pytest.mark.parametrize("name", [*LOSSY, *EXACT])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_output_holds_what_was_written(tmp_path: Path, name: str, error: type[BaseException]) -> None:
    def interrupted(target: str) -> None:
        with open_writer(target, fps=8) as writer:
            for frame in make_clip(4):
                writer.write(frame)
            raise error

    with pytest.raises(error):
        interrupted(f"{tmp_path}/{name}")
    assert len(load(f"{tmp_path}/{name}")) == 4


@pytest.mark.parametrize("name", [*LOSSY, *EXACT])
def test_failure_before_the_first_frame_leaves_no_trace(tmp_path: Path, name: str) -> None:
    with pytest.raises(RuntimeError), open_writer(f"{tmp_path}/new/{name}", fps=8):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    save(f"{tmp_path}/{name}", make_clip(4))
    with pytest.raises(RuntimeError), open_writer(f"{tmp_path}/{name}", fps=8, overwrite=True):
        raise RuntimeError
    assert len(load(f"{tmp_path}/{name}")) == 4


def test_frames_that_cannot_be_encoded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clip\.mp4: cannot be written") as caught:
        save(tmp_path / "clip.mp4", [np.zeros((2, 40_000, 3), np.uint8)])
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("format", ["y4m", "mkv"])
def test_full_disk(format: str) -> None:
    with pytest.raises(UserError, match="/dev/full: cannot be written"):
        save("/dev/full", [np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)] * 20, format=format)


def test_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with child(f"print(len(list(open_reader({str(tmp_path / 'pipe')!r}))))", stdout=subprocess.PIPE) as reader:
        assert reader.stdout
        save(tmp_path / "pipe", make_clip(), format="y4m")
        assert reader.stdout.read() == b"6\n"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    for name in ("locked/clip.mp4", "locked/new/clip.mp4", "locked/", "locked/new/"):
        with pytest.raises(UsageError, match="not a folder that you can write to"):
            open_writer(f"{tmp_path}/{name}", fps=8)


def test_overwriting_a_folder_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, make_clip(2))
    save(tmp_path, make_clip(1), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["frame_000000.png", "notes.txt"]


@pytest.mark.parametrize(
    ("name", "format", "fps"),
    [
        ("clip", None, 8),
        ("clip.avi", None, 8),
        ("clip.png", None, 8),
        ("new/", "mp4", 8),
        ("clip.mp4", "webm", 8),
        ("file", "png", 8),
        ("file/clip.mp4", None, 8),
        ("clip.mp4", None, 0),
        ("clip.mp4", None, float("nan")),
        ("clip.mp4", None, float("inf")),
    ],
)
def test_invalid_requests(tmp_path: Path, name: str, format: str | None, fps: float) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        open_writer(f"{tmp_path}/{name}", format=format, fps=fps, overwrite=True)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("shape", "dtype"), [((4, 5, 3), "uint8"), ((4, 4, 2), "uint8"), ((4, 4, 3), "float32")])
def test_invalid_frames(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    with open_writer(tmp_path / "clip.npz", fps=8) as writer:
        writer.write(np.zeros((4, 4, 3), np.uint8))
        with pytest.raises(ValueError, match="a frame"):
            writer.write(np.zeros(shape, dtype))
    with pytest.raises(ValueError, match="closed"):
        writer.write(np.zeros((4, 4, 3), np.uint8))
    assert len(load(tmp_path / "clip.npz")) == 1


def test_ffmpeg_does_not_interpret_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip%03d.mp4", "concat:a|b.mkv", "http:clip.gif", "-clip.y4m", "pipe:1.mp4", "a\nb é.mp4", "x%d.npz"):
        save(name, make_clip(2))
        assert len(load(name)) == 2
        assert os.listdir(tmp_path) == [name]
        os.unlink(name)
