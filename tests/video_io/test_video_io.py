"""Video files through the public interface of ``ca2vdm_cli.video_io``."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import FrameType, SimpleNamespace

import av
import cv2
import numpy as np
import pytest

from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.video_io import (
    Aspect,
    Frame,
    Geometry,
    OutputFormat,
    contact_sheet,
    open_reader,
    open_writer,
    to_channels,
    write_image,
)

LOSSY = {"clip.mp4": 38.0, "clip.mkv": 38.0, "clip.gif": 30.0, "clip.y4m": 45.0}
EXACT = ["clip.npz", "clip/"]
NTSC = Fraction(30000, 1001)


def make_clip(count: int = 6, height: int = 48, width: int = 64) -> list[Frame]:
    """Smooth colours that drift, every frame different, no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    return [
        np.stack([40 + x * 3 - i * 2, 30 + y * 4 - i, 128 + 60 * np.sin((x + 2 * y) / 25 + i / 3)], -1)
        .clip(0, 255)
        .astype(np.uint8)
        for i in range(count)
    ]


def save(path: Path | str, frames: list[Frame], fps: Fraction | float = 8, **options: bool | str) -> None:
    with open_writer(path, fps=fps, **options) as writer:  # type: ignore[arg-type]
        for frame in frames:
            writer.write(frame)
    assert writer.frames == len(frames)


def load(path: Path | str) -> list[Frame]:
    with open_reader(path) as reader:
        return list(reader)


def psnr(a: Frame, b: Frame) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def assert_close(frames: list[Frame], expected: list[Frame], decibels: float) -> None:
    assert len(frames) == len(expected)
    for frame, other in zip(frames, expected, strict=True):
        assert frame.shape == other.shape and frame.dtype == np.uint8
        assert psnr(frame, other) >= decibels


def child(code: str, **pipes: object) -> subprocess.Popen[bytes]:
    """Another Python that runs ``code`` and treats warnings as errors."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", "from ca2vdm_cli.video_io import *\n" + code]
    return subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("size", [(48, 64), (47, 63), (1, 1)])
def test_exact_formats(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    clip = make_clip(3, *size)
    target = f"{tmp_path}/{name}"
    save(target, clip)
    with open_reader(target) as reader:
        assert (reader.height, reader.width, reader.fps, reader.frame_count) == (*size, None, 3)
        assert all(np.array_equal(a, b) for a, b in zip(reader, clip, strict=True))


@pytest.mark.parametrize("fps", [8, 12.5, NTSC])
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats(tmp_path: Path, name: str, fps: float) -> None:
    clip = make_clip(20)
    save(tmp_path / name, clip, fps)
    with open_reader(tmp_path / name) as reader:
        assert (reader.height, reader.width) == (48, 64)
        assert reader.fps == pytest.approx(fps, rel=0.002)  # a GIF counts hundredths of a second
        assert reader.frame_count in (None, 20)
        assert_close(list(reader), clip, LOSSY[name])


@pytest.mark.parametrize("name", LOSSY)
def test_odd_sizes(tmp_path: Path, name: str) -> None:
    """H.264 repeats the last row and column; the others keep the size."""
    clip = make_clip(4, 47, 63)
    save(tmp_path / name, clip)
    if name in ("clip.mp4", "clip.mkv"):
        clip = [np.pad(frame, ((0, 1), (0, 1), (0, 0)), mode="edge") for frame in clip]
    assert_close(load(tmp_path / name), clip, LOSSY[name])


def test_passing_many_times_keeps_the_brightness(tmp_path: Path) -> None:
    first = frames = make_clip(2)
    for turn in range(8):
        save(tmp_path / f"{turn}.y4m", frames)
        frames = load(tmp_path / f"{turn}.y4m")
    assert abs(np.mean(frames) - np.mean(first)) < 0.5


def test_gray_frames(tmp_path: Path) -> None:
    gray = [to_channels(frame, 1) for frame in make_clip(3)]
    save(f"{tmp_path}/a/", gray)
    save(f"{tmp_path}/b/", [frame[:, :, 0] for frame in gray])
    for one, other, frame in zip(load(tmp_path / "a"), load(tmp_path / "b"), gray, strict=True):
        assert np.array_equal(one, other) and np.array_equal(one, np.repeat(frame, 3, axis=2))


def test_mp4_plays_in_a_browser(tmp_path: Path) -> None:
    save(tmp_path / "clip.mp4", make_clip())
    data = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.duration and stream.time_base
        assert stream.duration * stream.time_base == Fraction(6, 8)


@pytest.mark.parametrize(("size", "chroma"), [((48, 64), b" C420"), ((47, 64), b" C444")])
def test_y4m_header(tmp_path: Path, size: tuple[int, int], chroma: bytes) -> None:
    save(tmp_path / "clip.y4m", make_clip(2, *size), NTSC)
    header = (tmp_path / "clip.y4m").read_bytes().split(b"\n")[0]
    assert header.startswith(b"YUV4MPEG2 W%d H%d F30000:1001" % size[::-1]) and chroma in header


def test_npz_is_plain_numpy(tmp_path: Path) -> None:
    clip = make_clip()
    save(tmp_path / "clip.npz", clip)
    with np.load(tmp_path / "clip.npz", allow_pickle=False) as archive:
        assert archive.files == ["frames"] and np.array_equal(archive["frames"], np.stack(clip))
    np.savez_compressed(tmp_path / "gray.npz", frames=np.stack(clip)[..., 0])
    assert np.array_equal(load(tmp_path / "gray.npz")[2], np.repeat(clip[2][..., :1], 3, axis=2))


def test_format_overrules_the_suffix(tmp_path: Path) -> None:
    save(tmp_path / "clip.bin", make_clip(), format="y4m")
    assert (tmp_path / "clip.bin").read_bytes().startswith(b"YUV4MPEG2")
    save(tmp_path / "frames", make_clip(2), format="png")
    assert sorted(os.listdir(tmp_path / "frames")) == ["frame_000000.png", "frame_000001.png"]


# --- pipes ------------------------------------------------------------------------------------------------------------

WRITE = """
import sys, numpy as np
with open_writer("-", format="{format}", fps=8) as writer:
    for i in range(80):
        writer.write(np.full((48, 64, 3), 3 * i, np.uint8))
    print("written", file=sys.stderr, flush=True)
    sys.stdin.readline()
"""
READ = """
import sys
for i, frame in enumerate(open_reader("-")):
    print(i, int(frame.mean().round()), flush=True)
"""


@pytest.mark.parametrize("format", ["y4m", "mkv"])
def test_frames_come_through_a_pipe_before_it_ends(format: str) -> None:
    pipe = subprocess.PIPE
    with (
        child(WRITE.format(format=format), stdin=pipe, stdout=pipe, stderr=pipe) as writer,
        child(READ, stdin=writer.stdout, stdout=pipe) as reader,
    ):
        assert writer.stdout and writer.stdin and writer.stderr and reader.stdout
        writer.stdout.close()
        assert writer.stderr.readline() == b"written\n"
        early = [reader.stdout.readline().split() for _ in range(20)]
        assert writer.poll() is None
        writer.stdin.close()
        rows = early + [line.split() for line in reader.stdout]
        assert writer.wait() == reader.wait() == 0 and writer.stderr.read() == b""
    assert [int(index) for index, _ in rows] == list(range(80))
    assert all(abs(int(mean) - 3 * int(index)) <= 2 for index, mean in rows)


@pytest.mark.parametrize("format", ["y4m", "mkv"])
def test_a_closed_pipe_is_a_broken_pipe_error_and_no_more(format: str) -> None:
    code = f"""
import numpy as np
try:
    with open_writer("-", format="{format}", fps=8) as writer:
        while True:
            writer.write(np.random.randint(0, 255, (48, 64, 3), np.uint8))
except BrokenPipeError:
    raise SystemExit(7)
"""
    with child(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout and writer.stderr
        assert writer.stdout.read(100)
        writer.stdout.close()
        assert writer.wait() == 7 and writer.stderr.read() == b""


def test_ctrl_c_while_waiting_for_a_pipe() -> None:
    code = """
try:
    print("ready", flush=True)
    open_reader("-")
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    with child(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout and reader.stdin and reader.stderr
        assert reader.stdout.readline() == b"ready\n"
        reader.stdin.write(b"YUV4MPEG2 W64")
        reader.stdin.flush()
        time.sleep(0.3)  # until it waits for more
        reader.send_signal(signal.SIGINT)
        assert reader.wait(20) == 130 and reader.stderr.read() == b""


@pytest.mark.parametrize("nth", [1, 2, 6])
def test_ctrl_c_on_the_way_into_a_read(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """PyAV would drop what is raised in its callback, and print what is raised before the callback's first line."""
    save(tmp_path / "clip.y4m", make_clip(60))
    calls = 0

    def interrupt_on_entry(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        if frame.f_code.co_name == "read" and Path(frame.f_code.co_filename).name == "reading.py":
            calls += 1
            if calls == nth:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(["cat", tmp_path / "clip.y4m"], stdout=subprocess.PIPE) as pipe:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=pipe.stdout, isatty=lambda: False))
        trace = sys.gettrace()
        sys.settrace(interrupt_on_entry)
        try:
            with pytest.raises(KeyboardInterrupt), open_reader("-") as reader:
                list(reader)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            sys.settrace(trace)
            signal.signal(signal.SIGINT, before)
    assert calls >= nth and capfd.readouterr().err == ""


@pytest.mark.parametrize("seekable", [True, False])
def test_standard_input(tmp_path: Path, seekable: bool) -> None:
    save(tmp_path / "clip.mp4", make_clip())
    data = (tmp_path / "clip.mp4").read_bytes()
    with (
        (tmp_path / "clip.mp4").open("rb") as file,
        child(READ, stdin=file if seekable else subprocess.PIPE, stdout=subprocess.PIPE) as reader,
    ):
        out, _ = reader.communicate(None if seekable else data)
    assert reader.returncode == 0 and len(out.splitlines()) == 6


@pytest.mark.parametrize("data", [b"", b"nothing to see here\n" * 500])
def test_standard_input_without_a_video(data: bytes) -> None:
    with child(READ, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        _, message = reader.communicate(data)
    assert message.splitlines()[-1].startswith(b"ca2vdm_cli.errors.UserError: standard input: ")


@pytest.mark.parametrize("format", ["mp4", "gif", "npz", "png"])
def test_formats_that_no_pipe_can_take(format: str) -> None:
    with pytest.raises(UsageError, match="use y4m, mkv"):
        open_writer("-", format=format, fps=8)


# --- what is there already, and what is left behind -------------------------------------------------------------------


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
def test_wrong_requests(tmp_path: Path, name: str, format: str | None, fps: float) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        open_writer(f"{tmp_path}/{name}", format=format, fps=fps, overwrite=True)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("shape", "dtype"), [((4, 5, 3), "uint8"), ((4, 4, 2), "uint8"), ((4, 4, 3), "float32")])
def test_wrong_frames(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    with open_writer(tmp_path / "clip.npz", fps=8) as writer:
        writer.write(np.zeros((4, 4, 3), np.uint8))
        with pytest.raises(ValueError, match="a frame"):
            writer.write(np.zeros(shape, dtype))
    with pytest.raises(ValueError, match="closed"):
        writer.write(np.zeros((4, 4, 3), np.uint8))
    assert len(load(tmp_path / "clip.npz")) == 1


def test_names_mean_nothing_to_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip%03d.mp4", "concat:a|b.mkv", "http:clip.gif", "-clip.y4m", "pipe:1.mp4", "a\nb é.mp4", "x%d.npz"):
        save(name, make_clip(2))
        assert len(load(name)) == 2
        assert os.listdir(tmp_path) == [name]
        os.unlink(name)


# --- reading what others wrote ----------------------------------------------------------------------------------------


def test_unknown_codec(tmp_path: Path) -> None:
    save(tmp_path / "clip.mp4", make_clip())
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(data.replace(b"avc1", b"none"))
    with pytest.raises(UserError, match="it has no video stream, or its codec is unknown"):
        open_reader(tmp_path / "clip.mp4")


def bad_file(name: str, content: bytes) -> tuple[str, Callable[[Path], object]]:
    return name, lambda path: path.write_bytes(content)


def bad_archive(**arrays: object) -> tuple[str, Callable[[Path], object]]:
    return "clip.npz", lambda path: np.savez(path, **arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        bad_file("empty.mp4", b""),
        bad_file("noise.mp4", bytes(range(256)) * 40),
        bad_file("text.mkv", b"not a video\n" * 1000),
        bad_file("empty.png", b""),
        bad_file("noise.jpg", bytes(range(256)) * 40),
        bad_file("noise.npz", bytes(range(256)) * 40),
        bad_file("pickle.npz", pickle.dumps({"frames": [1]})),
        bad_file("huge.y4m", b"YUV4MPEG2 W60000 H60000 F8:1 C420\nFRAME\n" + bytes(10_000)),
        bad_archive(video=np.zeros((2, 4, 4, 3), np.uint8)),
        bad_archive(frames=np.zeros((2, 4, 4, 3), np.float32)),
        bad_archive(frames=np.zeros((2, 3, 4, 4), np.uint8)),
        bad_archive(frames=np.zeros((0, 4, 4, 3), np.uint8)),
        bad_archive(frames=np.array([{}, None], dtype=object)),
        ("folder", lambda path: path.mkdir()),
    ],
)
def test_unreadable_input(tmp_path: Path, name: str, make: Callable[[Path], object]) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError) as caught:
        open_reader(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["missing.mp4", "http://127.0.0.1:9/clip.mp4", "concat:a.mp4|b.mp4", "x" * 5000, ""])
def test_missing_input(name: str) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        open_reader(name)


def test_a_playlist_cannot_open_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save("secret.mp4", make_clip())
    Path("concat.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    Path("hls.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n")
    for name in ("concat.mp4", "hls.m3u8"):
        with pytest.raises(UserError):
            open_reader(name)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.y4m"])
def test_truncated_video_gives_its_intact_frames(tmp_path: Path, name: str) -> None:
    clip = [np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8) for i in range(12)]
    save(tmp_path / name, clip)
    whole = load(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 3 // 4])
    cut = load(tmp_path / name)
    assert 4 <= len(cut) < 12
    assert_close(cut, whole[: len(cut)], 60.0)


def test_folder_of_images_in_natural_order(tmp_path: Path) -> None:
    clip = make_clip(12)
    for number in (10, 2, 1, 9, 11):
        write_image(tmp_path / f"shot{number}.PNG", clip[number])
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._shot1.png").write_text("not an image")
    frames = load(tmp_path)
    assert [np.array_equal(f, clip[n]) for f, n in zip(frames, (1, 2, 9, 10, 11), strict=True)] == [True] * 5
    write_image(tmp_path / "shot20.png", make_clip(1, 20, 20)[0])
    with pytest.raises(UserError, match=r"shot20\.png"):
        load(tmp_path)


def test_still_image(tmp_path: Path) -> None:
    clip = make_clip(1)
    cv2.imwrite(str(tmp_path / "gray.png"), clip[0][..., 0])
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([clip[0][..., ::-1], clip[0][..., :1]]))
    cv2.imwrite(str(tmp_path / "deep.png"), clip[0][..., ::-1].astype(np.uint16) * 257)
    write_image(tmp_path / "red.jpg", np.full((8, 8, 3), (250, 10, 10), np.uint8))
    assert np.array_equal(load(tmp_path / "gray.png")[0], np.repeat(clip[0][..., :1], 3, axis=2))
    assert np.array_equal(load(tmp_path / "alpha.png")[0], clip[0])
    assert np.allclose(load(tmp_path / "deep.png")[0], clip[0], atol=1)
    with open_reader(tmp_path / "red.jpg") as reader:
        assert (reader.fps, reader.frame_count, reader.height, reader.width) == (None, 1, 8, 8)
        assert np.allclose(next(reader), (250, 10, 10), atol=4)
        assert next(reader, None) is None


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_photo_is_turned_upright(tmp_path: Path, orientation: int, turns: int) -> None:
    photo = make_clip(1)[0]
    write_image(tmp_path / "photo.jpg", photo)
    data = (tmp_path / "photo.jpg").read_bytes()
    tag = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIII", 0x0112, 3, 1, orientation, 0)
    (tmp_path / "photo.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag + data[2:])
    assert_close(load(tmp_path / "photo.jpg"), [np.rot90(photo, turns)], 35.0)


def test_phone_video_is_turned_upright(tmp_path: Path) -> None:
    """The matrix of the track header, [a b u; c d v; x y w], turned clockwise by 90 degrees."""
    clip = make_clip(3)
    save(tmp_path / "clip.mp4", clip)
    data = (tmp_path / "clip.mp4").read_bytes()
    one = (1 << 16).to_bytes(4, "big")
    minus_one = (-1 << 16).to_bytes(4, "big", signed=True)
    zero = bytes(4)
    upright = one + zero * 3 + one + zero * 3
    assert data.count(upright, data.find(b"tkhd")) == 1
    at = data.find(upright, data.find(b"tkhd"))
    (tmp_path / "clip.mp4").write_bytes(data[:at] + zero + one + zero + minus_one + zero * 4 + data[at + 32 :])
    with open_reader(tmp_path / "clip.mp4") as reader:
        assert (reader.height, reader.width) == (64, 48)
        assert_close(list(reader), [np.rot90(frame, -1) for frame in clip], 38.0)


def encode(path: Path, frames: list[Frame], codec: str, pixels: str, milliseconds: list[int]) -> None:
    """A video that this package would not write itself."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        for moment, frame in zip(milliseconds, frames, strict=True):
            picture = av.VideoFrame.from_ndarray(frame).reformat(format=pixels)
            picture.pts, picture.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def test_variable_frame_rate(tmp_path: Path) -> None:
    clip = make_clip(8)
    encode(tmp_path / "clip.mkv", clip, "mjpeg", "yuvj420p", [0, 40, 50, 300, 310, 320, 700, 1000])
    with open_reader(tmp_path / "clip.mkv") as reader:
        assert_close(list(reader), clip, 28.0)
        assert reader.fps is None or 0 < reader.fps <= 1000


def test_size_that_changes_midway(tmp_path: Path) -> None:
    times = list(range(0, 1000, 125))
    encode(tmp_path / "a.ts", make_clip(8), "libx264", "yuv420p", times)
    encode(tmp_path / "b.ts", make_clip(8, 96, 96), "libx264", "yuv420p", [1000 + moment for moment in times])
    (tmp_path / "both.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    frames = load(tmp_path / "both.ts")
    assert len(frames) >= 14 and {frame.shape for frame in frames} == {(48, 64, 3)}


def test_video_without_pictures(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UserError, match="it has no video stream"):
        open_reader(tmp_path / "sound.wav")


def test_closed_reader_gives_no_more(tmp_path: Path) -> None:
    save(tmp_path / "clip.mp4", make_clip())
    with open_reader(tmp_path / "clip.mp4") as reader:
        next(reader)
    assert list(reader) == []


# --- geometry and pictures --------------------------------------------------------------------------------------------

SIZES = [(48, 64), (64, 48), (90, 160), (33, 77), (200, 10), (64, 64)]


@pytest.mark.parametrize("model_size", [(64, 64), (32, 48)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aspect", Aspect)
def test_geometry_sizes(aspect: Aspect, size: tuple[int, int], model_size: tuple[int, int]) -> None:
    geometry = Geometry(size, model_size, aspect)
    for channels in (1, 3):
        frame = np.full((*size, channels), 77, np.uint8)
        inner = geometry.to_model(frame)
        assert inner.shape == (*model_size, channels)
        for output in (geometry.from_model(inner), geometry.input_to_output(frame)):
            assert output.shape == (*geometry.output_size, channels)
            assert (output == 77).all()  # and none of the bars
    height, width = geometry.output_size
    if aspect is Aspect.CROP:
        assert height == size[0] or width == size[1]
        assert abs(width - height * model_size[1] / model_size[0]) <= 1
    else:
        assert geometry.output_size == size


@pytest.mark.parametrize("size", SIZES[:4])
@pytest.mark.parametrize("aspect", Aspect)
def test_old_and_new_frames_match(aspect: Aspect, size: tuple[int, int]) -> None:
    """What comes back from the model shows the scene where the input had it."""
    geometry = Geometry(size, (96, 96), aspect)
    frame = make_clip(1, *size)[0]
    assert psnr(geometry.from_model(geometry.to_model(frame)), geometry.input_to_output(frame)) > 30


@pytest.mark.parametrize("aspect", Aspect)
def test_equal_sizes_change_nothing(aspect: Aspect) -> None:
    frame = make_clip(1)[0]
    geometry = Geometry((48, 64), (48, 64), aspect)
    for change in (geometry.to_model, geometry.from_model, geometry.input_to_output):
        assert np.array_equal(change(frame), frame)


def test_where_the_picture_goes() -> None:
    frame = np.zeros((10, 20, 3), np.uint8)
    frame[:, 5:15] = 200
    assert (Geometry((10, 20), (10, 10), Aspect.CROP).to_model(frame) == 200).all()
    padded = Geometry((10, 20), (20, 20), Aspect.PAD).to_model(np.full_like(frame, 200))
    assert (padded[5:15] == 200).all() and not padded[:5].any() and not padded[15:].any()


def test_channels() -> None:
    red = np.full((2, 3, 3), (255, 0, 0), np.uint8)
    gray = to_channels(red, 1)
    assert gray.shape == (2, 3, 1) and (gray == 76).all()
    assert to_channels(gray[:, :, 0], 1).shape == (2, 3, 1)
    assert (to_channels(gray, 3) == 76).all() and to_channels(gray, 3).shape == (2, 3, 3)
    assert to_channels(red, 3) is red


def test_contact_sheet(tmp_path: Path) -> None:
    clip = make_clip(5, 10, 20)
    sheet = contact_sheet(clip, columns=3, gap=2)
    assert sheet.shape == (22, 64, 3)
    assert np.array_equal(sheet[12:, 22:42], clip[4]) and (sheet[12:, 44:] == 255).all()
    write_image(tmp_path / "sheet.png", sheet)
    assert np.array_equal(load(tmp_path / "sheet.png")[0], sheet)
    with pytest.raises(UsageError, match=r"sheet\.mp4"):
        write_image(tmp_path / "sheet.mp4", sheet)
    with pytest.raises(UserError, match="cannot be written"):
        write_image(tmp_path / "missing" / "sheet.png", sheet)


def test_every_format_is_tried_here() -> None:
    tried = {name.rpartition(".")[2] for name in (*LOSSY, *EXACT)} - {"clip/"} | {"png"}
    assert tried == {kind.value for kind in OutputFormat}
