"""Videos of a data set, whatever stores their frames: video files, folders of images, arrays or records.

Paths and files are not trusted: FFmpeg gets an open file and may open no other, NumPy unpickles nothing, and a file's
claims about itself are checked before memory is allocated for them.

Shapes: T frames, N videos, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from ca2vdm_cli.errors import UserError
from ca2vdm_cli.video_io import (
    MAX_PIXELS,
    Converter,
    Frame,
    Size,
    decoder,
    frame_count,
    frame_rate,
    indexed_times,
    is_image,
    look_ahead,
    open_reader,
    open_stream,
    read_errors,
    read_image,
)

from .records import parse_example

SMALL = 16 * 2**20
"""Size limit in bytes: if a larger file does not say how many frames it has, ``look`` does not count them."""
ARRAY_VIDEOS = 100_000
"""Most videos in one ``.npy``; Moving MNIST has 10000."""
BAIR_SIDE = 64
"""Height and width of a BAIR robot pushing frame in pixels."""
BAIR_BYTES = 3 * BAIR_SIDE**2
"""Size of a raw frame."""
BAIR_KEYS = ("{}/image_aux1/encoded", "{}/image_main/encoded")
"""Features that hold frame number {}, one for each camera; the first camera that a record has is used."""


@dataclass(frozen=True)
class Look:
    """What is known about a video without decoding it."""

    frames: int | None
    """Number of frames; None if the file does not say."""
    size: Size | None
    """Height and width in pixels; None if only decoding can tell."""
    fps: Fraction | None = None
    """Frames per second; None if the frames have no rate."""
    seconds: float | None = None
    """Duration; None if the file does not say."""


@dataclass(frozen=True)
class Video(ABC):
    """One video of a data set."""

    name: str
    """Its name in messages, unique in the data set."""

    caption: str | None
    """A description of what it shows; None if it has no caption."""

    @property
    @abstractmethod
    def file(self) -> Path:
        """The file that holds the frames, or the first of several."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold the frames."""
        return (self.file,)

    @property
    def part(self) -> str:
        """Which part of ``file`` the video is; empty if it is the whole file."""
        return ""

    @abstractmethod
    def look(self) -> Look:
        """Inspect the video without decoding it.

        Raises:
            UserError: the video cannot be read.
        """

    @abstractmethod
    def count(self) -> int:
        """Number of frames. Decodes nothing, but may read the whole file.

        Raises:
            UserError: the video cannot be read.
        """

    @abstractmethod
    def read(self, frames: range) -> Iterator[Frame]:
        """The frames with these ascending numbers: uint8 (H, W, 1 or 3); fewer if the video ends early.

        Raises:
            UserError: the video cannot be read.
        """

    def reason(self, error: UserError) -> str:
        """The message of an error about this video, without the file's name."""
        return str(error).removeprefix(f"{self.file}: ")


# --- video files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoFile(Video):
    """A file that FFmpeg can read."""

    path: Path
    """The file."""

    @property
    def file(self) -> Path:
        return self.path

    def look(self) -> Look:
        if self._is_image():
            with open_reader(self.path) as reader:
                return Look(reader.frame_count, (reader.height, reader.width), reader.fps)
        with _open(self.path) as (container, stream):
            tick = Fraction(stream.time_base.numerator, stream.time_base.denominator) if stream.time_base else None
            seconds = float(stream.duration * tick) if stream.duration and tick else None
            if seconds is None and container.duration:
                seconds = container.duration / av.time_base
            frames = frame_count(container, stream)
            size = (stream.height, stream.width) if stream.height and stream.width else None
            times = indexed_times(container, stream)
            with suppress(av.FFmpegError):  # a truncated file
                times = times or look_ahead(container.demux(stream))[0]
            fps = frame_rate(container, stream, times)
        if frames is None and self.path.stat().st_size <= SMALL:
            frames = self.count()
        return Look(frames, size, None if frames == 1 else fps, seconds)

    def count(self) -> int:
        if self._is_image():
            with open_reader(self.path) as reader:
                return reader.frame_count or 1
        return len(_times(self.path))

    def _is_image(self) -> bool:
        with read_errors(str(self.path)):
            if self.path.exists() and not self.path.is_file():  # opening a named pipe would block
                raise ValueError("not a file")
            return is_image(self.path)

    def read(self, frames: range) -> Iterator[Frame]:
        """Seek to the last key frame before the first frame if the file's timestamps allow it; else decode from the
        start."""
        times = () if self._is_image() else _times(self.path)
        if frames and frames.start and frames.stop <= len(times) and _are_unique(times):
            pictures = _seek(self.path, [times[index] for index in frames])
            if pictures is not None:
                return iter(pictures)
        return self._from_the_start(frames)

    def _from_the_start(self, frames: range) -> Iterator[Frame]:
        with open_reader(self.path) as reader:
            for index, frame in enumerate(islice(reader, frames.stop)):
                if reader.intact is not None and index >= reader.intact:  # later frames may depend on the damage
                    return
                if index in frames:
                    yield frame


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    with read_errors(str(path)):
        if path.exists() and not path.is_file():  # opening a named pipe would block
            raise ValueError("not a file")
        with path.open("rb") as file, open_stream(file) as (container, stream, _):
            yield container, stream


def _times(path: Path) -> tuple[int | None, ...]:
    """The frames' timestamps in ticks of the stream, ascending; all None if a frame has none."""
    with read_errors(str(path)):
        status = path.stat()
    return _read_times(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2000)
def _read_times(path: Path, size: int, modified: int) -> tuple[int | None, ...]:
    times: list[int | None] = []
    with _open(path) as (container, stream), suppress(av.FFmpegError):  # a truncated file
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_corrupt)
        times.extend(packet.pts for packet in packets if not packet.is_discard)
    known = [time for time in times if time is not None]
    return tuple(sorted(known)) if len(known) == len(times) else (None,) * len(times)


def _are_unique(times: Sequence[int | None]) -> bool:
    """Whether each timestamp identifies one frame."""
    return None not in times[:1] and len(set(times)) == len(times)


def _seek(path: Path, times: Sequence[int | None]) -> list[Frame] | None:
    """The frames with these timestamps, decoded from the key frame before the first; None if one is missing or
    damaged."""
    frames: dict[int | None, Frame] = {}
    to_frame = Converter()
    first, last = times[0], times[-1]
    assert first is not None and last is not None
    with _open(path) as (container, stream), suppress(av.FFmpegError):
        stream.codec_context.thread_count = 1
        container.seek(first, stream=stream)
        decode, key = decoder(stream), None
        packets = container.demux(stream)
        for picture in (picture for packet in packets for picture in decode(packet)):
            key = picture.pts if key is None and picture.key_frame else key
            if picture.pts is None or picture.pts > last:
                break
            if picture.is_corrupt and key is not None and picture.pts >= key:
                return None
            if picture.pts in times:
                frames[picture.pts] = to_frame(picture)
    return [frames[time] for time in times] if frames.keys() >= set(times) else None


# --- folders of images, arrays, records -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFolder(Video):
    """A folder of images, each a frame."""

    folder: Path
    """The folder."""
    images: tuple[str, ...]
    """The images' file names, in order."""

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
            yield read_image(self.folder / image)


@dataclass(frozen=True)
class ArrayVideo(Video):
    """One video of an ``.npy`` of shape (T, N, H, W), uint8."""

    path: Path
    """The file."""
    index: int
    """Which of the N."""

    @property
    def file(self) -> Path:
        return self.path

    @property
    def part(self) -> str:
        return str(self.index)

    def look(self) -> Look:
        frames, _, height, width = open_array(self.path).shape
        return Look(frames, (height, width))

    def count(self) -> int:
        return int(open_array(self.path).shape[0])

    def read(self, frames: range) -> Iterator[Frame]:
        video = open_array(self.path)[:, self.index]
        for index in frames:
            if index < len(video):
                yield np.array(video[index])[:, :, None]


def open_array(path: Path) -> np.ndarray:
    """Map an ``.npy`` of videos into memory: (T, N, H, W) uint8 with T at most 10000.

    Raises:
        UserError: the file holds something else.
    """
    with read_errors(str(path)):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy does not document what it raises for a hostile header
            raise ValueError(error) from error
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("an archive of arrays, not one .npy")
        frames, videos, height, width = array.shape if array.ndim == 4 else (0, 0, 0, 0)
        if array.dtype != np.uint8 or not array.size or frames > 10_000 or height * width > MAX_PIXELS:
            raise ValueError(f"it holds {array.dtype} {array.shape}, not uint8 (T, N, H, W)")
        if videos > ARRAY_VIDEOS:
            raise ValueError(f"it holds {videos} videos of {width}x{height}; at most {ARRAY_VIDEOS} in one file")
        return array


@dataclass(frozen=True)
class RecordVideo(Video):
    """One record of a BAIR robot pushing TFRecord file: a ``tf.Example`` whose features are raw frames."""

    path: Path
    """The file."""
    offset: int
    """Where the record's bytes begin."""
    length: int
    """Number of bytes."""

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
        images = self._frames()
        for index in frames:
            if index < len(images):
                yield np.frombuffer(images[index], np.uint8).reshape(BAIR_SIDE, BAIR_SIDE, 3)

    def _frames(self) -> list[bytes]:
        with read_errors(str(self.path)):
            with self.path.open("rb") as file:
                file.seek(self.offset)
                record = file.read(self.length)
            if len(record) < self.length:
                raise ValueError("the file has been truncated")
            features = parse_example(record)
            for key in BAIR_KEYS:
                images: list[bytes] = []
                while (value := features.get(key.format(len(images)))) is not None:
                    if len(value) != BAIR_BYTES:
                        raise ValueError(f"{key.format(len(images))} has {len(value)} bytes, not a raw 64x64 frame")
                    images.append(bytes(value))
                if images:
                    return images
        raise UserError(f"{self.path}: a record without {BAIR_KEYS[0].format(0)}; use the TFRecords of BAIR")
