"""What a source of clips is.

Clip number ``index`` depends on (seed, index) and on nothing else, so the position of a training run is one integer
and a resumed run sees the very batches that an uninterrupted one would have seen, whoever makes them.

Shapes: B batch, T frames, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from ca2vdm_cli.config import VideoConfig


class ClipSource(Protocol):
    """Something that has clips."""

    def clip(self, index: int, frames: int) -> Tensor:
        """Clip number ``index``: (T, C, H, W) float32 in [-1, 1] with T = ``frames``."""

    def crop(self, index: int, side: int) -> Tensor:
        """Picture number ``index`` to train an autoencoder on: a random square of a frame, (C, side, side) in [-1, 1].

        The square is smaller where the frame is.
        """

    def caption(self, index: int) -> str | None:
        """What is said of the video that clip number ``index`` is from; None where nothing is."""


def random_square(draw: np.random.Generator, side: int, video: VideoConfig) -> tuple[slice, slice]:
    """A random square of a frame, rows and columns; it is smaller where the frame is."""
    height, width = min(side, video.height), min(side, video.width)
    top, left = draw.integers(video.height - height + 1), draw.integers(video.width - width + 1)
    return slice(top, top + height), slice(left, left + width)
