"""How costs grow with the length of the video and of the context: curves, and the exponent fitted to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass
class Curve:
    """One contestant's costs at growing lengths."""

    frames: list[int]
    """Frames of the video, or of the context."""
    seconds: list[float]
    """In all up to there, or of one denoising step."""
    flops: list[int]
    """The same in floating-point operations."""
    memory_bytes: list[int]
    """What is kept and what one denoising step takes on top, without the weights."""

    def as_report(self) -> dict[str, Any]:
        """The curve, and the exponent of each cost."""
        exponents = {
            f"{name}_exponent": fit_exponent(self.frames, getattr(self, name))
            for name in ("seconds", "flops", "memory_bytes")
        }
        return asdict(self) | exponents


def fit_exponent(lengths: Sequence[float], costs: Sequence[float]) -> float | None:
    """The exponent e of cost ∝ lengthᵉ, by least squares on logarithms over the longer half of the lengths.

    What a video costs in its first chunks says little about how it goes on. None for fewer than three lengths.
    """
    points = sorted((x, y) for x, y in zip(lengths, costs, strict=True) if x > 0 and y > 0)
    points = points[-max(3, (len(points) + 1) // 2) :]
    if len({x for x, _ in points}) < 3:
        return None
    x, y = np.log(np.array(points, dtype=np.float64)).T
    return float(np.polynomial.polynomial.polyfit(x, y, 1)[1])
