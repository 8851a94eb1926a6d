"""Videos that are damaged, unusual, or claim what is not so: right frames at the right rate, or one clear line."""

from __future__ import annotations

import random
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from video_kit import assert_close, child, load, make_clip, save

from ca2vdm_cli.errors import UserError
from ca2vdm_cli.video_io import Frame, open_reader


def encode(path: Path, frames: list[np.ndarray], codec: str, pixels: str, **options: Any) -> None:
    """A video that this package would not write; options of the encoder, and: rate, claimed rate, container."""
    rate, claimed = options.pop("rate", 30), options.pop("claimed", None)
    with av.open(str(path), "w", format=options.pop("container", None)) as container:
        stream = container.add_stream(codec, rate=claimed or rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        tick = Fraction(1, 1000) if claimed else 1 / Fraction(rate)
        stream.codec_context.time_base = tick
        for index, frame in enumerate(frames):
            format = {3: "rgb24", 4: "rgba"}[frame.shape[2]]
            picture = av.VideoFrame.from_ndarray(frame, format=format).reformat(format=pixels)
            picture.pts, picture.time_base = round(index / (rate * tick)), tick
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


# --- rates: what is decoded counts more than what the container claims ------------------------------------------------


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4", "clip.flv", "clip.avi"])
def test_a_wrong_claim_about_the_rate(tmp_path: Path, name: str) -> None:
    """The container claims 8 frames per second, or 1000; the timestamps say 30."""
    codec = {"clip.flv": "flv", "clip.avi": "mpeg4"}.get(name, "libx264")
    encode(tmp_path / name, make_clip(40), codec, "yuv420p", rate=30, claimed=8)
    with open_reader(tmp_path / name) as reader:
        assert reader.fps == 30
        assert len(list(reader)) == 40 and reader.damage == ""


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24), Fraction(25, 2)])
@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4", "clip.ts", "clip.webm"])
def test_nominal_rates_stay_exact(tmp_path: Path, name: str, rate: Fraction) -> None:
    codec = "libvpx" if name == "clip.webm" else "libx264"
    encode(tmp_path / name, make_clip(20), codec, "yuv420p", rate=rate)
    with open_reader(tmp_path / name) as reader:
        assert reader.fps is not None and abs(reader.fps / rate - 1) < 0.001


def test_the_rate_of_raw_h264_is_that_of_its_bitstream(tmp_path: Path) -> None:
    encode(tmp_path / "clip.h264", make_clip(12), "libx264", "yuv420p", rate=30)
    with open_reader(tmp_path / "clip.h264") as reader:
        assert reader.fps == 30 and len(list(reader)) == 12


def test_a_lossless_cut_with_an_edit_list(tmp_path: Path) -> None:
    clip = make_clip(40)
    encode(tmp_path / "clip.mp4", clip, "libx264", "yuv420p", rate=30, g="100", bf="0")
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    at = data.index(b"elst") + 12  # after version, flags and number of entries: duration, start
    with av.open(str(tmp_path / "clip.mp4")) as container:
        tick = container.streams.video[0].time_base
        assert tick is not None
        start = round(20 / (30 * tick))
    struct.pack_into(">Ii", data, at, 667, start)
    (tmp_path / "clip.mp4").write_bytes(data)
    with open_reader(tmp_path / "clip.mp4") as reader:
        assert reader.fps == 30 and reader.frame_count == 20
        assert_close(list(reader), clip[20:], 30.0)
        assert reader.damage == ""


@pytest.mark.parametrize("name", ["still.gif", "still.mp4", "still.avif", "still.mkv"])
def test_one_frame_has_no_rate(tmp_path: Path, name: str) -> None:
    if name == "still.avif":
        Image.fromarray(make_clip(1)[0]).save(tmp_path / name)
    else:
        save(tmp_path / name, make_clip(1))
    with open_reader(tmp_path / name) as reader:
        assert reader.fps is None and len(list(reader)) == 1


# --- pictures: orientation, transparency, depth, size -----------------------------------------------------------------

ONE, MINUS = 1 << 16, -1 << 16
MATRICES: dict[str, tuple[tuple[int, int, int, int], Callable[[Any], Any]]] = {
    "mirrored": ((MINUS, 0, 0, ONE), lambda frame: frame[:, ::-1]),
    "upside down": ((MINUS, 0, 0, MINUS), lambda frame: frame[::-1, ::-1]),
    "flipped": ((ONE, 0, 0, MINUS), lambda frame: frame[::-1]),
    "transposed": ((0, ONE, ONE, 0), lambda frame: frame.transpose(1, 0, 2)),
    "turned right": ((0, ONE, MINUS, 0), lambda frame: np.rot90(frame, -1)),
    "transversed": ((0, MINUS, MINUS, 0), lambda frame: frame[::-1, ::-1].transpose(1, 0, 2)),
    "turned left": ((0, MINUS, ONE, 0), lambda frame: np.rot90(frame, 1)),
}


@pytest.mark.parametrize("how", MATRICES)
def test_the_display_matrix_of_a_phone(tmp_path: Path, how: str) -> None:
    """The matrix of the track header, [a b u; c d v; x y w]: the pixel (p, q) is shown at (a p + c q, b p + d q)."""
    (a, b, c, d), shown = MATRICES[how]
    clip = make_clip(3)
    save(tmp_path / "clip.mp4", clip)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    at = data.index(struct.pack(">4i", ONE, 0, 0, 0), data.index(b"tkhd"))
    struct.pack_into(">iiiii", data, at, a, b, 0, c, d)
    (tmp_path / "clip.mp4").write_bytes(data)
    assert_close(load(tmp_path / "clip.mp4"), [shown(frame) for frame in clip], 38.0)


def transparent_clip() -> tuple[list[np.ndarray], list[Frame]]:
    """RGBA frames whose left half is transparent with a hidden green, and what they show."""
    clip = make_clip(4)
    hidden = [np.dstack([frame, np.full(frame.shape[:2], 255, np.uint8)]) for frame in clip]
    for frame, shown in zip(hidden, clip, strict=True):
        frame[:, :32] = (0, 255, 0, 0)
        shown[:, :32] = 255
    return hidden, clip


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "decibels"),
    [
        ("clip.mov", "qtrle", "argb", 60.0),
        ("clip.mov", "png", "rgba", 60.0),
        ("clip.mkv", "ffv1", "bgra", 60.0),
        ("clip.mov", "prores_ks", "yuva444p10le", 30.0),
        ("clip.webm", "libvpx-vp9", "yuva420p", 22.0),
    ],
)
def test_transparent_video_shows_white(tmp_path: Path, name: str, codec: str, pixels: str, decibels: float) -> None:
    hidden, shown = transparent_clip()
    encode(tmp_path / name, hidden, codec, pixels)
    frames = load(tmp_path / name)
    assert_close(frames, shown, decibels)
    assert min(int(frame[:, :28].min()) for frame in frames) > 240


@pytest.mark.parametrize(("codec", "pixels"), [("libx265", "yuv420p10le"), ("libx264", "gray"), ("ffv1", "gray16le")])
def test_ten_bits_and_gray(tmp_path: Path, codec: str, pixels: str) -> None:
    clip = make_clip(4)
    if pixels.startswith("gray"):
        clip = [np.repeat(frame[:, :, :1], 3, axis=2) for frame in clip]
    options = {"libx265": {"x265-params": "log-level=none", "crf": "10"}, "libx264": {"color_range": "pc"}, "ffv1": {}}
    encode(tmp_path / "clip.mkv", clip, codec, pixels, **options[codec])
    assert_close(load(tmp_path / "clip.mkv"), clip, 30.0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (9, 8000)])
def test_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    clip = [np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8) for i in range(3)]
    encode(tmp_path / "clip.mkv", clip, "ffv1", "bgr0")
    assert_close(load(tmp_path / "clip.mkv"), clip, 99.0)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_frames_are_counted_and_named(tmp_path: Path) -> None:
    noise = [np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8) for i in range(30)]
    encode(tmp_path / "clip.mp4", noise, "libx264", "yuv420p", g="10", bf="0")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        packet = [packet for packet in container.demux() if packet.size][17]
        place, size = packet.pos, packet.size
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    assert place is not None
    data[place + size // 3 : place + size * 2 // 3] = bytes(size * 2 // 3 - size // 3)
    (tmp_path / "clip.mp4").write_bytes(data)
    with open_reader(tmp_path / "clip.mp4") as reader:
        assert len(list(reader)) == 30
        assert reader.intact == 17 and reader.damage == "1 of 30 frames are damaged, first frame 18"
    data[place : place + 4] = b"\xff\xff\xff\xff"  # the whole picture is lost
    (tmp_path / "clip.mp4").write_bytes(data)
    with open_reader(tmp_path / "clip.mp4") as reader:
        assert len(list(reader)) == 29 and reader.intact is not None and 15 <= reader.intact <= 17
        assert "29 of 30 frames could be read" in reader.damage


def test_a_pipe_that_ends_early(tmp_path: Path) -> None:
    save(tmp_path / "clip.mkv", make_clip(20))
    data = (tmp_path / "clip.mkv").read_bytes()
    with child("print(len(list(open_reader('-'))))", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        out, _ = reader.communicate(data[: len(data) * 2 // 3])
    assert reader.returncode == 0 and 5 < int(out) < 20


KINDS: dict[str, Callable[[Path], object]] = {
    "clip.mp4": lambda path: save(path, make_clip(5)),
    "clip.mkv": lambda path: save(path, make_clip(5)),
    "clip.gif": lambda path: save(path, make_clip(5)),
    "clip.y4m": lambda path: save(path, make_clip(5)),
    "clip.npz": lambda path: save(path, make_clip(5)),
    "clip.ts": lambda path: encode(path, make_clip(5), "mpeg2video", "yuv420p"),
    "clip.avi": lambda path: encode(path, make_clip(5), "mpeg4", "yuv420p"),
    "clip.flv": lambda path: encode(path, make_clip(5), "flv", "yuv420p"),
    "clip.webm": lambda path: encode(path, transparent_clip()[0], "libvpx-vp9", "yuva420p"),
    "clip.png": lambda path: Image.fromarray(make_clip(1)[0]).save(path),
    "clip.jpg": lambda path: Image.fromarray(make_clip(1)[0]).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    "clip.bmp": lambda path: Image.fromarray(make_clip(1)[0]).save(path),
    "clip.tif": lambda path: Image.fromarray(make_clip(1)[0]).save(path, compression="tiff_lzw"),
    "clip.avif": lambda path: Image.fromarray(make_clip(1)[0]).save(path),
    "clip.webp": lambda path: animate(path),
    "clip.heic": lambda path: path.write_bytes(Path(__file__).with_name("tiled.heic").read_bytes()),
}


def animate(path: Path) -> None:
    first, *rest = map(Image.fromarray, make_clip(4))
    first.save(path, save_all=True, append_images=rest, duration=100)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Check that an error about a file is one line."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith(f"{path}: ") or "\n" in str(error):
            pytest.fail(f"not one line about {path}: {error}")
        raise


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_end_in_frames_or_one_line(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Twenty variants of each kind: cut off, or with some bytes changed."""
    path, draw = tmp_path / name, random.Random(name)
    KINDS[name](path)
    whole = path.read_bytes()
    assert load(path)
    for variant in range(20):
        data = bytearray(whole[: draw.randrange(len(whole))] if variant % 2 else whole)
        for _ in range(draw.randrange(1, 8) if variant % 4 != 1 and data else 0):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        with suppress(UserError), one_line(path), open_reader(path) as reader:
            assert all(frame.shape == (reader.height, reader.width, 3) for frame in reader)
            assert "\n" not in reader.damage
    assert capfd.readouterr().err == ""


# --- bounds -----------------------------------------------------------------------------------------------------------


def archive(path: Path, shape: tuple[int, ...], size: int | None = None) -> None:
    """A compressed ``.npz`` of zeros with this shape, or of this many bytes with this header."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("frames.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        left = int(np.prod(shape)) if size is None else size
        while left > 0:
            member.write(bytes(min(left, 1 << 20)))
            left -= 1 << 20


PEAK = """
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_reader(PATH) as reader:
    count = sum(1 for _ in reader)
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def frames_and_mebibytes(path: Path) -> tuple[int, int]:
    code = PEAK.replace("PATH", repr(str(path)))
    with child(code, stdout=subprocess.PIPE) as reader:
        out, _ = reader.communicate()
    frames, mebibytes = out.split()
    return int(frames), int(mebibytes)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    archive(tmp_path / "bomb.npz", (60, 1000, 1000, 3))  # 180 MB in 200 kB
    assert (tmp_path / "bomb.npz").stat().st_size < 2**20
    frames, mebibytes = frames_and_mebibytes(tmp_path / "bomb.npz")
    assert frames == 60 and mebibytes < 60
    encode(tmp_path / "long.mkv", [np.full((96, 128, 3), 9, np.uint8)] * 1500, "mpeg4", "yuv420p")
    frames, mebibytes = frames_and_mebibytes(tmp_path / "long.mkv")
    assert frames == 1500 and mebibytes < 40  # 55 MB of frames


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((3 * 10**9, 1, 1, 3), 100, "frames has 3000000000 frames; at most 1000000"),
        ((1, 16384, 8191, 3), 100, "frames of 8191x16384 are too large"),
        ((100, 8, 8, 3), 8 * 8 * 3, r"frames is \(100, 8, 8, 3\), but the file ends before"),
    ],
)
def test_archives_that_claim_too_much(tmp_path: Path, shape: tuple[int, ...], size: int, message: str) -> None:
    archive(tmp_path / "bomb.npz", shape, size)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "bomb.npz")


def test_an_archive_in_fortran_order_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "clip.npz", frames=np.asfortranarray(np.stack(make_clip(3))))
    with pytest.raises(UserError, match=r"frames is in Fortran order; save np\.ascontiguousarray\(frames\)"):
        load(tmp_path / "clip.npz")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_archives_of_numpy(tmp_path: Path, compressed: bool, channels: tuple[int, ...]) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 6, 7, *channels), np.uint8)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "clip.npz", other=np.zeros(3), frames=frames)
    read = np.stack(load(tmp_path / "clip.npz"))
    assert np.array_equal(read, np.broadcast_to(frames if channels else frames[..., None], (5, 6, 7, 3)))
