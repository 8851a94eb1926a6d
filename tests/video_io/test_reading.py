"""Reading what other programs wrote: damaged, hostile and unusual files."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from video_kit import assert_close, load, make_clip, save

from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.video_io import (
    Frame,
    open_reader,
    write_image,
)


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
    alpha = clip[0][..., :1] / 255
    assert np.abs(load(tmp_path / "alpha.png")[0] - (clip[0] * alpha + 255 * (1 - alpha))).max() <= 0.5 + 1e-9
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
    """A video that this package would not write."""
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


def test_closed_reader_gives_no_more_frames(tmp_path: Path) -> None:
    save(tmp_path / "clip.mp4", make_clip())
    with open_reader(tmp_path / "clip.mp4") as reader:
        next(reader)
    assert list(reader) == []
