"""Videos, wherever their frames are: in files, folders of images, arrays or records.

Paths and files are not trusted: FFmpeg is handed an open file and may open no other, NumPy unpickles nothing, and what
a file claims about itself is checked before memory is taken for it.

Shapes: T frames, N videos, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from ca2vdm_cli.errors import UserError
from ca2vdm_cli.video_io import EXACT_COLOURS, MAX_PIXELS, Frame, Size, open_reader

from .records import parse_example

SMALL = 16 * 2**20
"""Bytes of a video file whose frames are counted at once, where it does not say how many they are."""
BAIR_SIDE = 64
"""Side of a frame of BAIR robot pushing in pixels."""
BAIR_KEYS = ("{}/image_aux1/encoded", "{}/image_main/encoded")
"""Features that have frame number {}: of one camera, or else of the other."""


@dataclass(frozen=True)
class Look:
    """What a video is, as far as can be told without decoding it."""

    frames: int | None
    """How many frames it has; None where the file does not say."""
    size: Size | None
    """Height and width in pixels; None where that takes decoding."""
    fps: Fraction | None = None
    """Frames per second, where frames have a rate."""
    seconds: float | None = None
    """How long it plays, where the file says."""


@dataclass(frozen=True)
class Video(ABC):
    """One video of a data set."""

    name: str
    """What to call it in messages, unique in its data set."""

    caption: str | None
    """What is said of it."""

    @property
    @abstractmethod
    def file(self) -> Path:
        """The file that has the frames, or the first of them."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All the files that have them."""
        return (self.file,)

    @property
    def part(self) -> str:
        """Which part of ``file`` it is, where it is one."""
        return ""

    @abstractmethod
    def look(self) -> Look:
        """What it is, without decoding it.

        Raises:
            UserError: it cannot be read.
        """

    @abstractmethod
    def count(self) -> int:
        """How many frames it has; decodes nothing, but may read the whole file.

        Raises:
            UserError: it cannot be read.
        """

    @abstractmethod
    def read(self, frames: range) -> Iterator[Frame]:
        """The frames of these ascending numbers: uint8 (H, W, 1 or 3); fewer where it breaks off before.

        Raises:
            UserError: it cannot be read.
        """


# --- video files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoFile(Video):
    """A file that FFmpeg can read."""

    path: Path
    """Where it is."""

    @property
    def file(self) -> Path:
        return self.path

    def look(self) -> Look:
        with _opened(self.path) as (container, stream):
            tick = Fraction(stream.time_base.numerator, stream.time_base.denominator) if stream.time_base else None
            rate = stream.average_rate
            fps = Fraction(rate.numerator, rate.denominator) if rate else None
            seconds = float(stream.duration * tick) if stream.duration and tick else None
            if seconds is None and container.duration:
                seconds = container.duration / av.time_base
            frames, size = stream.frames or None, (stream.height, stream.width)
        if frames is None and self.path.stat().st_size <= SMALL:
            frames = self.count()
        return Look(frames, size, fps if fps and fps > 0 else None, seconds)

    def count(self) -> int:
        return len(_times(self.path))

    def read(self, frames: range) -> Iterator[Frame]:
        """As promised, by way of the nearest key frame before where the file's times allow, else from the start."""
        times = _times(self.path)
        if frames.start and frames.stop <= len(times) and _are_exact(times):
            found = _seek(self.path, times, frames)
            if found is not None:
                return iter(found)
        return self._from_the_start(frames)

    def _from_the_start(self, frames: range) -> Iterator[Frame]:
        with open_reader(self.path) as reader:
            yield from islice(reader, frames.start, frames.stop, frames.step)


def _times(path: Path) -> tuple[int | None, ...]:
    """When each frame is shown, in the stream's ticks, ascending; Nones where the file does not say."""
    with unreadable(str(path)):
        status = path.stat()
    return _read_times(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2000)
def _read_times(path: Path, size: int, modified: int) -> tuple[int | None, ...]:
    found: list[int | None] = []
    with _opened(path) as (container, stream), suppress(av.FFmpegError):  # the file breaks off
        found.extend(p.pts for p in container.demux(stream) if p.size and not p.is_discard)
    known = [time for time in found if time is not None]
    return tuple(sorted(known)) if len(known) == len(found) else (None,) * len(found)


def _are_exact(times: Sequence[int | None]) -> bool:
    """Whether no two frames are shown at once, so that a time names a frame."""
    return None not in times[:1] and len(set(times)) == len(times)


def _seek(path: Path, times: Sequence[int | None], frames: range) -> list[Frame] | None:
    """The frames of these numbers, decoded from the key frame before the first; None if one of them is not found."""
    wanted = [times[number] for number in frames]
    found: dict[int | None, Frame] = {}
    scaler = VideoReformatter()
    with _opened(path) as (container, stream), suppress(av.FFmpegError):
        first, last = wanted[0], wanted[-1]
        assert first is not None and last is not None
        container.seek(first, stream=stream)
        for picture in container.decode(stream):
            if picture.pts is None or picture.pts > last:
                break
            if picture.pts in wanted and not picture.is_corrupt:
                rgb = scaler.reformat(picture, format="rgb24", interpolation=EXACT_COLOURS).to_ndarray()
                found[picture.pts] = _upright(rgb, picture.rotation)
    return [found[time] for time in wanted] if found.keys() >= set(wanted) else None


def _upright(rgb: Any, rotation: float) -> Frame:
    return np.ascontiguousarray(np.rot90(rgb, round(rotation / 90)), np.uint8)


@contextmanager
def _opened(path: Path) -> Generator[tuple[InputContainer, VideoStream], None, None]:
    with ExitStack() as stack, unreadable(str(path)):
        if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
            raise ValueError("not a file")
        file = stack.enter_context(path.open("rb"))
        source = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)  # bytes without a name
        options = {"protocol_whitelist": "none", "fflags": "+discardcorrupt"}
        container = stack.enter_context(av.open(source, "r", container_options=options))
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or not stream.codec_context:
            raise ValueError("no video in it, or of an unknown kind")
        if not 0 < stream.height * stream.width <= MAX_PIXELS:
            raise ValueError(f"frames of {stream.width}x{stream.height} cannot be")
        stream.codec_context.thread_count = 1
        yield container, stream


# --- folders of images, arrays, records -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFolder(Video):
    """Images that follow one another."""

    folder: Path
    """Where they are."""
    images: tuple[str, ...]
    """Their names, in order."""

    @property
    def file(self) -> Path:
        return self.folder / self.images[0]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.folder / image for image in self.images)

    @property
    def part(self) -> str:
        return "\n".join(self.images)

    def look(self) -> Look:
        with open_reader(self.file) as reader:
            return Look(len(self.images), (reader.height, reader.width))

    def count(self) -> int:
        return len(self.images)

    def read(self, frames: range) -> Iterator[Frame]:
        for image in self.images[frames.start : frames.stop : frames.step]:
            with open_reader(self.folder / image) as reader:
                yield next(reader)


@dataclass(frozen=True)
class ArrayVideo(Video):
    """One video of an ``.npy`` of shape (T, N, H, W), uint8."""

    path: Path
    """The file."""
    number: int
    """Which of the N."""

    @property
    def file(self) -> Path:
        return self.path

    @property
    def part(self) -> str:
        return str(self.number)

    def look(self) -> Look:
        frames, _, height, width = open_array(self.path).shape
        return Look(frames, (height, width))

    def count(self) -> int:
        return int(open_array(self.path).shape[0])

    def read(self, frames: range) -> Iterator[Frame]:
        video = open_array(self.path)[:, self.number]
        for number in frames:
            if number < len(video):
                yield np.array(video[number])[:, :, None]


def open_array(path: Path) -> np.ndarray:
    """An ``.npy`` of videos, (T, N, H, W) uint8, mapped and not read; T of at most 10000 frames.

    Raises:
        UserError: it is none.
    """
    with unreadable(str(path)):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy does not say what it may raise over a hostile header
            raise ValueError(error) from error
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("an archive of arrays, not one .npy")
        if array.dtype != np.uint8 or array.ndim != 4 or not array.size or len(array) > 10_000:
            raise ValueError(f"it holds {array.dtype} {array.shape}, not uint8 (T, N, H, W)")
        return array


@dataclass(frozen=True)
class RecordVideo(Video):
    """One record of a TFRecord file of BAIR robot pushing: a ``tf.Example`` whose features are raw frames."""

    path: Path
    """The file."""
    offset: int
    """Where the record's bytes begin."""
    length: int
    """How many there are."""

    @property
    def file(self) -> Path:
        return self.path

    @property
    def part(self) -> str:
        return f"{self.offset}+{self.length}"

    def look(self) -> Look:
        return Look(None, (BAIR_SIDE, BAIR_SIDE))

    def count(self) -> int:
        return len(self._frames())

    def read(self, frames: range) -> Iterator[Frame]:
        found = self._frames()
        for number in frames:
            if number < len(found):
                yield np.frombuffer(found[number], np.uint8).reshape(BAIR_SIDE, BAIR_SIDE, 3)

    def _frames(self) -> list[bytes]:
        with unreadable(str(self.path)):
            with self.path.open("rb") as file:
                file.seek(self.offset)
                record = file.read(self.length)
            if len(record) < self.length:
                raise ValueError("the file has become shorter")
            features = parse_example(record)
            for key in BAIR_KEYS:
                found: list[bytes] = []
                while (value := features.get(key.format(len(found)))) is not None:
                    if len(value) != BAIR_SIDE * BAIR_SIDE * 3:
                        raise ValueError(f"{key.format(len(found))} has {len(value)} bytes, not a raw 64x64 frame")
                    found.append(bytes(value))
                if found:
                    return found
        raise UserError(f"{self.path}: a record without {BAIR_KEYS[0].format(0)}; give the TFRecords of BAIR")


@contextmanager
def unreadable(name: str) -> Iterator[None]:
    """Turns what the libraries raise over a file into one line for the user."""
    try:
        yield
    except (av.FFmpegError, cv2.error, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "err", None) or str(error) or type(error).__name__
        raise UserError(f"{name}: cannot be read ({' '.join(reason.split())})") from error
