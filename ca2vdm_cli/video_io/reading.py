"""Reading videos one frame at a time with FFmpeg (PyAV).

Paths are not trusted: FFmpeg gets open files, so a name is never interpreted as a protocol or a pattern; nothing inside
a file can make FFmpeg open another; and nothing is unpickled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from select import select
from types import SimpleNamespace
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.interrupts import held_interrupts

from .frames import (
    EXACT_COLOURS,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    MAX_RATE,
    Frame,
    natural_order,
    pixels,
    read_errors,
    resize,
    to_channels,
)

STDIN = "standard input"
FFmpegCall = Callable[[], AbstractContextManager[None]]
ADVICE = "give a video that FFmpeg plays, images of one size, or an .npz"
POLL_SECONDS = 0.1
"""How often a read from a pipe checks for an interrupt while no data arrives."""


class VideoReader:
    """Iterates over the frames of a video, image, folder or archive once, in order: uint8 RGB (height, width, 3).

    Created by ``open_reader``. The first frame is decoded at once, so a reader has at least one frame. A damaged or
    truncated file gives the frames that can be decoded. Each frame is returned once, even if the frame rate varies. If
    the frame size changes midway, frames are resized to the size of the first.

    Attributes:
        name: the source's name in messages.
        fps: frames per second (the average, if it varies); None for images, folders and archives.
        frame_count: how many frames the file claims to have; None if it does not say.
        height, width: size in pixels, with the rotation that the file asks for applied (mirroring is ignored).
    """

    def __init__(self, name: str, frames: Generator[Frame, None, None], fps: Fraction | None, frame_count: int | None):
        self.name, self.fps, self.frame_count = name, fps, frame_count
        first = next(frames, None)
        if first is None:
            pipe = " (a pipe cannot carry a file with its index at the end, such as many mp4s)" if name == STDIN else ""
            raise UserError(f"{name}: no frame could be decoded; give a complete video or image{pipe}")
        self.height, self.width = first.shape[:2]
        self._source, self._frames = frames, chain([first], frames)

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        return resize(next(self._frames), (self.height, self.width))

    def close(self) -> None:
        """Close the file; no frames follow."""
        self._frames = chain()
        self._source.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_reader(source: str | Path) -> VideoReader:
    """Open a video.

    Args:
        source: any video that FFmpeg can read, an image, a folder of images (in natural order), an ``.npz`` with an
            array ``frames`` (uint8; T, H, W[, 1 or 3]), or ``-`` for a video on standard input, which may be a pipe.

    Raises:
        UsageError: there is no such file or folder.
        UserError: no frame could be decoded.
    """
    name, path = str(source), Path(source)
    if name == "-":
        if sys.stdin.isatty():
            raise UsageError("standard input is a terminal; pipe a video into it, or name a file")
        return _open_video(STDIN, None)
    if not os.path.exists(name):  # raises nothing, unlike Path.exists
        raise UsageError(f"{name}: no such file or folder; name a local video, image or folder, or - for a pipe")
    with read_errors(name, ADVICE):
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
    except Exception as error:  # NumPy and zipfile do not document what they raise for a damaged file
        raise ValueError(f"no array called frames could be loaded from it: {error}") from error
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"frames is {frames.dtype} {frames.shape}, not uint8 (T, H, W[, 1 or 3])")
    return VideoReader(name, (to_channels(frame, 3) for frame in frames), None, len(frames))


# --- FFmpeg -----------------------------------------------------------------------------------------------------------


@contextmanager
def open_stream(file: BinaryIO) -> Iterator[tuple[InputContainer, VideoStream, FFmpegCall]]:
    """Let FFmpeg open the video in a file or pipe; it sees bytes without a name, and may open nothing else.

    Yields:
        The container, its best video stream, and a context manager for each call that reads from the container: it
            raises any error or Ctrl-C that occurred while FFmpeg was reading a pipe.

    Raises:
        ValueError: there is no video in it, or its frames are too large.
        OSError, av.FFmpegError: it cannot be read.
    """
    # The methods of a file are C functions, during which Python raises no KeyboardInterrupt; those of a pipe are ours.
    pipe = None if file.seekable() else _Pipe(file)
    source = pipe or SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
    call = pipe.call if pipe else nullcontext
    with call():
        container = av.open(source, "r", container_options={"protocol_whitelist": "none", "fflags": "+discardcorrupt"})
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or not stream.codec_context:
            raise ValueError("it has no video stream, or its codec is unknown")
        if stream.height * stream.width > MAX_PIXELS:
            raise ValueError(f"frames of {stream.width}x{stream.height} are too large")
        yield container, stream, call


class _Pipe:
    """A pipe as FFmpeg reads it: no seeking, and each read returns what has arrived.

    PyAV loses or prints exceptions that are raised in FFmpeg's callbacks. So ``read`` raises nothing, interrupts are
    held, and ``call`` raises afterwards.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None
        self._interrupted: Callable[[], bool] = lambda: False

    def read(self, size: int) -> bytes:
        try:
            while not self._interrupted():
                if select([self._file], [], [], POLL_SECONDS)[0]:
                    return os.read(self._file.fileno(), size)
        except OSError as error:
            self._error = error
        return b""

    @contextmanager
    def call(self) -> Iterator[None]:
        """Wrap a call into FFmpeg: hold interrupts, and raise afterwards what ``read`` could not."""
        with held_interrupts() as self._interrupted:
            try:
                yield
            finally:
                if self._interrupted():
                    raise KeyboardInterrupt
                if self._error:
                    raise self._error


def _open_video(name: str, path: Path | None) -> VideoReader:
    """Open a video that FFmpeg can read from a file or, without a path, from standard input."""
    with ExitStack() as stack, read_errors(name, ADVICE):
        file: BinaryIO = stack.enter_context(path.open("rb")) if path else sys.stdin.buffer
        container, stream, call = stack.enter_context(open_stream(file))
        still = container.format.name.endswith("_pipe")  # an image; FFmpeg invents a rate and length for it
        fps, count = (None, 1) if still else (_rate(stream), stream.frames or None)
        frames = _decode(name, _packets(container, stream, call), stream, stack.pop_all())
    return VideoReader(name, frames, fps, count)


def _packets(container: InputContainer, stream: VideoStream, call: FFmpegCall) -> Iterator[Packet[VideoStream] | None]:
    """The packets until the file ends or is cut off; then None, which makes the decoder return what it still holds."""
    packets = container.demux(stream)
    with suppress(av.FFmpegError):
        while True:
            with call():
                packet = next(packets, None)
            if packet is None:
                break
            yield packet
    yield None


def _decode(
    name: str, packets: Iterator[Packet[VideoStream] | None], stream: VideoStream, stack: ExitStack
) -> Generator[Frame, None, None]:
    scaler = VideoReformatter()
    with stack, read_errors(name, ADVICE):
        for packet in packets:
            with suppress(av.FFmpegError):  # a damaged packet, or a decoder that is empty already
                for picture in stream.decode(packet):
                    yield to_rgb(picture, scaler)


def to_rgb(picture: VideoFrame, scaler: VideoReformatter) -> Frame:
    """A decoded picture as an upright frame. Share one scaler per video: creating it takes longer than using it."""
    rgb = scaler.reformat(picture, format="rgb24", interpolation=EXACT_COLOURS).to_ndarray()
    return pixels(np.rot90(rgb, round(picture.rotation / 90)))  # both count counterclockwise


def _rate(stream: VideoStream) -> Fraction | None:
    """The nominal frame rate if it is close to the average, else the average; None if the file has neither."""
    # PyAV 19 has rationals of its own, and a false one in place of None.
    tick, *rates = [
        Fraction(rate.numerator, rate.denominator) if rate else Fraction(0)
        for rate in (stream.time_base, stream.average_rate, stream.guessed_rate)
    ]
    if stream.frames and stream.duration and tick:
        rates[0] = stream.frames / (stream.duration * tick)  # exact; the file's own average may cover few frames
    rates = [rate for rate in rates if 0 < rate <= MAX_RATE]
    return rates[-1] if rates and abs(rates[-1] / rates[0] - 1) < 0.05 else rates[0] if rates else None
