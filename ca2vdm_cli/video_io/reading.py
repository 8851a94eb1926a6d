"""Reading videos, one frame at a time, by FFmpeg (PyAV).

Paths are not trusted: FFmpeg is handed open files, so that a name is never a protocol or a pattern; what it finds in a
file cannot make it open another; and nothing is unpickled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.interrupts import noted_interrupts

from .frames import (
    EXACT_COLOURS,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    MAX_RATE,
    Frame,
    natural_order,
    pixels,
    resize,
    to_channels,
    unreadable,
)


class VideoReader:
    """The frames of a video, image, folder or archive, in order and once: uint8 RGB (height, width, 3).

    Made by ``open_reader``. The first frame is decoded at once, so a reader has at least one; a damaged or cut-off file
    gives the frames that could be decoded. Where the frame rate varies, every frame is still given once. Frames that
    change size midway are brought to the size of the first.

    Attributes:
        name: what to call it in messages.
        fps: frames per second (the average, where they vary); None for images, folders and archives.
        frame_count: how many frames the file claims to have; None where it does not say.
        height, width: size in pixels, upright where the file says how it was held (mirroring is ignored).
    """

    def __init__(self, name: str, frames: Generator[Frame, None, None], fps: Fraction | None, frame_count: int | None):
        self.name, self.fps, self.frame_count = name, fps, frame_count
        first = next(frames, None)
        if first is None:
            pipe = " (in a pipe not one whose index is at its end, as of many mp4s)" if name == "standard input" else ""
            raise UserError(f"{name}: no frame could be decoded; give a complete video or image{pipe}")
        self.height, self.width = first.shape[:2]
        self._source, self._frames = frames, chain([first], frames)

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        return resize(next(self._frames), (self.height, self.width))

    def close(self) -> None:
        """Closes the file; no frame follows."""
        self._frames = chain()
        self._source.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_reader(source: str | Path) -> VideoReader:
    """Opens any video that FFmpeg can read, an image, a folder of images (in natural order), an ``.npz`` with an array
    ``frames`` (uint8; T, H, W[, 1 or 3]), or ``-``, a video on standard input, which may be a pipe.

    Raises:
        UsageError: there is nothing of that name.
        UserError: no frame in it could be decoded.
    """
    name, path = str(source), Path(source)
    if name == "-":
        if sys.stdin.isatty():
            raise UsageError("standard input is a terminal; pipe a video into it, or name a file")
        return _open_video("standard input", None)
    if not os.path.exists(name):  # raises nothing, unlike Path.exists
        raise UsageError(f"{name}: no such file or folder; name a local video, image or folder, or - for a pipe")
    with unreadable(name):
        if path.is_dir():
            return _open_folder(name, path)
        return _open_archive(name, path) if path.suffix.lower() == ".npz" else _open_video(name, path)


def _open_folder(name: str, folder: Path) -> VideoReader:
    images = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    if not images:
        raise UserError(f"{name}: no images in this folder; it needs files such as frame_000000.png")
    images.sort(key=lambda image: natural_order(image.name))
    return VideoReader(name, _read_images(images), None, len(images))


def _read_images(paths: list[Path]) -> Generator[Frame, None, None]:
    first: Frame | None = None
    for path in paths:
        with _open_video(str(path), path) as reader:
            frame = next(reader)
        first = frame if first is None else first
        if frame.shape != first.shape:
            sizes = f"{frame.shape[1]}x{frame.shape[0]}, unlike {paths[0].name}, {first.shape[1]}x{first.shape[0]}"
            raise UserError(f"{path}: {sizes}; a folder needs images of one size")
        yield frame


def _open_archive(name: str, path: Path) -> VideoReader:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            frames = np.asarray(archive["frames"])
    except Exception as error:  # NumPy and zipfile do not say what they may raise over a damaged file
        raise ValueError(f"no array called frames could be loaded from it: {error}") from error
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"frames is {frames.dtype} {frames.shape}, not uint8 (T, H, W[, 1 or 3])")
    return VideoReader(name, (to_channels(frame, 3) for frame in frames), None, len(frames))


class _Pipe:
    """A pipe as FFmpeg reads it: what has arrived so far, and no seeking.

    PyAV drops what is raised while FFmpeg calls back, so it is kept here and raised by ``check``. What would be raised
    on the way into ``read`` it also prints: an interrupt there is noted only, see ``unguarded``.
    """

    def __init__(self, file: BinaryIO, interrupted: Callable[[], bool]) -> None:
        self._read: Callable[[int], bytes] = getattr(file, "read1", file.read)
        self._error: BaseException | None = None
        self._interrupted = interrupted

    def read(self, size: int) -> bytes:
        try:
            guarded = True  # noqa: F841 (looked up by unguarded)
            return b"" if self._error or self._interrupted() else self._read(size)
        except BaseException as error:
            self._error = error
            return b""

    @classmethod
    def unguarded(cls, frame: FrameType) -> bool:
        """Whether ``read`` has been entered, but not yet its ``try``."""
        return frame.f_code is cls.read.__code__ and "guarded" not in frame.f_locals

    def check(self) -> None:
        if self._interrupted():
            raise KeyboardInterrupt
        if self._error:
            raise self._error


def _open_video(name: str, path: Path | None) -> VideoReader:
    """Opens what FFmpeg can read in a file or, without a path, on standard input."""
    with ExitStack() as stack, unreadable(name):
        file: BinaryIO = stack.enter_context(path.open("rb")) if path else sys.stdin.buffer
        # FFmpeg sees bytes without a name and may open nothing else: a playlist inside the file leads nowhere.
        # The methods of a file are C functions, during which no KeyboardInterrupt is raised.
        pipe = None if file.seekable() else _Pipe(file, stack.enter_context(noted_interrupts(_Pipe.unguarded)))
        source = pipe or SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
        options = {"protocol_whitelist": "none", "fflags": "+discardcorrupt"}
        try:
            container = stack.enter_context(av.open(source, "r", container_options=options))
        finally:
            if pipe:
                pipe.check()
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or not stream.codec_context:
            raise ValueError("no video in it, or of an unknown kind")
        if stream.height * stream.width > MAX_PIXELS:
            raise ValueError(f"frames of {stream.width}x{stream.height} are too large")
        still = container.format.name.endswith("_pipe")  # an image, whose rate and length FFmpeg makes up
        fps, count = (None, 1) if still else (_rate(stream), stream.frames or None)
        frames = _decode(name, container, stream, pipe, stack.pop_all())
    return VideoReader(name, frames, fps, count)


def _decode(
    name: str, container: InputContainer, stream: VideoStream, pipe: _Pipe | None, stack: ExitStack
) -> Generator[Frame, None, None]:
    def packets() -> Iterator[Packet[VideoStream] | None]:
        with suppress(av.FFmpegError):  # the file breaks off
            yield from container.demux(stream)
        yield None  # what the decoder still holds

    scaler = VideoReformatter()  # one for all frames: setting it up takes ten times as long as using it
    with stack, unreadable(name):
        for packet in packets():
            if pipe:
                pipe.check()
            with suppress(av.FFmpegError):  # a damaged packet, or a decoder that is empty already
                for picture in stream.decode(packet):
                    rgb = scaler.reformat(picture, format="rgb24", interpolation=EXACT_COLOURS).to_ndarray()
                    yield pixels(np.rot90(rgb, round(picture.rotation / 90)))  # both count counterclockwise
        if pipe:
            pipe.check()


def _rate(stream: VideoStream) -> Fraction | None:
    """The nominal frame rate where it is close to the average, else the average; None where there is neither."""
    # PyAV 19 has rationals of its own, and false ones where earlier there was None.
    tick, *rates = [
        Fraction(rate.numerator, rate.denominator) if rate else Fraction(0)
        for rate in (stream.time_base, stream.average_rate, stream.guessed_rate)
    ]
    if stream.frames and stream.duration and tick:
        rates[0] = stream.frames / (stream.duration * tick)  # exact; the file's own average may be of a few frames
    rates = [rate for rate in rates if 0 < rate <= MAX_RATE]
    return rates[-1] if rates and abs(rates[-1] / rates[0] - 1) < 0.05 else rates[0] if rates else None
