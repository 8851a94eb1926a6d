"""Frames to the bytes of a video file with FFmpeg (PyAV), one frame at a time.

Nothing in the bytes depends on the time, the machine or chance: the same frames give the same bytes.
"""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, cast

import av
import numpy as np
from av.filter import Graph
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .formats import OutputFormat
from .frames import EXACT_COLOURS, Frame

_SAME_BYTES = {"fflags": "+bitexact"}  # no version numbers, no random identifiers
# Without B-frames and look-ahead each frame is out of the encoder before the next one goes in. At this quality, PSNR is
# not below that of the default settings at 17. The number of slices follows from the number of threads.
_H264 = {"crf": "18", "tune": "zerolatency", "threads": "4"}
CHROMA = "left"
"""Where 4:2:0 colour samples lie: horizontally on the brightness samples, as H.264 and its players assume."""


class Codec(NamedTuple):
    """How FFmpeg writes a format."""

    muxer: str
    encoder: str
    muxer_options: dict[str, str]
    encoder_options: dict[str, str]
    final_options: dict[str, str] | None
    """The muxer's options for the finished file; None if that is what was written frame by frame."""
    held: int = 0
    """How many frames the muxer holds back."""


CODECS = {
    OutputFormat.MP4: Codec(
        "mp4", "libx264", {"movflags": "+empty_moov+default_base_moof+frag_custom"}, _H264, {"movflags": "+faststart"}
    ),
    OutputFormat.MKV: Codec("matroska", "libx264", {"cluster_time_limit": "1", "flush_packets": "1"}, _H264, {}, 1),
    OutputFormat.GIF: Codec("gif", "gif", {}, {}, None, 1),
    OutputFormat.Y4M: Codec("yuv4mpegpipe", "wrapped_avframe", {"flush_packets": "1"}, {}, None),
}


class Encoder:
    """Turns frames into the bytes of a video file, which can be played at any time, however few there are.

    Args:
        kind: a format of ``CODECS``.
        fps: frames per second.
        height, width: size of the frames.
        metadata: title, comment and so on, for mp4 and mkv.
    """

    def __init__(
        self, kind: OutputFormat, fps: Fraction, height: int, width: int, metadata: Mapping[str, str] | None = None
    ) -> None:
        codec = CODECS[kind]
        self._bytes: list[bytes] = []  # FFmpeg calls append, a C function, in which no Ctrl-C can be raised
        file = SimpleNamespace(write=self._bytes.append)
        options = codec.muxer_options | _SAME_BYTES
        self._container = av.open(file, "w", format=codec.muxer, container_options=options, metadata_errors="replace")
        self._container.metadata.update(metadata or {})
        h264 = codec.encoder == "libx264"
        odd = height % 2 or width % 2
        self._pads = ((0, height % 2), (0, width % 2), (0, 0)) if h264 and odd else None
        subsampled = kind is not OutputFormat.GIF and (h264 or not odd)
        encoder_options = codec.encoder_options | ({"chroma_sample_location": CHROMA} if subsampled else {})
        stream = self._container.add_stream(codec.encoder, rate=fps, options=encoder_options)
        assert isinstance(stream, VideoStream)
        self._stream, self._fps, self._count = stream, fps, 0
        stream.height, stream.width = height + height % 2 * h264, width + width % 2 * h264
        if kind is OutputFormat.GIF:
            stream.pix_fmt = "pal8"
            self._graph = _palette_graph(stream.height, stream.width, fps)
        else:
            stream.pix_fmt = "yuv420p" if subsampled else "yuv444p"
            matrix = "bt709" if h264 else "bt601"  # y4m has no colour metadata, and players assume BT.601
            self._graph = _yuv_graph(stream.height, stream.width, fps, stream.pix_fmt, matrix)
        if h264:
            stream.colorspace = stream.color_primaries = stream.color_trc = stream.color_range = 1  # BT.709, limited
        self._fragments = _Fragments(stream, fps) if kind is OutputFormat.MP4 else None

    def encode(self, frame: Frame) -> bytes:
        """The bytes that a frame (H, W, 3) adds to the file."""
        if self._pads:
            frame = np.pad(frame, self._pads, mode="edge")
        picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self._count, 1 / self._fps
        self._count += 1
        return self._mux(self._convert(picture))

    def finish(self) -> bytes:
        """The bytes at the end of the file."""
        try:
            end = self._mux(chain(self._convert(None), [None]))
        finally:
            self._container.close()
        return end if self._fragments else end + self._take()

    def _convert(self, picture: VideoFrame | None) -> Iterator[VideoFrame]:
        self._graph.push(picture)
        with suppress(BlockingIOError, EOFError):  # the filter needs more input, or has returned everything
            while True:
                yield cast(VideoFrame, self._graph.pull())

    def _mux(self, pictures: Iterable[VideoFrame | None]) -> bytes:
        packets = map(self._stream.encode, pictures)
        if self._fragments:
            self._container.start_encoding()
            header = self._take()
            return b"".join([header, *map(self._fragments.pack, chain.from_iterable(packets))])
        deque(map(self._container.mux, packets), maxlen=0)
        return self._take()

    def _take(self) -> bytes:
        data = b"".join(self._bytes)
        self._bytes.clear()
        return data


class _Fragments:
    """An MP4 file's fragments (ISO/IEC 14496-12, 8.8), one per packet. FFmpeg's own wait for the packet after them."""

    _LAYOUT = struct.Struct(">I4s I4sII I4s I4sII I4sIQ I4sIIIIII I4s")

    def __init__(self, stream: VideoStream, fps: Fraction) -> None:
        self._stream, self._fps, self._count = stream, fps, 0

    def pack(self, packet: Packet[VideoStream]) -> bytes:
        """A packet of the encoder as a fragment."""
        # The encoder's units begin with start codes, those of MP4 with their length.
        units = re.split(b"\0?\0\0\1", bytes(packet))[1:]
        data = b"".join(struct.pack(">I", len(unit)) + unit for unit in units)
        base = self._stream.time_base
        assert base is not None and packet.pts is not None
        tick = Fraction(base.numerator, base.denominator)
        time, end = (round(index / self._fps / tick) for index in (self._count, self._count + 1))
        self._count += 1
        flags = 0x0200_0000 if packet.is_keyframe else 0x0101_0000  # whether it depends on other frames
        head = self._LAYOUT.pack(
            *(100, b"moof"),
            *(16, b"mfhd", 0, self._count),
            *(76, b"traf"),
            *(16, b"tfhd", 0x2_0000, 1),  # offsets count from the moof
            *(20, b"tfdt", 0x100_0000, time),
            *(32, b"trun", 0x701, 1, 108, end - time, len(data), flags),
            *(8 + len(data), b"mdat"),
        )
        return head + data


def remux(
    kind: OutputFormat, source: Path, target: Path, *, metadata: Mapping[str, str] | None, frames: int | None
) -> None:
    """Copy a file of ``Encoder`` into one that players can seek in: with an index, in mp4 at its beginning.

    Raises:
        OSError, av.FFmpegError: it cannot be copied.
        ValueError: it does not have ``frames`` frames, if that is given.
    """
    codec, count = CODECS[kind], 0
    options = (codec.final_options or {}) | _SAME_BYTES
    with (
        source.open("rb") as file,
        av.open(file, "r", format=codec.muxer) as reader,
        av.open(f"file:{target}", "w", codec.muxer, container_options=options, metadata_errors="replace") as writer,
    ):
        writer.metadata.update(metadata or {})
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.size:
                packet.stream = copy
                writer.mux(packet)
                count += 1
    if frames is not None and count != frames:
        raise ValueError(f"{count} of {frames} frames could be copied")


def _yuv_graph(height: int, width: int, fps: Fraction, pixels: str, matrix: str) -> Graph:
    """rgb24 in, limited-range YUV out, with colour samples at ``CHROMA``."""
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / fps)
    place = f":out_chroma_loc={CHROMA}" if pixels == "yuv420p" else ""
    scale = graph.add("scale", f"flags={EXACT_COLOURS}:out_color_matrix={matrix}:out_range=limited{place}")
    graph.link_nodes(source, scale, graph.add("format", pixels), graph.add("buffersink"))
    graph.configure()
    return graph


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
