"""Writing videos one frame at a time with FFmpeg (PyAV), or as images or an archive.

Paths are not trusted: FFmpeg gets ``file:`` addresses, so a name is never interpreted as a protocol or a pattern.
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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from enum import Enum
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, cast

import av
import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from ca2vdm_cli.errors import UsageError, UserError

from .frames import EXACT_COLOURS, MAX_RATE, Frame, to_channels, write_errors, write_image

_PNG_NAME = re.compile(r"frame_(\d{6,})\.png")


class OutputFormat(str, Enum):
    """The formats that videos can be written in."""

    MP4 = "mp4"
    """H.264 4:2:0, which plays in browsers. If a side is odd, its last row or column is repeated."""
    MKV = "mkv"
    """The same in Matroska. Each frame can be read once the next is written, also from a pipe or after a crash."""
    GIF = "gif"
    """256 colours, chosen for each frame; at most 50 frames per second, since browsers slow down faster GIFs."""
    Y4M = "y4m"
    """Uncompressed 4:2:0, since ffmpeg turns 4:4:4 into H.264 that browsers do not play; 4:4:4 if a side is odd, since
    H.264 cannot hold such a size in 4:2:0."""
    PNG = "png"
    """A folder of frame_000000.png and so on. Exact."""
    NPZ = "npz"
    """A NumPy archive of one array ``frames``, uint8 (T, H, W, 3). Exact."""


class VideoWriter:
    """Writes frames of one size to a file, a folder or standard output; created by ``open_writer``.

    Nothing is created before the first frame, so a run that fails earlier leaves no trace. A new file grows under its
    own name. An existing one is replaced when the writer is closed, so it may be the file that is being read. ``close``
    finishes the file after an error or Ctrl-C too, so the frames written so far can be played. If these are only copies
    of the input, the output is discarded instead, and an existing file is left as it was. A pipe gets each frame as it
    is written; no flush is needed.

    Attributes:
        name: the output's name in messages.
        frames: number of frames written.
        is_pipe: whether the output is standard output.
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
        """Append a uint8 frame: (H, W, 3) RGB, or gray as (H, W, 1) or (H, W).

        Args:
            frame: the frame.
            copied: whether it is a copy of a frame of the input.

        Raises:
            UserError: the frame cannot be written.
            BrokenPipeError: the reader of standard output has gone.
        """
        frame = to_channels(frame, 3)
        self._shape = self._shape or frame.shape
        if self._closed or frame.shape != self._shape:
            raise ValueError(f"a frame {frame.shape} for a {'closed ' * self._closed}video of frames {self._shape}")
        try:
            with write_errors(self.name):
                self._sink = self._sink or self._open(self._shape[0], self._shape[1])
                self._sink.write(frame)
        except (UserError, BrokenPipeError):
            self._failed = True
            raise
        self.frames += 1
        self._keep = self._keep or not copied

    def close(self) -> None:
        """Finish the output; a second call does nothing. Raises as ``write`` does, unless ``write`` already failed."""
        if self._closed or not self._sink:
            self._closed = True
            return
        self._closed, finished = True, False
        try:
            with write_errors(self.name):
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
    """Prepare to write a video. Missing parent folders are created with the first frame.

    Args:
        target: a file, whose suffix gives the format; a folder for PNGs (it exists, or the name ends with ``/``); or
            ``-`` for standard output, which takes y4m (the default) and mkv.
        format: an ``OutputFormat`` that overrides the suffix.
        fps: frames per second.
        overwrite: replace an existing output; in a folder, only the frames.

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
    # A folder, device or named pipe must itself be writable; for a file, its nearest existing parent folder must be.
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
    """The requested format, or else the one that the name implies, if it can be written to the target."""
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
        # For a pipe FFmpeg writes to memory. The bytes are passed on outside FFmpeg's callbacks, in which no error or
        # Ctrl-C could be raised.
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
        if self._h264:  # y4m has no colour metadata, and players assume BT.601
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
                interpolation=EXACT_COLOURS,
            )
        picture.pts, picture.time_base = self._count, 1 / self._fps
        self._count += 1
        self._encode(self._paint(picture) if self._palette else [picture])

    def close(self) -> None:
        try:
            self._encode(chain(self._paint(None) if self._palette else (), [None]))
        finally:
            self._container.close()
            self._pass_on()

    def _paint(self, picture: VideoFrame | None) -> Iterator[VideoFrame]:
        assert self._palette
        self._palette.push(picture)
        with suppress(BlockingIOError, EOFError):  # the filter needs more input, or has returned everything
            while True:
                yield cast(VideoFrame, self._palette.pull())

    def _encode(self, pictures: Iterable[VideoFrame | None]) -> None:
        # One call into C, so that a Ctrl-C cannot come between encoder and muxer and lose a packet that others need.
        deque(map(self._container.mux, map(self._stream.encode, pictures)), maxlen=0)
        self._pass_on()

    def _pass_on(self) -> None:
        """Pass on to standard output what FFmpeg has written, unless an earlier write was interrupted midway."""
        data = memoryview(self._memory.getvalue())
        if self._torn or not data:
            return
        self._memory.seek(0)
        self._memory.truncate()
        self._torn = True
        raw = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)  # a buffer would fail again when Python exits
        while data:
            data = data[raw.write(data) or 0 :]
        self._torn = False


def _palette_graph(height: int, width: int, fps: Fraction) -> Graph:
    """rgb24 in, pal8 out: 256 colours for each frame, and a dither pattern that does not move between frames."""
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
    """Writes frame_000000.png and so on. An earlier video in the folder is replaced as a whole at the end."""

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
    """Writes an .npz. Frames go to a temporary file first, since the array's header contains their number."""

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
