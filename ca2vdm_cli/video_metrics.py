"""Metrics that compare generated frames with the true ones.

Shapes: T frames, C channels, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import cv2
import numpy as np

from .errors import UserError
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


def measured(name: str, generated: Frame, true: Frame) -> float:
    """What the metric ``name`` returns for two videos (T, H, W, C) uint8.

    Raises:
        UserError: it returned something else than a number.
    """
    value: object = metrics[name].measure(generated, true)
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several values
        shown = " ".join(repr(value).split())
        raise UserError(
            f"{metrics.owner(name)}: its metric {name!r} returned {shown if len(shown) < 60 else shown[:59] + '…'}, "
            "which is not a number; fix or uninstall it"
        ) from None


psnr = PeakSignalToNoiseRatio()
metrics: Registry[Metric] = _metrics
"""All metrics by name."""
