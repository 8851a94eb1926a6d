"""The formats that videos can be written in, and what a kind of output does."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Protocol

from .frames import Frame


class OutputFormat(str, Enum):
    """The formats that videos can be written in."""

    MP4 = "mp4"
    """H.264 4:2:0, which plays in browsers. If a side is odd, its last row or column is repeated."""
    MKV = "mkv"
    """The same in Matroska. Each frame can be read once the next is written, also from a pipe."""
    GIF = "gif"
    """256 colours, chosen for each frame; at most 50 frames per second, since browsers slow down faster GIFs."""
    Y4M = "y4m"
    """Uncompressed 4:2:0, since ffmpeg turns 4:4:4 into H.264 that browsers do not play; 4:4:4 if a side is odd, since
    H.264 cannot hold such a size in 4:2:0."""
    PNG = "png"
    """A folder of frame_000000.png and so on. Exact."""
    NPZ = "npz"
    """A NumPy archive of one array ``frames``, uint8 (T, H, W, 3). Exact."""


class Output(Protocol):
    """Where a ``VideoWriter`` writes. What is not finished has a name of its own, see ``partial``."""

    partial: Path | None
    """The unfinished output; None for a pipe."""

    @property
    def kept(self) -> int:
        """How many frames of the unfinished output can be read; 0 for a pipe."""

    def write(self, frame: Frame) -> None:
        """Append a frame (H, W, 3)."""

    def finish(self, *, overwrite: bool) -> None:
        """Complete the output and give it its final name, in place of an earlier output if ``overwrite`` is set.

        Raises:
            FileExistsError: it would replace another output.
        """

    def close(self) -> None:
        """Stop: the frames that are written stay under the partial name."""

    def discard(self) -> None:
        """Stop, and remove what is written."""
