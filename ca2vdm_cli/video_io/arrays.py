"""Videos as arrays, for Python: whole files in and out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.options import Aspect

from .frames import Frame, Geometry, to_channels
from .reading import open_reader
from .writing import open_writer


class Video(NamedTuple):
    """What ``read_video`` returns."""

    frames: np.ndarray
    """(T, height, width, channels) uint8."""
    fps: Fraction | None
    """Frames per second; None for images, folders and archives."""


def read_video(
    source: str | Path,
    *,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    aspect: Aspect | str = Aspect.STRETCH,
    last: int | None = None,
) -> Video:
    """Read a video, an image, a folder of images or an npz into memory, as ``ca2vdm extend`` reads it.

    Args:
        source: a path, or ``-`` for standard input.
        size: height and width of the returned frames; the source's by default.
        channels: 3 for RGB, 1 for gray.
        aspect: what to do if ``size`` has another aspect ratio: ``stretch``, ``crop``, or ``pad`` with bars.
        last: return only this many frames, the last ones; memory is needed for these alone.

    Raises:
        UsageError: the source does not exist, or an argument is invalid.
        UserError: no frame can be read.
    """
    if channels not in (1, 3):
        raise UsageError(f"channels: {channels!r} must be 1 or 3")
    if aspect not in list(Aspect):
        raise UsageError(f"aspect: {aspect!r} is not one of {', '.join(known.value for known in Aspect)}")
    if last is not None and last < 1:
        raise UsageError(f"last: {last} must be at least one")
    with open_reader(source) as reader:
        geometry = None
        if size is not None:
            if len(size) != 2 or min(size) < 1:
                raise UsageError(f"size: {size!r} must be a height and a width")
            geometry = Geometry((reader.height, reader.width), (size[0], size[1]), Aspect(aspect))
        frames: deque[Frame] = deque(maxlen=last)
        for frame in reader:
            frames.append(to_channels(geometry.to_model(frame) if geometry else frame, channels))
        return Video(np.stack(frames), reader.fps)


def write_video(
    target: str | Path,
    frames: Iterable[np.ndarray],
    fps: Fraction | float,
    *,
    format: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a video, as ``ca2vdm sample`` does.

    Frames may come one at a time, such as those of a generator, so that a long video need not fit in memory:

        chunks = pipeline.sample(frames=600)
        write_video("out.mp4", (frame for chunk in chunks for frame in chunk.frames[0]), fps=30)

    Args:
        target: an mp4, mkv, gif, npz or y4m file, a folder for PNGs (ends in ``/``), or ``-`` for standard output.
        frames: (T, height, width, channels) uint8, or an iterable of frames (height, width, channels); 1 or 3 channels.
        fps: frames per second.
        format: a format, overriding the suffix.
        overwrite: replace an existing output.

    Returns:
        The number of frames.

    Raises:
        UsageError: the target exists already or can't be written in that format, or the frames are not uint8 images.
        UserError: it cannot be written.
    """
    with open_writer(target, format=format, fps=fps, overwrite=overwrite) as writer:
        shape: tuple[int, ...] | None = None
        for frame in frames:
            frame = np.asarray(frame)
            shape = shape or frame.shape
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] not in (1, 3) or frame.shape != shape:
                raise UsageError(
                    f"frames: {frame.dtype} {frame.shape} must be uint8 (height, width, 1 or 3), all of one size"
                )
            writer.write(frame)
        if not writer.frames:
            raise UsageError("frames: there must be at least one")
        return writer.frames
