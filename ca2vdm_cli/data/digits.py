"""Moving digits, synthesized on the fly.

Shapes: T frames, C channels, H height, W width.
"""

from __future__ import annotations

from importlib import resources

import cv2
import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.config import SyntheticDataConfig, VideoConfig
from ca2vdm_cli.errors import UsageError

from .source import Clip, random_square

TILE = 28
"""Height and width of a shipped digit image in pixels."""


def digit_images(images_per_class: int) -> np.ndarray:
    """The first n = ``images_per_class`` shipped MNIST images of each class: (10 n, 28, 28) in [0, 1]."""
    png = resources.files("ca2vdm_presets").joinpath("moving-digits", "digits.png").read_bytes()
    sheet = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert sheet is not None
    tiles = sheet.reshape(10, TILE, -1, TILE).transpose(0, 2, 1, 3)  # class, image, H, W
    if images_per_class > tiles.shape[1]:
        raise UsageError(
            f"synthetic_data.images_per_class: {images_per_class} must be at most {tiles.shape[1]}, the number shipped"
        )
    return tiles[:, :images_per_class].reshape(-1, TILE, TILE).astype(np.float32) / 255


class MovingDigits:
    """Handwritten digits that move at constant velocity, bounce off the borders and never leave the frame.

    Positions are subpixel (bilinear interpolation). Where digits overlap, the brighter pixel wins.
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

    def clip(self, index: int, length: int) -> Clip:
        """Clip number ``index`` with T = ``length`` frames: (T, C, H, W) float32 in [-1, 1], without a caption."""
        draw = np.random.default_rng((self.seed, index))
        height, width, size = self.video.height, self.video.width, self.config.digit_size
        room = np.array([height - size, width - size])
        canvas = np.zeros((length, height + 1, width + 1), np.float32)  # a spare row and column, whose weights are 0
        for _ in range(self.config.digits):
            corners = self._corners[draw.integers(len(self._corners))]
            speed = draw.uniform(self.config.min_speed, self.config.max_speed)
            angle = self._angle(draw)
            path = draw.uniform(0, room) + np.arange(length)[:, None] * speed * np.array([np.sin(angle), np.cos(angle)])
            path = room - np.abs(path % np.maximum(2 * room, 1e-9) - room)  # (T, 2), folded back at the borders
            corner = path.astype(int)
            (y, x) = (path - corner).T
            weights = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], axis=1).astype(np.float32)
            tiles = (weights @ corners).reshape(length, size + 1, size + 1)
            for frame, (top, left), tile in zip(canvas, corner, tiles, strict=True):
                place = frame[top : top + size + 1, left : left + size + 1]
                np.maximum(place, tile, out=place)
        pixels = torch.from_numpy(canvas[:, None, :height, :width] * 2 - 1)
        return Clip(pixels.expand(-1, self.video.channels, -1, -1), None)

    def _angle(self, draw: np.random.Generator) -> float:
        """A direction of movement in radians."""
        directions = self.config.directions
        share = (draw.integers(directions) + 0.5) / directions if directions else draw.uniform(0, 1)
        return float(2 * np.pi * share)

    def crop(self, index: int, side: int) -> Tensor:
        """Picture number ``index``: a random square of a frame, (C, side, side) float32 in [-1, 1]."""
        frame = self.clip(index, 1).frames[0]
        rows, columns = random_square(np.random.default_rng((self.seed, index, side)), side, self.video)
        return frame[:, rows, columns]


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    """(28, 28) in [0, 1] -> (side, side) in [0, 1]."""
    if side == TILE:
        return image
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC if side > TILE else cv2.INTER_AREA).clip(0, 1)
