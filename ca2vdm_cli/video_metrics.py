"""Metrics: how near generated frames are to true ones.

Shapes: T frames, H, W pixels, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import cv2
import numpy as np

from .plugins import Registry
from .plugins import metrics as _metrics
from .video_io import Frame


class Metric(ABC):
    """A number for a video beside the true one. Register an instance (hook ``ca2vdm_register_metrics``)."""

    name: str
    """What users type in ``training.validation_metrics``."""
    description: str
    """One line, with the unit."""
    higher_is_better: bool = True

    @abstractmethod
    def measure(self, made: Frame, true: Frame) -> float:
        """Compare two videos.

        Args:
            made: generated frames (T, H, W, C) uint8.
            true: the frames that they should be, of the same shape.
        """


class PeakSignalToNoiseRatio(Metric):
    """PSNR of each frame over all pixels and channels, averaged over the frames."""

    name = "psnr"
    description = "peak signal-to-noise ratio in dB, mean over the frames"

    def measure(self, made: Frame, true: Frame) -> float:
        return float(np.mean([cv2.PSNR(one, other) for one, other in zip(made, true, strict=True)]))


psnr = PeakSignalToNoiseRatio()
metrics: Registry[Metric] = _metrics
"""All metrics by name."""
