"""Clips drawn at random from the videos of a data set.

Shapes: T frames, C channels, H height, W width; H' and W' of a frame that is yet to be cropped.
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

from .source import random_square
from .videos import Video

MEMORY = 512 * 2**20
"""Bytes of decoded video that a source keeps. Where a data set would take more, only the frames of a clip are decoded,
and nothing is kept."""
HEADERS = 1000
"""So many videos are looked at before the first clip; those of a larger set when they are first drawn."""
REASONS = 3
"""How many unusable videos a message names."""
ELONGATION = 8
"""``Crop.RANDOM``: a frame that is longer than the model's by more than this loses its ends."""
FAILURES = 100
"""So many failed reads of one clip mean that the files change while they are read."""


class Clips(ABC):
    """Pieces of the videos of a data set, drawn at random: what sources of pixels and of latents share.

    A video that cannot be read, or is too short, is skipped: ``skipped`` says why. What is drawn depends on the files,
    the seed and the clip's number only, not on what was drawn before: what is remembered of a video is what would be
    found out again.

    Attributes:
        name: what to call the data set in messages.
        videos: its videos.
        frames: the length of the longest clip to come.
        skipped: why a video is not used, by its name.
    """

    def __init__(
        self, name: str, videos: Sequence[Video], rejects: Mapping[str, str], data: DataConfig, seed: int, frames: int
    ) -> None:
        self.name, self.videos, self.data, self.seed, self.frames = name, list(videos), data, seed, frames
        self.skipped: dict[str, str] = dict(rejects)
        self._lengths: dict[int, int] = {}  # frames of a video, as its file says; 0 if it cannot be read
        self._readable: dict[int, int] = {}  # frames that can be decoded, of a damaged video
        self._useless: set[int] = set()
        self._last: tuple[int, str | None] = (-1, None)

    @abstractmethod
    def _count(self, video: int) -> int:
        """Frames of a video; raises UserError."""

    @abstractmethod
    def _read(self, video: int, frames: range, flip: bool) -> Tensor:
        """These frames (T, ...), or fewer where the video breaks off before."""

    @abstractmethod
    def _find_end(self, video: int) -> int:
        """How many frames of a damaged video can be decoded."""

    def caption(self, index: int) -> str | None:
        """What is said of the video that clip number ``index`` is from; None where nothing is."""
        if self._last[0] != index:
            self._draw(index, self.frames)
        return self._last[1]

    @property
    def count(self) -> int:
        """Videos in all, the skipped ones included."""
        return len({video.name for video in self.videos} | self.skipped.keys())

    def span(self, frames: int) -> int:
        """Frames of a video from a clip's first to its last."""
        return (frames - 1) * self.data.stride + 1

    def reasons(self) -> str:
        """The first few videos that were skipped, and why."""
        reasons = [f"{name}: {reason}" for name, reason in list(self.skipped.items())[:REASONS]]
        if len(self.skipped) > REASONS:
            reasons.append(f"and {len(self.skipped) - REASONS} more")
        return "; ".join(reasons)

    def _draw(self, index: int, frames: int) -> tuple[Tensor, np.random.Generator]:
        """Draw videos until one is usable, then a piece of it. Also the generator, to draw on."""
        draw = np.random.default_rng((self.seed, index))
        span = self.span(frames)
        failures = 0
        while failures < FAILURES:
            self._check()
            video = int(draw.integers(len(self.videos)))
            length = self._length(video)
            if length < span:
                self._skip(video, too_short(length, span))
            if length < max(span, self.span(self.frames)):
                continue
            start = int(draw.integers(length - span + 1))
            # not drawn in turn, so that flipping changes nothing else
            flip = self.data.flip and bool(np.random.default_rng((self.seed, index, 1)).integers(2))
            for _ in range(2):
                found = self._read(video, range(start, start + span, self.data.stride), flip)
                if len(found) == frames:
                    self._last = (index, self.videos[video].caption)
                    return found, draw
                if video not in self._readable:
                    self._readable[video] = self._find_end(video)
                if self._readable[video] < span:
                    self._skip(video, f"damaged, {too_short(self._readable[video], span)}")
                    break
                failures += 1
                start = int(draw.integers(self._readable[video] - span + 1))
        raise UserError(f"{self.name}: {FAILURES} reads in a row failed; see that nothing changes the files meanwhile")

    def _length(self, video: int) -> int:
        if video not in self._lengths:
            try:
                self._lengths[video] = self._count(video)
            except UserError as error:
                self._lengths[video] = 0
                self._skip(video, reason_of(error, self.videos[video]))
        length, need = self._lengths[video], self.span(self.frames)
        if length < need:
            self._skip(video, too_short(length, need))
        return length

    def _skip(self, video: int, reason: str) -> None:
        self._useless.add(video)
        self.skipped.setdefault(self.videos[video].name, reason)

    def _check(self) -> None:
        if len(self._useless) < len(self.videos):
            return
        raise UserError(f"{self.name}: no usable video ({self.reasons() or 'no video files'})")


def too_short(length: int, need: int) -> str:
    """Why a video of so many frames is skipped."""
    return f"{length} frames, a clip has {need}"


def reason_of(error: UserError, video: Video) -> str:
    """An error without the file's name."""
    return str(error).removeprefix(f"{video.file}: ")


class VideoClips(Clips):
    """Random pieces of videos, at the preset's size.

    Where all the videos fit into ``MEMORY`` bytes at that size they stay there once decoded; otherwise no more is
    decoded than a clip needs.

    Args:
        name: what to call the data set in messages.
        videos: what it consists of.
        rejects: what was found and is none of them, with reasons.
        video: the size to bring frames to.
        data: how to draw clips.
        seed: of the drawing.
        frames: the length of the longest clip to come.

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
        self._keep = len(self.videos) <= HEADERS and self._look() <= MEMORY
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        """What a worker is sent: all but the decoded videos."""
        return {**vars(self), "_decoded": {}}

    def clip(self, index: int, frames: int) -> Tensor:
        """Clip number ``index``: (T, C, H, W) float32 in [-1, 1]."""
        pixels, draw = self._draw(index, frames)
        return to_floats(self._window(pixels, draw))

    def crop(self, index: int, side: int) -> Tensor:
        """Picture number ``index``: a random square of a random frame, (C, side, side) float32 in [-1, 1]."""
        pixels, draw = self._draw(index, 1)
        rows, columns = random_square(draw, side, self.video)
        return to_floats(self._window(pixels, draw)[:, rows, columns])[0]

    def whole(self, video: int) -> Iterator[Tensor]:
        """All frames of a video in order, one at a time: (C, H, W) float32 in [-1, 1]; raises UserError."""
        for frame in self._prepared(self.videos[video].read(range(self._count(video)))):
            yield to_floats(torch.from_numpy(frame[None]))[0]

    def _look(self) -> float:
        """See what can be told of every video without decoding it; how many bytes all of them would take."""
        total, frame_bytes = 0.0, self.video.height * self.video.width * self.video.channels
        need = self.span(self.frames)
        for number, video in enumerate(self.videos):
            try:
                look = video.look()
            except UserError as error:
                self._lengths[number] = 0
                self._skip(number, reason_of(error, video))
                continue
            count = look.frames
            if count is not None and count < need:
                self._lengths[number] = count
                self._skip(number, too_short(count, need))
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
        """(T, H', W', C) uint8; larger than the preset's size for a random crop."""
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
                self._skip(video, reason_of(error, self.videos[video]))
        return count

    def _whole(self, video: int) -> np.ndarray:
        """The whole video, (T, H', W', C) uint8, up to the first frame that cannot be read."""
        pixels = self._decoded.pop(video, None)
        if pixels is None:
            pixels = self._stack(self._prepared(self.videos[video].read(range(self._lengths[video]))))
            while self._decoded and sum(kept.nbytes for kept in self._decoded.values()) + pixels.nbytes > MEMORY:
                del self._decoded[next(iter(self._decoded))]
        self._decoded[video] = pixels
        return pixels

    def _stack(self, frames: Iterable[Frame]) -> np.ndarray:
        """Frames of one size as (T, H', W', C), up to the first that cannot be read; an error only if that is all."""
        found: list[Frame] = []
        try:
            found.extend(frames)
        except UserError:
            if not found:
                raise
        shape = found[0].shape if found else (self.video.height, self.video.width, self.video.channels)
        return np.array(found, np.uint8).reshape(-1, *shape)

    def _prepared(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Frames at the preset's size, or larger for a random crop, all like the first."""
        first = next(frames, None)
        if first is None:
            return
        model = (self.video.height, self.video.width)
        aspect = Aspect.CROP if self.data.crop is Crop.RANDOM else Aspect(self.data.crop.value)
        shape = (first.shape[0], first.shape[1])
        target = _cover(shape, model) if self.data.crop is Crop.RANDOM else model
        to_model: Callable[[Frame], Frame] = Geometry(shape, target, aspect).to_model
        for frame in chain([first], frames):
            if frame.shape[:2] != shape:  # a video may change its size midway
                frame = Geometry((frame.shape[0], frame.shape[1]), shape, Aspect.STRETCH).to_model(frame)
            yield to_channels(to_model(frame), self.video.channels)

    def _window(self, pixels: Tensor, draw: np.random.Generator) -> Tensor:
        """The place of a random crop: (T, H', W', C) -> (T, H, W, C)."""
        if self.data.crop is not Crop.RANDOM:
            return pixels
        top = int(draw.integers(pixels.shape[1] - self.video.height + 1))
        left = int(draw.integers(pixels.shape[2] - self.video.width + 1))
        return pixels[:, top : top + self.video.height, left : left + self.video.width]


def _cover(size: Size, model: Size) -> Size:
    """The smallest size of a frame's shape that covers the model's, within bounds."""
    scale = max(Fraction(model[0], size[0]), Fraction(model[1], size[1]))
    height, width = (
        min(max(ours, round(theirs * scale)), ELONGATION * ours) for theirs, ours in zip(size, model, strict=True)
    )
    return height, width
