"""Clips drawn at random from the videos of a data set.

Shapes: T frames, C channels, H height, W width; H' and W' of a frame before a random crop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.config import Crop, DataConfig, VideoConfig
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.video_codec import to_floats
from ca2vdm_cli.video_io import Aspect, Frame, Geometry, Size, to_channels

from .source import Clip, random_square
from .videos import Video

MEMORY = 512 * 2**20
"""Bytes of decoded video that a source may hold. If a data set would need more, nothing is stored, and only the frames
of each clip are decoded."""
HEADERS = 1000
"""Up to this many videos are inspected before the first clip; in a larger data set, each one is inspected when it is
first drawn."""
REASONS = 3
"""How many unusable videos a message names."""
ELONGATION = 8
"""``Crop.RANDOM``: if a frame's aspect ratio differs from the model's by more than this factor, its ends are cut
off."""
FAILURES = 100
"""After this many failed reads of one clip, the files are assumed to be changing during the run."""


class Clips(ABC):
    """Random pieces of a data set's videos: the common base of pixel and latent sources.

    A video that cannot be read or is too short is skipped; ``skipped`` says why. A clip depends only on the files, the
    seed and the clip's number, not on earlier clips: whatever is remembered about a video only saves looking it up
    again.

    Attributes:
        name: the data set's name in messages.
        videos: its videos.
        frames: length of the longest clip that will be drawn.
        skipped: why videos are not used, by name.
        damaged: how much of a damaged video is used, by name; known once a clip is drawn from it.
        notes: what the user should know about the choice of videos.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, name: str, videos: Sequence[Video], rejects: Mapping[str, str], data: DataConfig, seed: int, frames: int
    ) -> None:
        self.name, self.videos, self.data, self.seed, self.frames = name, list(videos), data, seed, frames
        self.skipped: dict[str, str] = dict(rejects)
        self.damaged: dict[str, str] = {}
        self._lengths: dict[int, int] = {}  # a video's frames according to its file; 0 if it cannot be read
        self._decodable: dict[int, int] = {}  # a damaged video's frames that can be decoded
        self._unusable: set[int] = set()

    @abstractmethod
    def _count(self, video: int) -> int:
        """Number of frames of a video; raises UserError."""

    @abstractmethod
    def _read(self, video: int, frames: range, flip: bool) -> Tensor:
        """These frames (T, ...), or fewer if the video ends early."""

    @abstractmethod
    def _find_end(self, video: int) -> int:
        """How many frames of a damaged video can be decoded."""

    @property
    def count(self) -> int:
        """Number of videos, including skipped ones."""
        return len({video.name for video in self.videos} | self.skipped.keys())

    def span(self, length: int) -> int:
        """Frames of a video from the first to the last frame of a clip of this length."""
        return (length - 1) * self.data.stride + 1

    def reasons(self) -> str:
        """The first few skipped videos, with reasons."""
        return list_reasons(self.skipped)

    def damaged_in_use(self) -> dict[str, str]:
        """The damaged videos that are used up to the damage, with how much of them is."""
        return {name: reason for name, reason in self.damaged.items() if name not in self.skipped}

    def _draw(self, index: int, length: int) -> tuple[Clip, np.random.Generator]:
        """A piece of a usable video, as ``_read`` returns it, and the generator for further draws."""
        draw = np.random.default_rng((self.seed, index))
        span = self.span(length)
        failures = 0
        while failures < FAILURES:
            self._check()
            video = int(draw.integers(len(self.videos)))
            count = self._length(video)
            if count < span:
                self._skip(video, too_short(count, span))
            if count < max(span, self.span(self.frames)):
                continue
            start = int(draw.integers(count - span + 1))
            # from a separate generator, so that flipping changes nothing else
            flip = self.data.flip and bool(np.random.default_rng((self.seed, index, 1)).integers(2))
            for _ in range(2):
                frames = self._read(video, range(start, start + span, self.data.stride), flip)
                if len(frames) == length:
                    return Clip(frames, self.videos[video].caption), draw
                if video not in self._decodable:
                    self._decodable[video] = self._find_end(video)
                    self._note_damage(video, self._decodable[video])
                if self._decodable[video] < span:
                    self._skip(video, f"damaged, {too_short(self._decodable[video], span)}")
                    break
                failures += 1
                start = int(draw.integers(self._decodable[video] - span + 1))
        raise UserError(f"{self.name}: {FAILURES} reads in a row failed; make sure that nothing changes the files")

    def _length(self, video: int) -> int:
        if video not in self._lengths:
            try:
                self._lengths[video] = self._count(video)
            except UserError as error:
                self._lengths[video] = 0
                self._skip(video, self.videos[video].reason(error))
        length, need = self._lengths[video], self.span(self.frames)
        if length < need:
            self._skip(video, too_short(length, need))
        return length

    def _note_damage(self, video: int, decodable: int) -> None:
        if decodable < self._lengths[video]:
            reason = f"{decodable} of {self._lengths[video]} frames can be decoded"
            self.damaged.setdefault(self.videos[video].name, reason)

    def _skip(self, video: int, reason: str) -> None:
        self._unusable.add(video)
        self.skipped.setdefault(self.videos[video].name, reason)

    def _check(self) -> None:
        if len(self._unusable) == len(self.videos):
            raise UserError(f"{self.name}: no usable video ({self.reasons() or 'no video files'})")


def too_short(length: int, need: int) -> str:
    """Why a video of ``length`` frames is skipped."""
    return f"{length} frames, a clip has {need}"


def list_reasons(skipped: Mapping[str, str]) -> str:
    """The first few skipped videos, with reasons."""
    reasons = [f"{name}: {reason}" for name, reason in list(skipped.items())[:REASONS]]
    if len(skipped) > REASONS:
        reasons.append(f"and {len(skipped) - REASONS} more")
    return "; ".join(reasons)


class VideoClips(Clips):
    """Random pieces of videos at the preset's frame size.

    If all videos fit into ``MEMORY`` bytes at that size, they are kept decoded in memory; otherwise only the frames of
    each clip are decoded.

    Args:
        name: the data set's name in messages.
        videos: its videos.
        rejects: files that could not be used as videos, with reasons.
        video: the frame size.
        data: how to draw clips.
        seed: seed of the random draws.
        frames: length of the longest clip that will be drawn.

    Raises:
        UserError: there is no usable video.
    """

    def __init__(
        self,
        name: str,
        videos: Sequence[Video],
        rejects: Mapping[str, str],
        video: VideoConfig,
        data: DataConfig,
        seed: int,
        frames: int = 1,
    ) -> None:
        super().__init__(name, videos, rejects, data, seed, frames)
        self.video = video
        self._decoded: dict[int, np.ndarray] = {}  # (T, H', W', C) uint8, the least recently drawn first
        self._keep = len(self.videos) <= HEADERS and self._inspect() <= MEMORY
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to a worker: everything but the decoded videos."""
        return {**vars(self), "_decoded": {}}

    def clip(self, index: int, length: int) -> Clip:
        """Clip number ``index`` with T = ``length`` frames: (T, C, H, W) float32 in [-1, 1]."""
        piece, draw = self._draw(index, length)
        return Clip(to_floats(self._window(piece.frames, draw)), piece.caption)

    def crop(self, index: int, side: int) -> Tensor:
        """Picture number ``index``: a random square of a random frame, (C, side, side) float32 in [-1, 1]."""
        piece, draw = self._draw(index, 1)
        rows, columns = random_square(draw, side, self.video)
        return to_floats(self._window(piece.frames, draw)[:, rows, columns])[0]

    def whole(self, video: int) -> Iterator[Tensor]:
        """All frames of a video in order, one at a time: (C, H, W) float32 in [-1, 1]; raises UserError."""
        for frame in self._prepared(self.videos[video].read(range(self._count(video)))):
            yield to_floats(torch.from_numpy(frame[None]))[0]

    def _inspect(self) -> float:
        """Look at every video without decoding it; returns how many bytes all of them would take when decoded."""
        total, frame_bytes = 0.0, self.video.height * self.video.width * self.video.channels
        need = self.span(self.frames)
        for index, video in enumerate(self.videos):
            try:
                look = video.look()
            except UserError as error:
                self._lengths[index] = 0
                self._skip(index, video.reason(error))
                continue
            count = look.frames
            if count is not None and count < need:
                self._lengths[index] = count
                self._skip(index, too_short(count, need))
                continue
            if count is None:
                count = round(float(look.fps) * look.seconds) if look.fps and look.seconds else MEMORY
            scale = 1.0
            if self.data.crop is Crop.RANDOM and look.size:
                height, width = _cover(look.size, (self.video.height, self.video.width))
                scale = height * width / (self.video.height * self.video.width)
            total += count * frame_bytes * scale
        return total

    def _count(self, video: int) -> int:
        return self.videos[video].count()

    def _read(self, video: int, frames: range, flip: bool) -> Tensor:
        """(T, H', W', C) uint8; larger than the preset's size if there will be a random crop."""
        try:
            if self._keep:
                pixels = self._whole(video)[frames.start : frames.stop : frames.step]
            else:
                pixels = self._stack(self._prepared(self.videos[video].read(frames)))
        except UserError:
            return torch.empty(0)
        return torch.from_numpy(np.ascontiguousarray(pixels[:, :, ::-1] if flip else pixels))

    def _find_end(self, video: int) -> int:
        count = 0
        try:
            for _ in self.videos[video].read(range(self._lengths[video])):
                count += 1
        except UserError as error:
            if not count:
                self._skip(video, self.videos[video].reason(error))
        return count

    def _whole(self, video: int) -> np.ndarray:
        """The whole video, (T, H', W', C) uint8, up to its first unreadable frame."""
        pixels = self._decoded.pop(video, None)
        if pixels is None:
            pixels = self._stack(self._prepared(self.videos[video].read(range(self._lengths[video]))))
            self._note_damage(video, len(pixels))
            while self._decoded and sum(other.nbytes for other in self._decoded.values()) + pixels.nbytes > MEMORY:
                del self._decoded[next(iter(self._decoded))]
        self._decoded[video] = pixels
        return pixels

    def _stack(self, frames: Iterable[Frame]) -> np.ndarray:
        """Frames of one size as (T, H', W', C), up to the first unreadable one; raises only if no frame precedes it."""
        stack: list[Frame] = []
        try:
            stack.extend(frames)
        except UserError:
            if not stack:
                raise
        shape = stack[0].shape if stack else (self.video.height, self.video.width, self.video.channels)
        return np.array(stack, np.uint8).reshape(-1, *shape)

    def _prepared(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Frames at the preset's size, or larger if there will be a random crop; all have the size of the first."""
        first = next(frames, None)
        if first is None:
            return
        model = (self.video.height, self.video.width)
        aspect = Aspect.CROP if self.data.crop is Crop.RANDOM else Aspect(self.data.crop.value)
        shape = (first.shape[0], first.shape[1])
        target = _cover(shape, model) if self.data.crop is Crop.RANDOM else model
        to_model: Callable[[Frame], Frame] = Geometry(shape, target, aspect).to_model
        for frame in chain([first], frames):
            if frame.shape[:2] != shape:  # the frame size may change midway
                frame = Geometry((frame.shape[0], frame.shape[1]), shape, Aspect.STRETCH).to_model(frame)
            yield to_channels(to_model(frame), self.video.channels)

    def _window(self, pixels: Tensor, draw: np.random.Generator) -> Tensor:
        """Cut out the random crop: (T, H', W', C) -> (T, H, W, C)."""
        if self.data.crop is not Crop.RANDOM:
            return pixels
        top = int(draw.integers(pixels.shape[1] - self.video.height + 1))
        left = int(draw.integers(pixels.shape[2] - self.video.width + 1))
        return pixels[:, top : top + self.video.height, left : left + self.video.width]


def _cover(size: Size, model: Size) -> Size:
    """The smallest size with a frame's aspect ratio (limited by ``ELONGATION``) that covers the model's size."""
    scale = max(Fraction(model[0], size[0]), Fraction(model[1], size[1]))
    height, width = (
        min(max(ours, round(theirs * scale)), ELONGATION * ours) for theirs, ours in zip(size, model, strict=True)
    )
    return height, width
