"""Everything about video files: reading, writing, and the way between a file's frames and the model's.

A frame is a uint8 array (H, W, 3), RGB, and a video is handled one frame at a time, by FFmpeg (PyAV) or OpenCV. Pixels
are taken to be square. Paths are not trusted: FFmpeg is handed open files or ``file:`` addresses, so that a name is
never a protocol or a pattern; what it finds in a file cannot make it open another; and nothing is unpickled.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple, cast

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.interrupts import noted_interrupts

Frame = NDArray[np.uint8]
Size = tuple[int, int]
"""Height and width in pixels."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
MAX_PIXELS = 2**27
"""Of one frame (134 megapixels); a file that claims more is broken or hostile."""
MAX_RATE = 1000
"""Frames per second; a file that claims more does not know its rate."""
_EXACT_COLOURS = 0x4 | 0x2000 | 0x4000 | 0x40000
"""swscale: bicubic, all the chroma, exact rounding. The defaults darken a picture by a level each time it passes."""
_PNG_NAME = re.compile(r"frame_(\d{6,})\.png")


# --- single frames ----------------------------------------------------------------------------------------------------


def to_channels(frame: Frame, channels: int) -> Frame:
    """Brings a frame (H, W), (H, W, 1) or (H, W, 3) to (H, W, channels): 1 is luma, 3 is RGB."""
    if frame.dtype != np.uint8 or frame.shape[2:] not in ((), (1,), (3,)) or frame.ndim < 2 or not frame.size:
        raise ValueError(f"a frame is a uint8 array (H, W, 1 or 3), not {frame.dtype} {frame.shape}")
    frame = _pixels(frame)
    if frame.shape[2] == channels:
        return frame
    return _pixels(cv2.cvtColor(frame, {1: cv2.COLOR_RGB2GRAY, 3: cv2.COLOR_GRAY2RGB}[channels]))


def contact_sheet(frames: Sequence[Frame], columns: int = 8, gap: int = 2) -> Frame:
    """Lays frames of one size out in rows, left to right, on white: one RGB picture of a whole video."""
    pictures = [to_channels(frame, 3) for frame in frames]
    height, width, _ = pictures[0].shape
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = index // columns * (height + gap), index % columns * (width + gap)
        sheet[y : y + height, x : x + width] = picture
    return sheet


def write_image(path: str | Path, frame: Frame) -> None:
    """Writes a frame as an image of the kind that the suffix says."""
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UsageError(f"{path}: not the name of an image; end it with one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    with _unwritable(str(path)):
        picture = cv2.cvtColor(to_channels(frame, 3), cv2.COLOR_RGB2BGR)
        path.write_bytes(cv2.imencode(path.suffix.lower(), picture)[1].tobytes())


def _resize(frame: Frame, size: Size) -> Frame:
    height, width, channels = frame.shape
    if (height, width) == size:
        return frame
    kernel = cv2.INTER_AREA if size[0] * size[1] < height * width else cv2.INTER_CUBIC
    return _pixels(cv2.resize(frame, size[::-1], interpolation=kernel)).reshape(*size, channels)


def _pixels(array: Any) -> Frame:
    """What OpenCV and PyAV return, with the type that mypy cannot know and the channel axis that OpenCV drops."""
    frame: Frame = np.ascontiguousarray(array, np.uint8)
    return frame[:, :, None] if frame.ndim == 2 else frame


# --- between the file's frames and the model's ------------------------------------------------------------------------


class Aspect(str, Enum):
    """What happens to a picture whose shape is not the model's."""

    CROP = "crop"
    """The largest centred region of the model's shape is kept. The rest is unknown to the model, so the output is that
    region only, of old and new frames alike."""
    PAD = "pad"
    """The whole picture between black bars; they are cut off again."""
    STRETCH = "stretch"
    """The whole picture, distorted to the model's shape and back."""


@dataclass(frozen=True)
class Geometry:
    """How frames of one size pass through a model of another, and what size comes out.

    ``extend`` writes ``input_to_output(frame)`` for the frames it was given and ``from_model(frame)`` for those it
    made; both have ``output_size`` and show the same part of the scene.
    """

    input_size: Size
    model_size: Size
    aspect: Aspect = Aspect.CROP

    @property
    def output_size(self) -> Size:
        """Size of the frames that come out: the input's, or with ``crop`` the size of the region that was kept."""
        return self._region(self.input_size, self.model_size) if self.aspect is Aspect.CROP else self.input_size

    def to_model(self, frame: Frame) -> Frame:
        """Brings a frame of ``input_size`` to ``model_size``."""
        if self.aspect is not Aspect.PAD:
            return _resize(self.input_to_output(frame), self.model_size)
        inner = self._region(self.model_size, self.input_size)
        padded = np.zeros((*self.model_size, frame.shape[2]), np.uint8)
        padded[self._window(self.model_size, inner)] = _resize(frame, inner)
        return padded

    def from_model(self, frame: Frame) -> Frame:
        """Brings a frame of ``model_size`` to ``output_size``."""
        if self.aspect is Aspect.PAD:
            frame = frame[self._window(self.model_size, self._region(self.model_size, self.input_size))]
        return _resize(frame, self.output_size)

    def input_to_output(self, frame: Frame) -> Frame:
        """Cuts from a frame of ``input_size`` what the output shows of it."""
        return np.ascontiguousarray(frame[self._window(self.input_size, self.output_size)])

    @staticmethod
    def _region(outer: Size, shape: Size) -> Size:
        """The largest size within ``outer`` that has the proportions of ``shape``."""
        scale = min(Fraction(outer[0], shape[0]), Fraction(outer[1], shape[1]))
        return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))

    @staticmethod
    def _window(outer: Size, inner: Size) -> tuple[slice, slice]:
        """Index of the centred window of size ``inner``."""
        top, left = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
        return slice(top, top + inner[0]), slice(left, left + inner[1])


# --- reading ----------------------------------------------------------------------------------------------------------


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
        return _resize(next(self._frames), (self.height, self.width))

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
    with _unreadable(name):
        if path.is_dir():
            return _open_folder(name, path)
        return _open_archive(name, path) if path.suffix.lower() == ".npz" else _open_video(name, path)


def _open_folder(name: str, folder: Path) -> VideoReader:
    def natural(path: Path) -> tuple[list[str | int], str]:
        return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", path.name)], path.name

    images = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    if not images:
        raise UserError(f"{name}: no images in this folder; it needs files such as frame_000000.png")
    return VideoReader(name, _read_images(sorted(images, key=natural)), None, len(images))


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

    PyAV drops what is raised while FFmpeg calls back, so it is kept here and raised by ``check``; a KeyboardInterrupt
    too, though it may be raised on the way to ``read`` and never get there.
    """

    def __init__(self, file: BinaryIO, interrupted: Callable[[], bool]) -> None:
        self._read: Callable[[int], bytes] = getattr(file, "read1", file.read)
        self._error: BaseException | None = None
        self._interrupted = interrupted

    def read(self, size: int) -> bytes:
        try:
            return b"" if self._error or self._interrupted() else self._read(size)
        except BaseException as error:
            self._error = error
            return b""

    def check(self) -> None:
        if self._interrupted():
            raise KeyboardInterrupt
        if self._error:
            raise self._error


def _open_video(name: str, path: Path | None) -> VideoReader:
    """Opens what FFmpeg can read in a file or, without a path, on standard input."""
    with ExitStack() as stack, _unreadable(name):
        file: BinaryIO = stack.enter_context(path.open("rb")) if path else sys.stdin.buffer
        # FFmpeg sees bytes without a name and may open nothing else: a playlist inside the file leads nowhere.
        # The methods of a file are C functions, during which no KeyboardInterrupt is raised.
        pipe = None if file.seekable() else _Pipe(file, stack.enter_context(noted_interrupts()))
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
    with stack, _unreadable(name):
        for packet in packets():
            if pipe:
                pipe.check()
            with suppress(av.FFmpegError):  # a damaged packet, or a decoder that is empty already
                for picture in stream.decode(packet):
                    rgb = scaler.reformat(picture, format="rgb24", interpolation=_EXACT_COLOURS).to_ndarray()
                    yield _pixels(np.rot90(rgb, round(picture.rotation / 90)))  # both count counterclockwise
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


# --- errors of the libraries ------------------------------------------------------------------------------------------


@contextmanager
def _translated(name: str, what: str, advice: str) -> Iterator[None]:
    """Turns what the libraries raise over a file into one line for the user."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (av.FFmpegError, cv2.error, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "err", None) or str(error) or type(error).__name__
        raise UserError(f"{name}: {what} ({' '.join(reason.split())}); {advice}") from error


def _unreadable(name: str) -> AbstractContextManager[None]:
    return _translated(name, "cannot be read", "give a video that FFmpeg plays, images of one size, or an .npz")


def _unwritable(name: str) -> AbstractContextManager[None]:
    return _translated(name, "cannot be written", "check permissions, free space and frame size")


# --- writing ----------------------------------------------------------------------------------------------------------


class OutputFormat(str, Enum):
    """What a video can be written as."""

    MP4 = "mp4"
    """H.264, 4:2:0, that plays in a browser. The last row or column is repeated where a side is odd."""
    MKV = "mkv"
    """The same pictures in Matroska, each readable as soon as the next is written, on a pipe or after a crash."""
    GIF = "gif"
    """256 colours chosen anew for every frame; 50 frames per second at most, as browsers slow faster ones down."""
    Y4M = "y4m"
    """Uncompressed 4:2:0, since what ffmpeg makes of 4:4:4 does not play in browsers; 4:4:4 where a side is odd, since
    H.264 cannot hold such a size in 4:2:0."""
    PNG = "png"
    """A folder of frame_000000.png and so on. Exact."""
    NPZ = "npz"
    """A NumPy archive of one array ``frames``, uint8 (T, H, W, 3). Exact."""


class VideoWriter:
    """Writes frames of one size to a file, a folder or standard output; made by ``open_writer``.

    The output begins with the first frame; a run that fails before leaves no trace. A new file grows under its own
    name; an old one is replaced when the writer is closed, and so may be the one that is being read. ``close`` finishes
    the file after an error or Ctrl-C too, so that the frames written so far can be played; one that holds nothing but
    copies of its input by then is thrown away, and what it would have replaced stays. A pipe is given every frame as it
    is written; there is nothing to flush.

    Attributes:
        name: what to call it in messages.
        frames: how many frames were written.
        is_pipe: whether that is standard output.
    """

    def __init__(self, name: str, kind: OutputFormat, fps: Fraction, path: Path | None):
        self.name, self.frames, self.is_pipe = name, 0, path is None
        self._kind, self._fps, self._target, self._path = kind, fps, path, path
        if path and path.is_file():
            self._path = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._sink: _Movie | _Images | _Archive | None = None
        self._shape: tuple[int, ...] = ()
        self._failed = self._closed = False
        self._keep = self.is_pipe

    def write(self, frame: Frame, *, copied: bool = False) -> None:
        """Appends a uint8 frame: (H, W, 3) RGB, or gray as (H, W, 1) or (H, W).

        Args:
            frame: the frame.
            copied: it stands in the input already.

        Raises:
            UserError: it cannot be written.
            BrokenPipeError: whoever read standard output has gone.
        """
        frame = to_channels(frame, 3)
        self._shape = self._shape or frame.shape
        if self._closed or frame.shape != self._shape:
            raise ValueError(f"a frame {frame.shape} for a {'closed ' * self._closed}video of frames {self._shape}")
        try:
            with _unwritable(self.name):
                self._sink = self._sink or self._open(self._shape[0], self._shape[1])
                self._sink.write(frame)
        except (UserError, BrokenPipeError):
            self._failed = True
            raise
        self.frames += 1
        self._keep = self._keep or not copied

    def close(self) -> None:
        """Finishes the output; a second call does nothing. Raises what ``write`` raises, unless that has raised it."""
        if self._closed or not self._sink:
            self._closed = True
            return
        self._closed, finished = True, False
        try:
            with _unwritable(self.name):
                if isinstance(self._sink, _Images) and not self._keep:
                    self._sink.discard()
                else:
                    self._sink.close()
                finished = True
        except (UserError, BrokenPipeError):
            if not self._failed:
                raise
        finally:
            if self._path and self._target and self._path.is_file():
                if self.frames and self._keep and (finished or self._path == self._target):
                    self._path.replace(self._target)
                else:
                    self._path.unlink()

    def _open(self, height: int, width: int) -> _Movie | _Images | _Archive:
        if not self._path:
            return _Movie(self._kind, None, self._fps, height, width)
        if self._kind is OutputFormat.PNG:
            return _Images(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._kind is OutputFormat.NPZ:
            return _Archive(self._path, height, width)
        return _Movie(self._kind, self._path, self._fps, height, width)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_writer(
    target: str | Path, *, format: str | None = None, fps: Fraction | float, overwrite: bool = False
) -> VideoWriter:
    """Prepares to write a video; folders that are missing on the way to it are made with the first frame.

    Args:
        target: a file, whose suffix says the format; a folder for PNGs (it exists, or ends with ``/``); or ``-`` for
            standard output, which takes y4m (the default) and mkv.
        format: an ``OutputFormat``, whatever the suffix says.
        fps: frames per second.
        overwrite: replace what is there; in a folder, the frames only.

    Raises:
        UsageError: an unknown format, an impossible rate, or an output that exists already.
    """
    name, rate = str(target), _output_rate(fps)
    kind = _output_format(name, format)
    if kind is OutputFormat.GIF:
        rate = min(rate, Fraction(50))
    if name == "-":
        return VideoWriter("standard output", kind, rate, None)
    path = Path(os.path.realpath(name))
    # A folder, device or named pipe is written into; a file is put into the nearest folder that is there.
    places = path.parents if os.path.isfile(path) else (path, *path.parents)
    nearest = next(place for place in places if os.path.exists(place))
    if not os.access(nearest, os.W_OK) or os.path.isfile(nearest):
        raise UsageError(f"{name}: {nearest} is not a folder that you can write to; choose another output")
    if kind is OutputFormat.PNG and os.path.isfile(path):
        raise UsageError(f"{name}: a file, not a folder for PNGs; choose another output")
    exists = any(map(_PNG_NAME.fullmatch, os.listdir(path))) if os.path.isdir(path) else os.path.isfile(path)
    if exists and not overwrite:
        raise UsageError(f"{name}: exists already; choose another output, or replace it with --overwrite")
    return VideoWriter(name, kind, rate, path)


def _output_rate(fps: Fraction | float) -> Fraction:
    with suppress(ValueError, OverflowError):  # not a number, infinity
        rate = Fraction(fps).limit_denominator(100_000)
        if 0 < rate <= MAX_RATE:
            return rate
    raise UsageError(f"fps: {fps} is not a frame rate; use one above 0 and up to {MAX_RATE}")


def _output_format(name: str, format: str | None) -> OutputFormat:
    """The format asked for, or else the one that the name implies, if it can be written to such a place."""
    allowed, implied = list(OutputFormat), Path(name).suffix.lower()[1:]
    if name == "-":
        allowed, implied = [OutputFormat.Y4M, OutputFormat.MKV], "y4m"
    elif name.endswith("/") or os.path.isdir(name):
        allowed, implied = [OutputFormat.PNG], "png"
    elif implied == "png":
        implied = "a single png"
    for kind in allowed:
        if kind.value == (format or implied):
            return kind
    known = ", ".join(kind.value for kind in allowed)
    raise UsageError(
        f"{name}: cannot be written as {format or implied!r}; use {known} (PNGs go to a folder, ending in /)"
    )


class _Codec(NamedTuple):
    """How FFmpeg writes a format."""

    muxer: str
    encoder: str
    muxer_options: dict[str, str]
    encoder_options: dict[str, str]


_CODECS = {
    OutputFormat.MP4: _Codec("mp4", "libx264", {"movflags": "+faststart"}, {"crf": "17"}),
    OutputFormat.MKV: _Codec(
        "matroska", "libx264", {"cluster_time_limit": "1", "flush_packets": "1"}, {"crf": "17", "tune": "zerolatency"}
    ),
    OutputFormat.GIF: _Codec("gif", "gif", {}, {}),
    OutputFormat.Y4M: _Codec("yuv4mpegpipe", "wrapped_avframe", {"flush_packets": "1"}, {}),
}


class _Movie:
    """Encodes with FFmpeg into a file or, without a path, to standard output."""

    def __init__(self, kind: OutputFormat, path: Path | None, fps: Fraction, height: int, width: int) -> None:
        codec = _CODECS[kind]
        # For a pipe FFmpeg writes to memory, and the bytes are carried on from there outside its callbacks, where an
        # error or a Ctrl-C can be raised.
        self._memory = io.BytesIO()
        file = f"file:{path}" if path else SimpleNamespace(write=self._memory.write)
        self._container = av.open(file, "w", format=codec.muxer, container_options=codec.muxer_options)
        stream = self._container.add_stream(codec.encoder, rate=fps, options=codec.encoder_options)
        assert isinstance(stream, VideoStream)
        self._stream, self._fps, self._count, self._torn = stream, fps, 0, False
        self._palette = _palette_graph(height, width, fps) if kind is OutputFormat.GIF else None
        self._scaler = VideoReformatter()
        self._h264 = codec.encoder == "libx264"
        odd = height % 2 or width % 2
        stream.height, stream.width = height, width
        stream.pix_fmt = "pal8" if self._palette else "yuv444p" if odd and not self._h264 else "yuv420p"
        if self._h264:  # y4m has no labels for colours, and players take it for BT.601
            stream.height, stream.width = height + height % 2, width + width % 2
            stream.colorspace = stream.color_primaries = stream.color_trc = stream.color_range = 1  # BT.709, limited

    def write(self, frame: Frame) -> None:
        if self._h264:
            height, width, _ = frame.shape
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = VideoFrame.from_ndarray(frame, format="rgb24")
        if not self._palette:
            matrix = Colorspace.ITU709 if self._h264 else Colorspace.ITU601
            picture = self._scaler.reformat(
                picture,
                format=self._stream.pix_fmt,
                dst_colorspace=matrix,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT_COLOURS,
            )
        picture.pts, picture.time_base = self._count, 1 / self._fps
        self._count += 1
        self._encode(self._paint(picture) if self._palette else [picture])

    def close(self) -> None:
        try:
            self._encode(chain(self._paint(None) if self._palette else (), [None]))
        finally:
            self._container.close()
            self._carry()

    def _paint(self, picture: VideoFrame | None) -> Iterator[VideoFrame]:
        assert self._palette
        self._palette.push(picture)
        with suppress(BlockingIOError, EOFError):  # it wants more; it has given all
            while True:
                yield cast(VideoFrame, self._palette.pull())

    def _encode(self, pictures: Iterable[VideoFrame | None]) -> None:
        # One call into C, so that a Ctrl-C cannot come between encoder and muxer and lose a packet others depend on.
        deque(map(self._container.mux, map(self._stream.encode, pictures)), maxlen=0)
        self._carry()

    def _carry(self) -> None:
        """Hands on to standard output what FFmpeg has written, unless an earlier write was torn off midway."""
        data = memoryview(self._memory.getvalue())
        if self._torn or not data:
            return
        self._memory.seek(0)
        self._memory.truncate()
        self._torn = True
        raw = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)  # a buffer would fail once more when Python exits
        while data:
            data = data[raw.write(data) or 0 :]
        self._torn = False


def _palette_graph(height: int, width: int, fps: Fraction) -> Graph:
    """rgb24 in, pal8 out: 256 colours for every frame, and a dither that stays in place from frame to frame."""
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / fps)
    split = graph.add("split")
    generate = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=5")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(generate, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


class _Images:
    """Writes frame_000000.png and so on. An earlier video in the folder is replaced at the end, all of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._place, self._count = folder, folder, 0
        if any(map(_PNG_NAME.fullmatch, os.listdir(folder))):
            self._place = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=folder))

    def write(self, frame: Frame) -> None:
        write_image(self._place / self._name(self._count), frame)
        self._count += 1

    def close(self) -> None:
        if self._place == self._folder:
            return
        for index in range(self._count):
            (self._place / self._name(index)).replace(self._folder / self._name(index))
        self._place.rmdir()
        for path in self._folder.iterdir():
            match = _PNG_NAME.fullmatch(path.name)
            if match and int(match[1]) >= self._count:
                path.unlink()

    def discard(self) -> None:
        """Remove what was written, and the folder if nothing else is in it."""
        for index in range(self._count):
            (self._place / self._name(index)).unlink(missing_ok=True)
        if not os.listdir(self._place):
            self._place.rmdir()

    @staticmethod
    def _name(index: int) -> str:
        return f"frame_{index:06d}.png"


class _Archive:
    """Writes an .npz; the frames wait in a temporary file, since the array's header, which comes first, counts them."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        self._path, self._shape, self._count = path, (height, width, 3), 0
        self._frames = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - close() closes it

    def write(self, frame: Frame) -> None:
        self._frames.write(np.ascontiguousarray(frame).data)
        self._count += 1

    def close(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *self._shape)}
        with (
            self._frames,
            zipfile.ZipFile(self._path, "w") as archive,
            archive.open("frames.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            self._frames.seek(0)
            shutil.copyfileobj(self._frames, file, 1 << 20)
