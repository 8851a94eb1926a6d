"""Decoding videos with FFmpeg (PyAV).

Files are not trusted: FFmpeg gets open files, so a name is never interpreted as a protocol or a pattern; nothing inside
a file can make FFmpeg open another; and what a container claims counts less than what is found in it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from types import SimpleNamespace
from typing import Any, BinaryIO

import av
import numpy as np
from av.codec import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from .frames import (
    ADVICE,
    EXACT_COLOURS,
    MAX_PIXELS,
    MAX_RATE,
    Frame,
    composite,
    read_errors,
    too_large,
    upright,
)
from .pipe import Pipe
from .source import Damage, Source

FFmpegCall = Callable[[], AbstractContextManager[None]]
Decoder = Callable[[Any], Sequence[VideoFrame]]
LOOKAHEAD, LOOKAHEAD_BYTES = 128, 32 * 2**20
"""How much of a file without an index is inspected for its frame rate, in packets and in bytes."""
TOLERANCE = 0.07
"""A claimed frame rate is used if it is this close to the measured one, which rounded timestamps make inexact."""
NO_TIMESTAMPS = 0x80
"""The flag of formats whose packets have no timestamps; FFmpeg invents 25 frames per second for them."""
DEPENDENT = 0x80000
"""The disposition of a stream that is only a tile of an image."""


@contextmanager
def open_stream(file: BinaryIO | Pipe) -> Iterator[tuple[InputContainer, VideoStream, FFmpegCall]]:
    """Let FFmpeg open the video in a file or pipe; it sees bytes without a name, and may open nothing else.

    Yields:
        The container, its best video stream, and a context manager for each call that reads from the container: it
            raises any error or Ctrl-C that occurred while FFmpeg was reading a pipe.

    Raises:
        ValueError: there is no video in it, or its frames are too large, or only tiles of an image.
        OSError, av.FFmpegError: it cannot be read.
    """
    # The methods of a file are C functions, during which Python raises no KeyboardInterrupt; those of a pipe are ours.
    source = file if isinstance(file, Pipe) else SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
    call = file.call if isinstance(file, Pipe) else nullcontext
    with call():
        container = av.open(source, "r", container_options={"protocol_whitelist": "none"})
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or not stream.codec_context:
            raise ValueError("it has no video stream, or its codec is unknown")
        if int(stream.disposition) & DEPENDENT:
            tiles = sum(bool(int(other.disposition) & DEPENDENT) for other in container.streams.video)
            raise ValueError(f"an image of {tiles} tiles; pip install 'ca2vdm[heic]', or convert it to PNG or JPEG")
        if stream.height * stream.width > MAX_PIXELS:
            raise ValueError(too_large(stream.height, stream.width))
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream, call


def decoder(stream: VideoStream) -> Decoder:
    """The function that turns a stream's packets into pictures.

    WebM keeps transparency in a second picture, which libvpx decodes and FFmpeg's own decoders ignore.
    """
    library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    has_alpha = any(key.lower() == "alpha_mode" and value == "1" for key, value in stream.metadata.items())
    if library and has_alpha and library in av.codecs_available:
        context: Any = CodecContext.create(library, "r")
        return context.decode
    return stream.decode


def decode(
    name: str, packets: Iterable[Packet[VideoStream] | None], stream: VideoStream, damage: Damage
) -> Iterator[Frame]:
    """The frames in some packets, the last of which is None. Each frame is returned once; damage is counted."""
    to_frame, to_pictures, count = Converter(), decoder(stream), 0
    with read_errors(name, ADVICE):
        for packet in packets:
            incomplete = packet is not None and packet.is_corrupt and packet.size > 0
            failed = incomplete
            try:
                for picture in () if incomplete else to_pictures(packet):
                    if picture.is_corrupt:
                        damage.corrupt += 1
                        damage.at(count)
                    yield to_frame(picture)
                    count += 1
            except av.FFmpegError:  # a damaged packet, or a decoder that is empty already
                failed = packet is not None
            # a recording may begin between two key frames: what cannot be decoded there is not damaged
            if failed and packet and (count or packet.is_keyframe):
                damage.lost += 1
                damage.at(count)


class Converter:
    """Turns the pictures of one video into upright, opaque frames.

    Creating its scaler takes longer than using it. Looking at a picture's side data makes a reference cycle, which
    keeps the picture in memory, so it is done only for the first picture and when the rotation changes.
    """

    def __init__(self) -> None:
        self._scaler = VideoReformatter()
        self._rotation: int | None = None
        self._orientation = 1

    def __call__(self, picture: VideoFrame) -> Frame:
        if picture.rotation != self._rotation:
            self._rotation, self._orientation = picture.rotation, _orientation(picture)
        transparent = _has_alpha(picture.format.name)
        target = "rgba" if transparent else "rgb24"
        array: Any = self._scaler.reformat(picture, format=target, interpolation=EXACT_COLOURS).to_ndarray()
        return upright(composite(array) if transparent else array, self._orientation)


@lru_cache
def _has_alpha(name: str) -> bool:
    format = av.VideoFormat(name)
    return format.has_palette or any(component.is_alpha for component in format.components)


def _orientation(picture: VideoFrame) -> int:
    """The EXIF orientation (1 to 8) that a picture's display matrix asks for, rounded to quarter turns."""
    try:
        data: Any = picture.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the type of another entry
        return {0: 1, 1: 8, 2: 3, 3: 6}[round(picture.rotation / 90) % 4]
    if data is None:
        return 1
    # [a b u; c d v; x y w]: the pixel (x, y) is shown at (a x + c y, b x + d y)
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return {(False, False): 1, (True, False): 2, (True, True): 3, (False, True): 4}[a < 0, d < 0]
    return {(False, False): 5, (True, False): 6, (True, True): 7, (False, True): 8}[c < 0, b < 0]


# --- packets and times ------------------------------------------------------------------------------------------------


def read_packets(
    container: InputContainer, stream: VideoStream, call: FFmpegCall, damage: Damage
) -> Iterator[Packet[VideoStream] | None]:
    """The packets until the file ends or is cut off; then None, which makes the decoder return what it still holds."""
    packets = container.demux(stream)
    try:
        while True:
            with call():
                packet = next(packets, None)
            if packet is None:
                break
            yield packet
    except av.FFmpegError:
        damage.stopped = True
    yield None


def look_ahead(
    packets: Iterator[Packet[VideoStream] | None],
) -> tuple[list[int], Iterator[Packet[VideoStream] | None]]:
    """The timestamps of the first packets, and all packets."""
    held: list[Packet[VideoStream] | None] = []
    size = 0
    for packet in packets:
        held.append(packet)
        size += packet.size if packet else 0
        if packet is None or len(held) == LOOKAHEAD or size > LOOKAHEAD_BYTES:
            break
    shown = [packet for packet in held if packet and packet.size and not packet.is_discard and not packet.is_corrupt]
    times = [packet.dts if packet.pts is None else packet.pts for packet in shown]
    return [time for time in times if time is not None], chain(held, packets)


def indexed_times(container: InputContainer, stream: VideoStream) -> list[int]:
    """The timestamps of all frames that are shown, if the file has a complete index; else nothing.

    The frames that an edit list cuts off are not shown.
    """
    entries = stream.index_entries
    if not stream.frames or (len(entries) != stream.frames and not container.format.name.startswith("mov,")):
        return []
    return [entry.timestamp for entry in entries if not entry.is_discard]


def frame_count(container: InputContainer, stream: VideoStream) -> int | None:
    """Number of frames according to the container; None if it does not say, or if its index says otherwise."""
    if not stream.index_entries:
        return stream.frames or None
    return len(indexed_times(container, stream)) or None


def frame_rate(container: InputContainer, stream: VideoStream, times: Sequence[int]) -> Fraction | None:
    """Frames per second: the nominal rate if the frames' timestamps agree with it, else their average.

    Args:
        container: the file.
        stream: its video.
        times: timestamps of its frames, or of some consecutive ones; if empty, the container's claims are used.
    """
    claims = [_rate(stream.guessed_rate), _rate(stream.average_rate)]
    if int(container.format.flags) & NO_TIMESTAMPS:
        return _rate(stream.codec_context.framerate)
    tick, measured = _rational(stream.time_base), None
    if len(times) > 1 and max(times) > min(times) and tick:
        measured = _plausible((len(times) - 1) / ((max(times) - min(times)) * tick))
    measured = measured or claims[1] or claims[0]
    for claim in claims:
        if claim and measured and abs(claim / measured - 1) < TOLERANCE:
            return claim
    return measured


def _rate(value: Any) -> Fraction | None:
    return _plausible(_rational(value))


def _plausible(rate: Fraction) -> Fraction | None:
    return rate if 0 < rate <= MAX_RATE else None


def _rational(value: Any) -> Fraction:
    """PyAV 19 has rationals of its own, and a false one in place of None."""
    return Fraction(value.numerator, value.denominator) if value else Fraction(0)


def open_video(name: str, file: BinaryIO | Pipe, stack: ExitStack) -> Source:
    """Open a video.

    Args:
        name: its name in messages.
        file: the file or pipe.
        stack: closes the file.

    Raises:
        ValueError, OSError, av.FFmpegError: see ``open_stream``.
    """
    damage = Damage()
    container, stream, call = stack.enter_context(open_stream(file))
    stack = stack.pop_all()
    packets = read_packets(container, stream, call, damage)
    times = indexed_times(container, stream)
    if not times and not isinstance(file, Pipe):
        times, packets = look_ahead(packets)
    fps, count = frame_rate(container, stream, times), frame_count(container, stream)

    def frames() -> Generator[Frame, None, None]:
        with stack:
            yield from decode(name, packets, stream, damage)

    return Source(frames(), count, fps, damage)
