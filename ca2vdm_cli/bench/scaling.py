"""How costs grow with the length of the video and of the context: curves, and the exponent fitted to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Curve:
    """One method's costs at growing lengths, and the exponent of each cost."""

    frames: list[int]
    """Frames of the video, or of the context."""
    seconds: list[float]
    """Seconds for the video up to that length, or for one denoising step."""
    flops: list[int]
    """Floating-point operations, for the same."""
    memory_bytes: list[int]
    """Context and the rise in one denoising step, without the weights."""
    seconds_exponent: float | None = field(init=False)
    flops_exponent: float | None = field(init=False)
    memory_bytes_exponent: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.seconds_exponent = fit_exponent(self.frames, self.seconds)
        self.flops_exponent = fit_exponent(self.frames, self.flops)
        self.memory_bytes_exponent = fit_exponent(self.frames, self.memory_bytes)


def fit_exponent(lengths: Sequence[float], costs: Sequence[float]) -> float | None:
    """The exponent e of cost ∝ lengthᵉ, by least squares on logarithms over the longer half of the lengths.

    The cost of the first chunks says little about the trend. None for fewer than three lengths.
    """
    points = sorted((x, y) for x, y in zip(lengths, costs, strict=True) if x > 0 and y > 0)
    points = points[-max(3, (len(points) + 1) // 2) :]
    if len({x for x, _ in points}) < 3:
        return None
    x, y = np.log(np.array(points, dtype=np.float64)).T
    return float(np.polynomial.polynomial.polyfit(x, y, 1)[1])
