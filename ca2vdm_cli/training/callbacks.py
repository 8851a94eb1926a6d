"""Callbacks during training."""

from __future__ import annotations

from .log import StepReport

SMOOTHED_STEPS = 50
"""Steps that a reported loss is averaged over."""


class TrainingCallbacks:
    """Methods that ``train`` calls during training, in the main process only. Override those that you need."""

    def note(self, message: str) -> None:
        """Called with a message for the user, for example about a damaged checkpoint that was skipped."""

    def on_autoencoder_step(self, step: int, steps: int, loss: float) -> None:
        """Called after each step of training the autoencoder, if it has no weights yet."""

    def on_encoded(self, videos: int, total: int) -> None:
        """Called after each video, as latents are cached."""

    def on_start(self, step: int, steps: int) -> None:
        """Called before the first step, with the steps done by an earlier run and the last step."""

    def on_step(self, report: StepReport, mean_loss: float) -> None:
        """Called after each step, with the mean loss of the last ``SMOOTHED_STEPS`` steps of this run."""
