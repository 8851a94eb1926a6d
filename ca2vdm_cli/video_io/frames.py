"""Single frames: conversion between a file's frames and the model's, images, and errors of the libraries.

A frame is a uint8 array (H, W, 3), RGB. Pixels are assumed to be square.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from ca2vdm_cli.atomic import write_file
from ca2vdm_cli.errors import UsageError, as_user_error
from ca2vdm_cli.options import Aspect

Frame = NDArray[np.uint8]
Size = tuple[int, int]
"""Height and width in pixels."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
READABLE_IMAGE_SUFFIXES = IMAGE_SUFFIXES | {".avif", ".heic", ".heif", ".jfif"}
"""Suffixes of images in a folder of images; ``IMAGE_SUFFIXES`` can be written, too."""
MAX_PIXELS = 2**26
"""Largest frame (67 megapixels), which bounds the memory and time that a small file can take."""
ADVICE = "give a video that FFmpeg plays, images of one size, or an .npz"
BACKGROUND = 255
"""What is seen through transparent pixels: white."""
MAX_RATE = 1000
"""Highest plausible frame rate. If a file claims more, its rate is unknown."""
EXACT_COLOURS = 0x4 | 0x2000 | 0x4000 | 0x40000
"""swscale flags: bicubic, full chroma, exact rounding. The defaults darken a picture by one level per conversion."""


def to_channels(frame: Frame, channels: int) -> Frame:
    """Convert a frame (H, W), (H, W, 1) or (H, W, 3) to (H, W, channels): 1 is luma, 3 is RGB."""
    if frame.dtype != np.uint8 or frame.shape[2:] not in ((), (1,), (3,)) or frame.ndim < 2 or not frame.size:
        raise ValueError(f"a frame is a uint8 array (H, W, 1 or 3), not {frame.dtype} {frame.shape}")
    frame = pixels(frame)
    if frame.shape[2] == channels:
        return frame
    return pixels(cv2.cvtColor(frame, {1: cv2.COLOR_RGB2GRAY, 3: cv2.COLOR_GRAY2RGB}[channels]))


def contact_sheet(frames: Sequence[Frame], columns: int = 8, gap: int = 2) -> Frame:
    """Lay out frames of one size in rows on a white background: one RGB picture of a whole video."""
    pictures = [to_channels(frame, 3) for frame in frames]
    height, width, _ = pictures[0].shape
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = index // columns * (height + gap), index % columns * (width + gap)
        sheet[y : y + height, x : x + width] = picture
    return sheet


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key for file names: 2.png comes before 10.png."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)], name


def write_image(path: str | Path, frame: Frame) -> None:
    """Write a frame as an image; the suffix selects the format. An existing file is replaced as a whole."""
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UsageError(f"{path}: not an image name; end it with one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    with write_errors(str(path)):
        write_file(path, encode_image(path.suffix.lower(), frame))


def encode_image(suffix: str, frame: Frame) -> bytes:
    """The bytes of a frame as an image file with this suffix."""
    picture = cv2.cvtColor(to_channels(frame, 3), cv2.COLOR_RGB2BGR)
    return cv2.imencode(suffix, picture)[1].tobytes()


def resize(frame: Frame, size: Size) -> Frame:
    height, width, channels = frame.shape
    if (height, width) == size:
        return frame
    kernel = cv2.INTER_AREA if size[0] * size[1] < height * width else cv2.INTER_CUBIC
    return pixels(cv2.resize(frame, size[::-1], interpolation=kernel)).reshape(*size, channels)


def pixels(array: Any) -> Frame:
    """An array of OpenCV or PyAV as a frame (H, W, C): typed for mypy, with the channel axis that OpenCV drops."""
    frame: Frame = np.ascontiguousarray(array, np.uint8)
    return frame[:, :, None] if frame.ndim == 2 else frame


def composite(rgba: NDArray[np.uint8]) -> Frame:
    """A picture (H, W, 4) with straight alpha on a background of ``BACKGROUND``: (H, W, 3)."""
    alpha = rgba[:, :, 3:]
    if alpha.min() == 255:
        return pixels(rgba[:, :, :3])
    weight = alpha.astype(np.uint16)
    return pixels((rgba[:, :, :3] * weight + BACKGROUND * (255 - weight) + 127) // 255)


def upright(frame: Frame, orientation: int) -> Frame:
    """A frame as it is meant to be seen, given its EXIF orientation: 1 (as stored) to 8."""
    if 5 <= orientation <= 8:
        frame = frame.transpose(1, 0, 2)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels(frame[:: -1 if rows else 1, :: -1 if columns else 1])


def too_large(height: int, width: int) -> str:
    """Why a frame with more than ``MAX_PIXELS`` is refused."""
    return f"frames of {width}x{height} are too large; at most {MAX_PIXELS // 10**6} megapixels"


@dataclass(frozen=True)
class Geometry:
    """Conversion between an input's frame size and a model's.

    ``extend`` writes ``input_to_output(frame)`` for frames of its input and ``from_model(frame)`` for new ones; both
    have ``output_size`` and show the same part of the scene.
    """

    input_size: Size
    model_size: Size
    aspect: Aspect = Aspect.CROP

    @property
    def output_size(self) -> Size:
        """Size of the output's frames: the input's, or with ``crop`` the size of the kept region."""
        return self._region(self.input_size, self.model_size) if self.aspect is Aspect.CROP else self.input_size

    def to_model(self, frame: Frame) -> Frame:
        """Convert a frame of ``input_size`` to ``model_size``."""
        if self.aspect is not Aspect.PAD:
            return resize(self.input_to_output(frame), self.model_size)
        inner = self._region(self.model_size, self.input_size)
        padded = np.zeros((*self.model_size, frame.shape[2]), np.uint8)
        padded[self._window(self.model_size, inner)] = resize(frame, inner)
        return padded

    def from_model(self, frame: Frame) -> Frame:
        """Convert a frame of ``model_size`` to ``output_size``."""
        if self.aspect is Aspect.PAD:
            frame = frame[self._window(self.model_size, self._region(self.model_size, self.input_size))]
        return resize(frame, self.output_size)

    def input_to_output(self, frame: Frame) -> Frame:
        """The part of a frame of ``input_size`` that the output shows."""
        return np.ascontiguousarray(frame[self._window(self.input_size, self.output_size)])

    @staticmethod
    def _region(outer: Size, shape: Size) -> Size:
        """The largest size within ``outer`` that has the aspect ratio of ``shape``."""
        scale = min(Fraction(outer[0], shape[0]), Fraction(outer[1], shape[1]))
        return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))

    @staticmethod
    def _window(outer: Size, inner: Size) -> tuple[slice, slice]:
        """Index of the centred window of size ``inner``."""
        top, left = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
        return slice(top, top + inner[0]), slice(left, left + inner[1])


_LIBRARY_ERRORS = (av.FFmpegError, cv2.error, OSError, ValueError, OverflowError, MemoryError)


def read_errors(name: str, advice: str = "") -> AbstractContextManager[None]:
    """Turn the libraries' errors in reading a file into a one-line ``UserError``."""
    return as_user_error(f"{name}: cannot be read", advice, _LIBRARY_ERRORS)


def write_errors(name: str) -> AbstractContextManager[None]:
    """Turn the libraries' errors in writing a file into a one-line ``UserError``."""
    return as_user_error(f"{name}: cannot be written", "check permissions, free space and frame size", _LIBRARY_ERRORS)
