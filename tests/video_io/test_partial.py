"""Unfinished outputs: killed processes, full disks, leftovers, and other files that are in the way."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from video_kit import EXACT, LOSSY, assert_close, child, load, make_clip, save

from ca2vdm_cli.atomic import create
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.video_io import Frame, open_reader, open_writer

PARTIAL = {
    "clip.mp4": "clip.partial.mp4",
    "clip.mkv": "clip.partial.mkv",
    "clip.gif": "clip.partial.gif",
    "clip.y4m": "clip.partial.y4m",
    "clip.npz": "clip.partial.npy",
    "clip/": "clip.partial",
}
LAG = {"clip.mkv": 1, "clip.gif": 1}
"""How many frames FFmpeg holds back in these formats."""
WRITE = """
import os, signal, sys
from contextlib import ExitStack
sys.path.insert(0, {tests!r})
from video_kit import make_clip
with ExitStack() as stack:
    writers = [stack.enter_context(open_writer(f"{folder}/{{name}}", fps=8, overwrite=True)) for name in {names}]
    for frame in make_clip({frames}):
        for writer in writers:
            writer.write(frame)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_after(frames: int, folder: Path) -> None:
    """Another process writes the first frames of ``make_clip`` in every format, and is then killed."""
    code = WRITE.format(tests=str(Path(__file__).parent), folder=folder, names=[*PARTIAL], frames=frames)
    with child(code) as writer:
        assert writer.wait(60) == -signal.SIGKILL


def frames_of(path: Path) -> list[Frame]:
    return list(np.load(path, mmap_mode="r")) if path.suffix == ".npy" else load(path)


@pytest.mark.slow
def test_a_killed_process_leaves_all_frames_under_another_name(tmp_path: Path) -> None:
    kill_after(12, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(PARTIAL.values())
    for name, partial in PARTIAL.items():
        assert_close(frames_of(tmp_path / partial), make_clip(12)[: 12 - LAG.get(name, 0)], LOSSY.get(name, 99))
    for name in PARTIAL:  # the same video and no less: nothing is lost
        save(f"{tmp_path}/{name}", make_clip(12))
    assert sorted(os.listdir(tmp_path)) == sorted(name.rstrip("/") for name in PARTIAL)


@pytest.mark.slow
def test_a_killed_process_leaves_the_output_that_it_was_to_replace(tmp_path: Path) -> None:
    for name in PARTIAL:
        save(f"{tmp_path}/{name}", make_clip(3))
    kill_after(6, tmp_path)
    for name, partial in PARTIAL.items():
        assert len(load(tmp_path / name)) == 3
        place = tmp_path / ("clip/frames.partial" if name == "clip/" else partial)
        assert len(frames_of(place)) == 6 - LAG.get(name, 0)


@pytest.mark.parametrize("name", PARTIAL)
def test_other_content_is_never_removed(tmp_path: Path, name: str) -> None:
    """Neither a longer video of a killed process, nor another one, nor one that is being written."""
    longer, other, live = (open_writer(f"{tmp_path}/{name}", fps=8) for _ in range(3))
    for writer, clip in ((longer, make_clip(9)), (other, make_clip(4)[::-1]), (live, make_clip(3))):
        for frame in clip:
            writer.write(frame)
    for writer in (longer, other):
        assert writer._output
        writer._output.close()  # as if its process had been killed
    paths = {writer.partial for writer in (longer, other, live)}
    save(f"{tmp_path}/{name}", make_clip(6))
    assert len(paths) == 3
    assert paths == {path for path in tmp_path.iterdir() if "partial" in path.name}
    with pytest.raises(UserError, match="another output has this name by now"):
        live.close()


@pytest.mark.parametrize("cut", [1, 10, 107, 108, 150])
def test_a_fragment_that_was_cut_off_costs_one_frame(tmp_path: Path, cut: int) -> None:
    with open_writer(tmp_path / "clip.mp4", fps=8) as writer:
        sizes = []
        for frame in make_clip(6):
            writer.write(frame)
            assert writer.partial
            content = writer.partial.read_bytes()
            sizes.append(len(content))
    (tmp_path / "cut.mp4").write_bytes(content[: sizes[4] + cut])
    assert_close(load(tmp_path / "cut.mp4"), make_clip(5), 38.0)


def test_a_partial_mp4_has_the_right_times(tmp_path: Path) -> None:
    with open_writer(tmp_path / "clip.mp4", fps=29.97) as writer:
        for frame in make_clip(40):
            writer.write(frame)
        assert writer.partial
        with av.open(str(writer.partial)) as container:
            stream = container.streams.video[0]
            times = [picture.time for picture in container.decode(stream)]
    assert times == pytest.approx([index / 29.97 for index in range(40)], abs=1e-4)


@pytest.mark.parametrize("name", PARTIAL)
def test_the_same_frames_give_the_same_file(tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        save(f"{tmp_path}/{folder}/{name}", make_clip(5), metadata={"title": "clip", "comment": "é\n2"})
    one, two = ([path.read_bytes() for path in sorted((tmp_path / n).rglob("*.*"))] for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_metadata(tmp_path: Path, name: str) -> None:
    with open_writer(tmp_path / name, fps=8, metadata={"title": "a title", "comment": '{"seed": 3}'}) as writer:
        writer.write(make_clip(1)[0])
        assert writer.partial
        partial = writer.partial.read_bytes()
    assert b"a title" not in partial  # partial files of the same frames are the same, whatever the command
    with av.open(str(tmp_path / name)) as container:
        found = {key.lower(): value for key, value in container.metadata.items()}
    assert (found["title"], found["comment"]) == ("a title", '{"seed": 3}')


# --- full disks -------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, name: str) -> Iterator[None]:
    """A file system of 256 KiB at ``folder`` or, if none may be mounted, a limit on the size of files."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True)
    if mounted.returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        return
    if name == "clip/":
        pytest.skip("no file system may be mounted, and none of the images alone exceeds a limit")
    with size_limit(256 * 1024):
        yield


@contextmanager
def size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def noise(count: int) -> list[Frame]:
    return list(np.random.default_rng(0).integers(0, 255, (count, 96, 96, 3), np.uint8))


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_loses_no_finished_frame(tmp_path: Path, name: str, existing: bool) -> None:
    with small_disk(tmp_path, name):
        target = f"{tmp_path}/{name}"
        if existing:
            save(target, make_clip(2))
        writer = open_writer(target, fps=8, overwrite=True)
        with pytest.raises(UserError, match="cannot be written") as caught:  # noqa: PT012
            for frame in noise(60):
                writer.write(frame)
            writer.close()
        writer.close()
        message = str(caught.value)
        match = re.search(r"; the (\d+) finished frames are in (.*)", message)
        assert match and "\n" not in message and int(match[1]) == writer.frames - LAG.get(name, 0)
        assert len(frames_of(Path(match[2]))) == int(match[1])
        assert os.path.exists(target) == existing
        if existing:
            assert_close(load(target), make_clip(2), LOSSY.get(name, 99))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.npz"])
def test_a_disk_that_is_full_at_the_end(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames fit, but not the finished file beside them."""

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = open_writer(tmp_path / name, fps=8)
    for frame in make_clip(4):
        writer.write(frame)
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(UserError, match=r"No space left.*; the 4 finished frames are in .*partial"):
        writer.close()
    assert os.listdir(tmp_path) == [PARTIAL[name]]
    assert len(frames_of(tmp_path / PARTIAL[name])) == 4


@pytest.mark.parametrize("name", PARTIAL)
def test_a_disk_that_is_full_at_the_first_frame_gets_no_file(tmp_path: Path, name: str) -> None:
    with size_limit(10), pytest.raises(UserError, match="cannot be written"):
        save(f"{tmp_path}/{name}", noise(1))
    assert os.listdir(tmp_path) == []


def test_replacing_a_folder_is_undone_if_a_frame_cannot_be_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, make_clip(3))
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if target == tmp_path / "frame_000005.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"the 7 finished frames are in .*frames\.partial"):
        save(tmp_path, make_clip(7)[::-1], overwrite=True)
    assert_close(load(tmp_path), make_clip(3), 99)
    assert_close(load(tmp_path / "frames.partial"), make_clip(7)[::-1], 99)


# --- other files in the way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LOSSY, *EXACT])
@pytest.mark.parametrize("overwrite", [False, True])
def test_symbolic_links_are_not_followed(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / "precious").write_text("mine")
    target = tmp_path / "out" / name.rstrip("/")
    target.parent.mkdir()
    if overwrite:
        save(f"{target.parent}/{name}", make_clip(2))
    names = [PARTIAL[name], f".{target.name}.{os.getpid()}.part", f".{target.name}.partial"]
    for link in names:
        (target.parent / link).symlink_to(tmp_path / "precious")
    save(f"{target.parent}/{name}", make_clip(3), overwrite=overwrite)
    assert (tmp_path / "precious").read_text() == "mine"
    assert sorted(os.listdir(target.parent)) == sorted([target.name, *names])
    assert len(load(target)) == 3


@pytest.mark.parametrize("name", PARTIAL)
def test_an_output_that_appeared_meanwhile_is_not_replaced(tmp_path: Path, name: str) -> None:
    writer = open_writer(f"{tmp_path}/{name}", fps=8)
    writer.write(make_clip(1)[0])
    save(f"{tmp_path}/{name}", make_clip(4))
    with pytest.raises(UserError, match="another output has this name by now"):
        writer.close()
    assert len(load(tmp_path / name)) == 4


def test_a_name_that_is_as_long_as_possible(tmp_path: Path) -> None:
    name = "é" * 125 + ".mp4"
    save(tmp_path / name, make_clip(2))
    assert os.listdir(tmp_path) == [name]


def test_a_user_s_file_of_that_name_is_kept(tmp_path: Path) -> None:
    (tmp_path / "clip.partial.mp4").write_text("mine")
    save(tmp_path / "clip.mp4", make_clip(2))
    assert (tmp_path / "clip.partial.mp4").read_text() == "mine"


def test_a_locked_file_is_not_locked_again(tmp_path: Path) -> None:
    handle = create(tmp_path / "file")
    code = "import pathlib, sys; from ca2vdm_cli.atomic import in_use; print(in_use(pathlib.Path(sys.argv[1])))"
    run = [sys.executable, "-c", code, str(tmp_path / "file")]
    assert subprocess.run(run, capture_output=True, text=True).stdout == "True\n"
    os.close(handle)
    assert subprocess.run(run, capture_output=True, text=True).stdout == "False\n"
    with pytest.raises(FileExistsError):
        create(tmp_path / "file")


def test_an_interrupt_within_a_frame_keeps_the_frames_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = open_writer(tmp_path / "clip.mkv", fps=8)
    for frame in make_clip(5):
        writer.write(frame)

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.write(make_clip(1)[0])
    with pytest.raises(ValueError, match="closed"):
        writer.write(make_clip(1)[0])
    writer.close()
    with open_reader(tmp_path / "clip.mkv") as reader:
        assert_close(list(reader), make_clip(5)[:4], 38.0)
