"""Callbacks during training."""

from __future__ import annotations

from .reports import StepReport, ValidationReport

SMOOTHED_STEPS = 50
"""Steps that a reported loss is averaged over."""


class TrainingCallbacks:
    """Methods that ``train`` calls during training, in the main process only. Override those that you need."""

    def note(self, message: str) -> None:
        """Called with a message for the user, for example about a damaged checkpoint that was skipped."""

    def on_autoencoder_start(self, step: int, steps: int) -> None:
        """Called before the autoencoder is trained, with the steps done by an earlier run and the last step."""

    def on_autoencoder_step(self, step: int, steps: int, loss: float) -> None:
        """Called after each step of training the autoencoder, if it has no weights yet."""

    def on_encoded(self, videos: int, total: int) -> None:
        """Called as latents are cached: before the first video with 0, and after each video."""

    def on_start(self, step: int, steps: int) -> None:
        """Called before the first step, with the steps done by an earlier run and the last step."""

    def on_step(self, report: StepReport, mean_loss: float) -> None:
        """Called after each step, with the mean loss of the last ``SMOOTHED_STEPS`` steps of this run."""

    def on_new_last_step(self, steps: int) -> None:
        """Called when a time limit changes the last step."""

    def on_saved(self, step: int) -> None:
        """Called after each checkpoint of the model."""

    def on_validation(self, report: ValidationReport) -> None:
        """Called after each validation."""

    def on_interrupt(self) -> None:
        """Called from the signal handler when Ctrl-C or SIGTERM arrives: the current step is finished, then saved."""
