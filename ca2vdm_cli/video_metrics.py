"""Metrics that compare generated frames with the true ones.

Shapes: T frames, C channels, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import cv2
import numpy as np

from .plugins import Registry
from .plugins import metrics as _metrics
from .video_io import Frame


class Metric(ABC):
    """Scores a generated video against the true one. Register an instance (hook ``ca2vdm_register_metrics``)."""

    name: str
    """What users type in ``training.validation_metrics``."""
    description: str
    """One line, with the unit."""

    @abstractmethod
    def measure(self, generated: Frame, true: Frame) -> float:
        """Score one video.

        Args:
            generated: generated frames (T, H, W, C) uint8.
            true: the true frames, of the same shape.
        """


class PeakSignalToNoiseRatio(Metric):
    """PSNR of each frame over all pixels and channels, averaged over the frames."""

    name = "psnr"
    description = "peak signal-to-noise ratio in dB, mean over the frames"

    def measure(self, generated: Frame, true: Frame) -> float:
        return float(np.mean([cv2.PSNR(one, other) for one, other in zip(generated, true, strict=True)]))


psnr = PeakSignalToNoiseRatio()
metrics: Registry[Metric] = _metrics
"""All metrics by name."""
