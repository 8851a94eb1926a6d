"""Clips to learn from: moving digits made on the fly, or random pieces of the videos in a folder.

Both are a ``ClipSource``: clip number ``index`` depends on (seed, index) and on nothing else, so the position of a
training run is one integer and a resumed run sees the very batches that an uninterrupted one would have seen.

Shapes: B batch, T frames, C channels, H height, W width, K digits in a frame.
"""

from __future__ import annotations

from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.config import SyntheticDataConfig, VideoConfig
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.video_io import Aspect, Geometry, open_reader, to_channels

TILE = 28
"""Side of a shipped digit image in pixels."""
VIDEO_SUFFIXES = frozenset(
    (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv", ".y4m")
)
"""What is taken for a video in a folder."""
MEMORY = 512 * 2**20
"""Bytes of decoded video that a ``VideoFolder`` keeps."""
REASONS = 3
"""How many unusable videos an error names."""


class ClipSource(Protocol):
    """Something that has clips."""

    def clip(self, index: int, frames: int) -> Tensor:
        """Clip number ``index``: (T, C, H, W) float32 in [-1, 1] with T = ``frames``."""

    def crop(self, index: int, side: int) -> Tensor:
        """Picture number ``index`` to train an autoencoder on: a random square of a frame, (C, side, side) in [-1, 1].

        The square is smaller where the frame is.
        """


def batch(source: ClipSource, index: int, size: int, frames: int) -> Tensor:
    """The clips ``index`` to ``index + size - 1`` as one (B, T, C, H, W) tensor."""
    return torch.stack([source.clip(i, frames) for i in range(index, index + size)])


def digit_images(images_per_class: int) -> np.ndarray:
    """The first n = ``images_per_class`` of the MNIST images of each class that ship: (10 n, 28, 28) in [0, 1]."""
    png = resources.files("ca2vdm_presets").joinpath("digits.png").read_bytes()
    sheet = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert sheet is not None
    tiles = sheet.reshape(10, TILE, -1, TILE).transpose(0, 2, 1, 3)  # class, image, H, W
    if images_per_class > tiles.shape[1]:
        raise UsageError(
            f"synthetic_data.images_per_class: {images_per_class} must be at most {tiles.shape[1]}, the images shipped"
        )
    return tiles[:, :images_per_class].reshape(-1, TILE, TILE).astype(np.float32) / 255


class MovingDigits:
    """Handwritten digits that move at constant velocity, bounce off the borders and never leave the frame.

    Positions are fractions of a pixel (bilinear); where digits overlap the brighter pixel wins.
    """

    def __init__(self, config: SyntheticDataConfig, video: VideoConfig, seed: int) -> None:
        size = config.digit_size
        if min(video.height, video.width) < size:
            raise UsageError(f"video: {video.height}x{video.width} is too small for digits of {size}x{size} pixels")
        self.config, self.video, self.seed = config, video, seed
        images = np.stack([_resize(image, size) for image in digit_images(config.images_per_class)])
        images = np.pad(images, ((0, 0), (1, 1), (1, 1)))
        # The four whole-pixel shifts that bilinear interpolation mixes: (images, 4, (size + 1)²)
        corners = (images[:, 1:, 1:], images[:, 1:, :-1], images[:, :-1, 1:], images[:, :-1, :-1])
        self._corners = np.stack([corner.reshape(len(images), -1) for corner in corners], axis=1)

    def clip(self, index: int, frames: int) -> Tensor:
        """Clip number ``index``: (T, C, H, W) float32 in [-1, 1]."""
        draw = np.random.default_rng((self.seed, index))
        height, width, size = self.video.height, self.video.width, self.config.digit_size
        room = np.array([height - size, width - size])
        canvas = np.zeros((frames, height + 1, width + 1), np.float32)  # one spare row and column: their weight is 0
        for _ in range(self.config.digits):
            corners = self._corners[draw.integers(len(self._corners))]
            speed = draw.uniform(self.config.min_speed, self.config.max_speed)
            angle = draw.uniform(0, 2 * np.pi)
            path = draw.uniform(0, room) + np.arange(frames)[:, None] * speed * np.array([np.sin(angle), np.cos(angle)])
            path = room - np.abs(path % np.maximum(2 * room, 1e-9) - room)  # (T, 2), folded back at the borders
            corner = path.astype(int)
            (y, x) = (path - corner).T
            weights = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], axis=1).astype(np.float32)
            tiles = (weights @ corners).reshape(frames, size + 1, size + 1)
            for frame, (top, left), tile in zip(canvas, corner, tiles, strict=True):
                place = frame[top : top + size + 1, left : left + size + 1]
                np.maximum(place, tile, out=place)
        pixels = torch.from_numpy(canvas[:, None, :height, :width] * 2 - 1)
        return pixels.expand(-1, self.video.channels, -1, -1)

    def crop(self, index: int, side: int) -> Tensor:
        """Picture number ``index``: a random square of a frame, (C, side, side) float32 in [-1, 1]."""
        frame = self.clip(index, 1)[0]
        rows, columns = _window(np.random.default_rng((self.seed, index, side)), side, self.video)
        return frame[:, rows, columns]


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    """(28, 28) in [0, 1] -> (side, side) in [0, 1]."""
    if side == TILE:
        return image
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC if side > TILE else cv2.INTER_AREA).clip(0, 1)


def _window(draw: np.random.Generator, side: int, video: VideoConfig) -> tuple[slice, slice]:
    """A random square of a frame, rows and columns; it is smaller where the frame is."""
    height, width = min(side, video.height), min(side, video.width)
    top, left = draw.integers(video.height - height + 1), draw.integers(video.width - width + 1)
    return slice(top, top + height), slice(left, left + width)


class VideoFolder:
    """Random pieces of the videos in a folder and its subfolders, or of one video file, at the preset's size.

    A video is decoded when it is first drawn and stays in memory, at the preset's size, until ``MEMORY`` bytes are
    taken; of a video that is longer than that the beginning is used. One that cannot be read, or is too short, is
    skipped: ``skipped`` says why.
    """

    def __init__(
        self, path: Path, video: VideoConfig, seed: int, frames: int = 1, aspect: Aspect = Aspect.STRETCH
    ) -> None:
        """Look at every video without decoding more than its first frame.

        Args:
            frames: the length of the clips to come.
            aspect: how a frame of another shape is brought to the preset's.

        Raises:
            UserError: there is no usable video.
        """
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder; --data takes a video or a folder of videos")
        self.path, self.video, self.seed, self.aspect = path, video, seed, aspect
        self.files = [path]
        if path.is_dir():
            self.files = sorted(f for f in path.rglob("*") if f.suffix.lower() in VIDEO_SUFFIXES and f.is_file())
        self.skipped: dict[Path, str] = {}
        self._decoded: dict[Path, np.ndarray] = {}  # (T, H, W, C) uint8, the least recently drawn first
        for file in self.files:
            try:
                with open_reader(file) as reader:
                    if reader.frame_count and reader.frame_count < frames:
                        self.skipped[file] = f"{reader.frame_count} frames, a clip has {frames}"
            except UserError as error:
                self.skipped[file] = _reason(error, file)
        self._check()

    def clip(self, index: int, frames: int) -> Tensor:
        """Clip number ``index``: (T, C, H, W) float32 in [-1, 1]."""
        pixels, _ = self._draw(index, frames)
        return _to_tensor(pixels)

    def crop(self, index: int, side: int) -> Tensor:
        """Picture number ``index``: a random square of a random frame, (C, side, side) float32 in [-1, 1]."""
        pixels, draw = self._draw(index, 1)
        rows, columns = _window(draw, side, self.video)
        return _to_tensor(pixels[:, rows, columns])[0]

    def _draw(self, index: int, frames: int) -> tuple[np.ndarray, np.random.Generator]:
        """Draw videos until one is usable, then a piece of it: (T, H, W, C) uint8. Also the generator, to draw on."""
        draw = np.random.default_rng((self.seed, index))
        while True:
            file = self.files[draw.integers(len(self.files))]
            if file in self.skipped:
                continue
            pixels = self._decode(file)
            if len(pixels) >= frames:
                start = draw.integers(len(pixels) - frames + 1)
                return pixels[start : start + frames], draw
            self.skipped.setdefault(file, f"{len(pixels)} frames, a clip has {frames}")
            self._check()

    def _decode(self, file: Path) -> np.ndarray:
        """The whole video at the preset's size, (T, H, W, C) uint8, up to the first frame that cannot be read."""
        height, width, channels = self.video.height, self.video.width, self.video.channels
        pixels = self._decoded.pop(file, None)
        if pixels is None:
            frames: list[np.ndarray] = []
            try:
                with open_reader(file) as reader:
                    to_model = Geometry((reader.height, reader.width), (height, width), self.aspect).to_model
                    for frame in islice(reader, max(1, MEMORY // (height * width * channels))):
                        frames.append(to_channels(to_model(frame), channels))
            except UserError as error:
                if not frames:
                    self.skipped[file] = _reason(error, file)
            pixels = np.array(frames, np.uint8).reshape(-1, height, width, channels)
            while self._decoded and sum(kept.nbytes for kept in self._decoded.values()) + pixels.nbytes > MEMORY:
                del self._decoded[next(iter(self._decoded))]
        self._decoded[file] = pixels
        return pixels

    def _check(self) -> None:
        if len(self.skipped) < len(self.files):
            return
        raise UserError(f"{self.path}: no usable video ({self.reasons() or 'no video files'})")

    def reasons(self) -> str:
        """The first few videos that were skipped, and why."""
        reasons = [f"{file.name}: {reason}" for file, reason in list(self.skipped.items())[:REASONS]]
        if len(self.skipped) > REASONS:
            reasons.append(f"and {len(self.skipped) - REASONS} more")
        return "; ".join(reasons)


def _reason(error: UserError, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ")


def _to_tensor(pixels: np.ndarray) -> Tensor:
    """(T, H, W, C) uint8 -> (T, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
