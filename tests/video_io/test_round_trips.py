"""What is written can be read again: exactly, or nearly."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_kit import EXACT, LOSSY, NTSC, assert_close, load, make_clip, save

from ca2vdm_cli.video_io import (
    OutputFormat,
    open_reader,
    to_channels,
)


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
    """H.264 repeats the last row and column; the other formats keep the size."""
    clip = make_clip(4, 47, 63)
    save(tmp_path / name, clip)
    if name in ("clip.mp4", "clip.mkv"):
        clip = [np.pad(frame, ((0, 1), (0, 1), (0, 0)), mode="edge") for frame in clip]
    assert_close(load(tmp_path / name), clip, LOSSY[name])


def test_repeated_conversion_keeps_the_brightness(tmp_path: Path) -> None:
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


def test_format_overrides_the_suffix(tmp_path: Path) -> None:
    save(tmp_path / "clip.bin", make_clip(), format="y4m")
    assert (tmp_path / "clip.bin").read_bytes().startswith(b"YUV4MPEG2")
    save(tmp_path / "frames", make_clip(2), format="png")
    assert sorted(os.listdir(tmp_path / "frames")) == ["frame_000000.png", "frame_000001.png"]


def test_every_format_is_tested() -> None:
    tried = {name.rpartition(".")[2] for name in (*LOSSY, *EXACT)} - {"clip/"} | {"png"}
    assert tried == {kind.value for kind in OutputFormat}
