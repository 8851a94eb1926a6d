"""Reading videos, images, folders of images and archives one frame at a time."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from ca2vdm_cli.errors import UsageError, UserError

from . import ffmpeg, stills
from .archive import open_archive
from .frames import ADVICE, READABLE_IMAGE_SUFFIXES, Frame, natural_order, read_errors, resize
from .pipe import Pipe
from .source import Source

STDIN = "standard input"
MAX_PIPED_IMAGE = 256 * 2**20
"""Largest image in bytes that is read from a pipe, which must be held in memory."""


class VideoReader:
    """Iterates over the frames of a video, image, folder or archive once, in order: uint8 RGB (height, width, 3).

    Created by ``open_reader``. The first two frames are decoded at once, so a reader has at least one frame. A damaged
    or truncated video gives the frames that can be decoded, and ``damage`` says what is wrong; a damaged image is
    refused. Each frame is returned once, even if the frame rate varies. If the frame size changes midway, frames are
    resized to the size of the first. Transparent pixels show a white background.

    Attributes:
        name: the source's name in messages.
        fps: frames per second (the average, if it varies); None for folders, archives, and a single frame.
        frame_count: how many frames the file claims to have; None if it does not say.
        height, width: size in pixels, with the rotation and mirroring that the file asks for applied.
    """

    def __init__(self, name: str, source: Source) -> None:
        first = list(islice(source.frames, 2))
        if not first:
            pipe = " (a pipe cannot carry a file with its index at the end, such as many mp4s)" if name == STDIN else ""
            raise UserError(f"{name}: no frame could be decoded; give a complete video or image{pipe}")
        self.name, self.frame_count = name, source.count
        self.fps = source.fps if len(first) > 1 else None
        self.height, self.width = first[0].shape[:2]
        self._source, self._frames, self._read = source, chain(first, source.frames), 0

    @property
    def damage(self) -> str:
        """What is wrong with the frames read so far, such as "3 of 60 frames are damaged"; empty if nothing is."""
        return self._source.damage.describe(self._read, self.frame_count)

    @property
    def intact(self) -> int | None:
        """Number of frames before the first damage; None if none has been found so far."""
        return self._source.damage.intact

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        frame = next(self._frames)
        self._read += 1
        return resize(frame, (self.height, self.width))

    def close(self) -> None:
        """Close the file; no frames follow."""
        self._frames = chain()
        self._source.frames.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_reader(source: str | Path) -> VideoReader:
    """Open a video.

    Args:
        source: any video that FFmpeg can read, an image or animation, a folder of images (in natural order), an
            ``.npz`` with an array ``frames`` (uint8; T, H, W[, 1 or 3]), or ``-`` for a video or image on standard
            input, which may be a pipe.

    Raises:
        UsageError: there is no such file or folder.
        UserError: no frame could be decoded, or an image is damaged.
    """
    name, path = str(source), Path(source)
    if name == "-":
        if sys.stdin.isatty():
            raise UsageError("standard input is a terminal; pipe a video into it, or name a file")
        return _open_file(STDIN, None)
    if not os.path.exists(name):  # raises nothing, unlike Path.exists
        raise UsageError(f"{name}: no such file or folder; name a local video, image or folder, or - for a pipe")
    with read_errors(name, ADVICE):
        if path.is_dir():
            return _open_folder(name, path)
        if path.suffix.lower() == ".npz":
            return VideoReader(name, open_archive(name, path))
        return _open_file(name, path)


def _open_folder(name: str, folder: Path) -> VideoReader:
    images = [path for path in folder.iterdir() if path.suffix.lower() in READABLE_IMAGE_SUFFIXES]
    images = [path for path in images if path.name[0] != "."]
    if not images:
        raise UserError(f"{name}: no images in this folder; it needs files such as frame_000000.png")
    images.sort(key=lambda image: natural_order(image.name))
    return VideoReader(name, Source(_read_images(images), len(images)))


def _read_images(paths: list[Path]) -> Generator[Frame, None, None]:
    first: Frame | None = None
    for path in paths:
        frame = read_image(path)
        first = frame if first is None else first
        if frame.shape != first.shape:
            sizes = f"{frame.shape[1]}x{frame.shape[0]}, unlike {paths[0].name}, {first.shape[1]}x{first.shape[0]}"
            raise UserError(f"{path}: {sizes}; a folder needs images of one size")
        yield frame


def read_image(path: Path) -> Frame:
    """One image of a folder of them; raises UserError if it is damaged or an animation."""
    with _open_file(str(path), path) as reader:
        frame = next(reader)
        if next(reader, None) is not None:
            raise UserError(f"{path}: an animation or video, not an image; in a folder of images, each is one frame")
    return frame


def _open_file(name: str, path: Path | None) -> VideoReader:
    """Open a video or image in a file or, without a path, on standard input."""
    with ExitStack() as stack, read_errors(name, ADVICE):
        file: BinaryIO = stack.enter_context(path.open("rb")) if path else sys.stdin.buffer
        source = _open_seekable(name, file, stack) if file.seekable() else _open_pipe(name, Pipe(file), stack)
    return VideoReader(name, source)


def is_image(path: Path) -> bool:
    """Whether a file is an image or an animation of images, which can't be seeked in; raises OSError."""
    with path.open("rb") as file:
        return _image_format(file) is not None


def _image_format(file: BinaryIO) -> str | None:
    """Pillow's name for the format of an image; None for a video. The file's position stays the same."""
    start = file.tell()
    format = stills.find_format(file.read(stills.HEAD))
    file.seek(start)
    return None if format == "JPEG" and stills.is_motion_jpeg(file) else format


def _open_seekable(name: str, file: BinaryIO, stack: ExitStack) -> Source:
    if not file.read(1):
        raise ValueError("it is empty")
    file.seek(-1, os.SEEK_CUR)
    format = _image_format(file)
    if format is None:
        return ffmpeg.open_video(name, file, stack)
    return stills.open_image(name, file, format, stack)


def _open_pipe(name: str, pipe: Pipe, stack: ExitStack) -> Source:
    head = pipe.peek(stills.HEAD)
    if not head:
        raise ValueError("it is empty")
    if stills.find_format(head) is None:
        return ffmpeg.open_video(name, pipe, stack)
    data = pipe.peek(MAX_PIPED_IMAGE)
    if len(data) == MAX_PIPED_IMAGE:
        raise ValueError(f"an image of more than {MAX_PIPED_IMAGE // 2**20} MiB; give it as a file")
    return _open_seekable(name, io.BytesIO(data), stack)
