"""Images and animations: orientation, transparency, truncation, size."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_kit import assert_close, child, load, make_clip

from ca2vdm_cli.errors import UserError
from ca2vdm_cli.video_io import open_reader
from ca2vdm_cli.video_io import stills as stills_module

FORMATS = ["png", "jpg", "webp", "tif", "avif"]
SHOWN: dict[int, Callable[[Any], Any]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}
"""How a stored picture is shown, by its EXIF orientation."""


def picture(height: int = 48, width: int = 64) -> Any:
    return make_clip(1, height, width)[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / f"photo.{suffix}", exif=exif, quality=95)
    expected = SHOWN[orientation](picture())
    with open_reader(tmp_path / f"photo.{suffix}") as reader:
        assert (reader.height, reader.width, reader.fps, reader.frame_count) == (*expected.shape[:2], None, 1)
        assert_close(list(reader), [expected], 30.0)


def test_damaged_metadata_does_not_matter(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "photo.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=95)
    assert_close(load(tmp_path / "photo.jpg"), [picture()], 35.0)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", *FORMATS[2:]])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(noise).save(path)
    assert len(load(path)) == 1
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=r"photo\.\w+: cannot be read \(") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparent_pixels_show_white(tmp_path: Path, mode: str, suffix: str) -> None:
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :, 0] = 200  # a red that is hidden where alpha is 0
    rgba[:, 2:4, 3], rgba[:, 4:, 3] = 128, 255
    image = Image.fromarray(rgba)
    if mode == "P":
        image = Image.new("P", (6, 4))
        image.putpalette([200, 0, 0, 0, 0, 0])
        image.info["transparency"] = 0
        expected = np.full((4, 6, 3), 255, np.uint8)
    else:
        image = image.convert(mode)
        opaque = np.asarray(Image.fromarray(rgba[:, :, :3]).convert("L" if mode == "LA" else "RGB").convert("RGB"))
        weight = rgba[:, :, 3:] / 255
        expected = (opaque * weight + 255 * (1 - weight)).round().astype(np.uint8)
    if suffix == "tif" and mode == "P":
        pytest.skip("a TIFF has no transparent colour")
    options: dict[str, Any] = {"lossless": True, "exact": True} if suffix == "webp" else {}
    image.save(tmp_path / f"photo.{suffix}", **options)
    assert np.abs(load(tmp_path / f"photo.{suffix}")[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_gray(tmp_path: Path, suffix: str, dtype: type[np.unsignedinteger[Any]]) -> None:
    gray = picture()[:, :, 0]
    Image.fromarray(gray.astype(dtype) * (257 if dtype is np.uint16 else 1)).save(tmp_path / f"photo.{suffix}")
    assert np.array_equal(load(tmp_path / f"photo.{suffix}")[0], np.repeat(gray[:, :, None], 3, axis=2))


@pytest.mark.parametrize(("suffix", "milliseconds", "fps"), [("webp", 125, 8), ("png", 40, 25), ("webp", 91, 11)])
def test_an_animation_is_played(tmp_path: Path, suffix: str, milliseconds: int, fps: int) -> None:
    clip = make_clip(6)
    first, *rest = map(Image.fromarray, clip)
    path = tmp_path / f"clip.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, **options)
    with open_reader(path) as reader:
        assert reader.fps == fps and reader.frame_count == 6
        assert_close(list(reader), clip, 60.0)
        assert reader.damage == ""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    if suffix == "webp":  # libwebp refuses a truncated file as a whole
        with pytest.raises(UserError, match="cannot be read"):
            load(path)
        return
    with open_reader(path) as reader:
        frames = list(reader)
        assert 0 < len(frames) < 6 and reader.damage == f"{len(frames)} of 6 frames could be read"


def test_the_pages_of_a_tiff_are_frames_without_a_rate(tmp_path: Path) -> None:
    clip = make_clip(3)
    first, *rest = map(Image.fromarray, clip)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=rest)
    with open_reader(tmp_path / "stack.tif") as reader:
        assert reader.fps is None
        assert_close(list(reader), clip, 99.0)


def test_a_heic_of_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(Path(__file__).with_name("tiled.heic"), tmp_path / "photo.heic")
    monkeypatch.setattr(stills_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"an image of 4 tiles; pip install 'ca2vdm\[heic\]', or convert it"):
        load(tmp_path / "photo.heic")
    monkeypatch.undo()
    pytest.importorskip("pillow_heif")
    (frame,) = load(tmp_path / "photo.heic")
    assert frame.shape == (512, 512, 3)
    colours = [frame[y, x].round(-1).tolist() for y in (100, 400) for x in (100, 400)]
    assert colours == [[220, 30, 30], [30, 200, 30], [240, 240, 30], [40, 40, 200]]


def test_a_stream_of_jpegs_is_a_video(tmp_path: Path) -> None:
    clip = make_clip(5)
    data = io.BytesIO()
    for frame in clip:
        Image.fromarray(frame).save(data, "JPEG", quality=95)
    (tmp_path / "clip.jpg").write_bytes(data.getvalue())
    with open_reader(tmp_path / "clip.jpg") as reader:
        assert reader.fps is None  # it has no timestamps
        assert_close(list(reader), clip, 30.0)


def test_an_image_that_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 16384, 8191, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    (tmp_path / "bomb.png").write_bytes(data + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="frames of 16384x8191 are too large; at most 67 megapixels"):
        load(tmp_path / "bomb.png")


def test_an_animation_in_a_folder_of_images_is_refused(tmp_path: Path) -> None:
    first, *rest = map(Image.fromarray, make_clip(3))
    first.save(tmp_path / "1.png")
    first.save(tmp_path / "2.webp", save_all=True, append_images=rest, duration=100)
    with pytest.raises(UserError, match=r"2\.webp: an animation or video, not an image"):
        load(tmp_path)


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_an_image_through_a_pipe(tmp_path: Path, share: float) -> None:
    data = io.BytesIO()
    Image.fromarray(picture()).save(data, "JPEG", quality=95)
    code = "r = open_reader('-'); print(r.fps, r.frame_count, len(list(r)))"
    with child(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        out, errors = reader.communicate(data.getvalue()[: int(len(data.getvalue()) * share)])
    if share == 1:
        assert (out, errors) == (b"None 1 1\n", b"")
    else:
        assert errors.splitlines()[-1].startswith(b"ca2vdm_cli.errors.UserError: standard input: cannot be read (image")
