"""Images and the animations made of them, read with Pillow: PNG, JPEG, WebP, TIFF, BMP, AVIF, and HEIC if pillow-heif
is installed (the extra ``heic``).

A damaged or truncated image is refused; a damaged animation ends before the damage. Transparent pixels show a white
background, and the EXIF orientation is applied.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from importlib.util import find_spec
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .frames import ADVICE, MAX_PIXELS, MAX_RATE, Frame, composite, pixels, read_errors, too_large, upright
from .source import Damage, Source

HEAD = 64
"""How many bytes ``find_format`` needs."""
TIMED_FRAMES = 32
"""How many frames of an animation are inspected for its frame rate."""
SEARCHED = 64 * 2**20
"""How many bytes of a JPEG are searched for the beginning of another."""
_ORIENTATION = 0x0112
"""The EXIF tag."""


def find_format(head: bytes) -> str | None:
    """Pillow's name for the format of an image, given its first bytes; None if FFmpeg should read it."""
    signatures = {
        b"\x89PNG\r\n\x1a\n": "PNG",
        b"\xff\xd8\xff": "JPEG",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"BM": "BMP",
    }
    for signature, format in signatures.items():
        if head.startswith(signature):
            return format
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = {head[at : at + 4] for at in range(8, len(head) - 3, 4)}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"mif1") and find_spec("pillow_heif"):
            return "HEIF"  # without pillow-heif, FFmpeg reads those that have no tiles
    return None


def is_motion_jpeg(file: BinaryIO) -> bool:
    """Whether a file that begins as a JPEG is a stream of them, which FFmpeg reads. Its position stays the same."""
    start = file.tell()
    data = file.read(SEARCHED)
    file.seek(start)
    return b"\xff\xd9\xff\xd8\xff" in data and b"MPF\0" not in data[: 2**16]  # those in one photo are versions of it


def open_image(name: str, file: BinaryIO, format: str, stack: ExitStack) -> Source:
    """Open an image or animation.

    Args:
        name: its name in messages.
        file: the file, whose position is at the image's beginning.
        format: what ``find_format`` found.
        stack: closes the file.

    Raises:
        ValueError: it is damaged, or too large.
    """
    with _pillow_errors():
        if format == "HEIF":
            import pillow_heif

            pillow_heif.register_heif_opener()
        image = Image.open(file, formats=[format])
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(too_large(image.height, image.width))
        # further pictures in a photo are previews and depths
        count = 1 if format in ("JPEG", "HEIF") else getattr(image, "n_frames", 1)
        fps = _rate(image, count) if count > 1 else None
    damage = Damage()
    return Source(_read(name, image, count, damage, stack.pop_all()), count, fps, damage)


def _read(name: str, image: Image.Image, count: int, damage: Damage, stack: ExitStack) -> Generator[Frame, None, None]:
    with stack, image, read_errors(name, ADVICE):
        for index in range(count):
            try:
                yield _frame(image, index)
            except ValueError:
                if not index:
                    raise
                damage.stopped, damage.intact = True, index
                return


def _frame(image: Image.Image, index: int) -> Frame:
    with _pillow_errors():
        if index or image.tell():
            image.seek(index)
        if image.width * image.height > MAX_PIXELS:  # the pages of a TIFF differ
            raise ValueError(too_large(image.height, image.width))
        with _quiet_libtiff(image.format):
            image.load()
        return upright(_to_rgb(image), _orientation(image))


def _to_rgb(image: Image.Image) -> Frame:
    if image.mode.startswith("I;16"):
        return pixels(np.repeat(np.asarray(image)[:, :, None] >> 8, 3, axis=2))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        return composite(np.asarray(image.convert("RGBA")))
    return pixels(np.asarray(image.convert("RGB")))


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # damaged metadata; Pillow does not document what it raises
        orientation = image.getexif().get(_ORIENTATION, 1)
        return orientation if orientation in range(1, 9) else 1
    return 1


def _rate(image: Image.Image, count: int) -> Fraction | None:
    """Frames per second, the average over the first frames; None if they have no duration, as the pages of a TIFF."""
    milliseconds = []
    for index in range(min(count, TIMED_FRAMES)):
        try:
            image.seek(index)
            image.load()
        except Exception:  # damaged; reading will find out
            break
        milliseconds.append(Fraction(image.info.get("duration", 0)))
    total = sum(milliseconds)
    if not total or len(milliseconds) < 2:
        return None
    rate = (1000 * len(milliseconds) / total).limit_denominator(1001)
    whole = max(1, round(rate))
    if abs(total - Fraction(1000 * len(milliseconds), whole)) <= len(milliseconds) / 2:
        rate = Fraction(whole)  # durations are rounded to milliseconds
    return rate if 0 < rate <= MAX_RATE else None


@contextmanager
def _quiet_libtiff(format: str | None) -> Iterator[None]:
    """Discard what libtiff prints to standard error about a damaged file; Pillow raises an error anyway."""
    if format != "TIFF":
        yield
        return
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


@contextmanager
def _pillow_errors() -> Iterator[None]:
    """Turn whatever Pillow raises for a damaged file, which it does not document, into a ValueError; hide warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ValueError("its header is damaged or of an unknown kind") from None
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
