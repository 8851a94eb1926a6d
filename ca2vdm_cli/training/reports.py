"""What training reports after a step and after a validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ca2vdm_cli.video_metrics import psnr

COMPARISONS = ("reconstruction", "continuation", "repeat_last_frame")
"""The fields of a validation's report that have values by metric."""


@dataclass(frozen=True)
class StepReport:
    """Results of one optimizer step, over all processes."""

    step: int
    """Steps done."""
    loss: float
    terms: dict[str, float]
    """The loss's terms by name."""
    learning_rate: float
    gradient_norm: float
    prefix: int
    """Frames of clean prefix before the first chunk."""
    seconds: float
    data_seconds: float
    """Part of ``seconds`` spent waiting for clips."""
    encode_seconds: float
    """Part of ``seconds`` spent encoding clips and captions."""
    frames: int
    """Frames that contributed to the loss."""
    memory_bytes: int
    """Peak memory of this process so far; on a GPU, of PyTorch's allocations."""


@dataclass(frozen=True)
class ValidationReport:
    """Results of one validation."""

    step: int
    loss: float
    """Mean over prefix lengths and noise levels."""
    by_prefix: dict[int, float]
    """Loss by prefix length."""
    by_level: dict[float, float]
    """Loss by noise level, a share of the training timesteps."""
    reconstruction: dict[str, float]
    """By metric: held-out frames after the autoencoder's encoder and decoder, against the frames themselves."""
    continuation: dict[str, float]
    """By metric: the chunk generated after a full window of held-out frames, against the true continuation."""
    repeat_last_frame: dict[str, float]
    """By metric: the last given frame, repeated, against the same true continuation."""
    video: Path
    sheet: Path

    @property
    def gain(self) -> float | None:
        """PSNR of the continuation minus that of repeating the last frame, in dB; None if PSNR is not measured."""
        name = psnr.name
        if name not in self.continuation:
            return None
        return self.continuation[name] - self.repeat_last_frame[name]

    @property
    def decoder_share(self) -> float | None:
        """The autoencoder's share of the continuation's squared error, by PSNR; None if PSNR is not measured."""
        name = psnr.name
        if name not in self.continuation:
            return None
        return float(min(1.0, 10 ** ((self.continuation[name] - self.reconstruction[name]) / 10)))
