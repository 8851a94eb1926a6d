"""The interface of clip sources.

Clip number ``index`` depends on (seed, index) and on nothing else. So a training run's position in the data is one
integer, and a resumed run sees exactly the batches that an uninterrupted one would have seen, however many processes
make them.

Shapes: T frames, C channels, H height, W width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ca2vdm_cli.config import VideoConfig


class Clip(NamedTuple):
    """A piece of a video, and the video's caption."""

    frames: Tensor
    """(T, C, H, W) float32 in [-1, 1]; latents (T, c, h, w) if the source has latents."""
    caption: str | None
    """None if the video has no caption."""


class ClipSource(Protocol):
    """A source of clips."""

    def clip(self, index: int, length: int) -> Clip:
        """Clip number ``index`` with T = ``length`` frames."""

    def crop(self, index: int, side: int) -> Tensor:
        """Picture number ``index`` for autoencoder training: a random square of a frame, (C, side, side) in [-1, 1].

        The crop is cut down to the frame's height and width if these are smaller.
        """


def random_square(draw: np.random.Generator, side: int, video: VideoConfig) -> tuple[slice, slice]:
    """Rows and columns of a random square in a frame, cut down to the frame's height and width."""
    height, width = min(side, video.height), min(side, video.width)
    top, left = draw.integers(video.height - height + 1), draw.integers(video.width - width + 1)
    return slice(top, top + height), slice(left, left + width)
