"""What opening a file yields, whatever decodes it: frames, what is known about them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from fractions import Fraction

from .frames import Frame


@dataclass
class Damage:
    """What is wrong with a video, counted while it is read."""

    corrupt: int = 0
    """Frames decoded with errors; they are among the frames that are returned."""
    lost: int = 0
    """Packets that could not be decoded."""
    intact: int | None = None
    """Number of frames before the first damage; None as long as there is none."""
    stopped: bool = False
    """Whether an error ended the file."""

    def at(self, frame: int) -> None:
        """Note that there is damage at this frame."""
        self.intact = frame if self.intact is None else self.intact

    def describe(self, read: int, expected: int | None) -> str:
        """What is wrong after ``read`` frames of a file that claims ``expected``; empty if nothing is."""
        parts = []
        if self.corrupt:
            parts.append(f"{self.corrupt} of {read} frames are damaged, first frame {(self.intact or 0) + 1}")
        missing = expected is not None and read < expected
        if expected is not None and missing and (self.lost or self.stopped or read < 0.98 * expected):
            parts.append(f"{read} of {expected} frames could be read")
        elif self.lost:
            parts.append(f"{self.lost} frames could not be decoded, the first after frame {self.intact}")
        elif self.stopped:
            parts.append(f"it cannot be read beyond frame {read}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Source:
    """An open video."""

    frames: Generator[Frame, None, None]
    """Its frames, in order; closing the generator closes the file."""
    count: int | None
    """How many frames it claims to have; None if it does not say."""
    fps: Fraction | None = None
    """Frames per second; None if unknown."""
    damage: Damage = field(default_factory=Damage)
    """What is wrong with the frames read so far."""
