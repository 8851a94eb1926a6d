"""The loop around the steps: checkpoints, validations, time limits, and what stops a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

from ca2vdm_cli.errors import UserError
from ca2vdm_cli.interrupts import held_interrupts
from ca2vdm_cli.processes import any_process

from .callbacks import TrainingCallbacks
from .log import TrainingLog
from .reports import StepReport
from .run_folder import RunFolder
from .time_limit import TimeLimit
from .trainer import Trainer, write_preset
from .validation import Validator

OVERDUE = 10.0
"""Seconds of waiting for clips after which the user is told."""


def training_loop(
    trainer: Trainer,
    folder: RunFolder,
    on_step: Callable[[StepReport], None],
    validator: Validator | None = None,
    callbacks: TrainingCallbacks | None = None,
    limit: TimeLimit | None = None,
    saved: int | None = None,
) -> None:
    """Train to the last step, saving and validating as often as the preset says, and at the end.

    A new run saves before its first step, so that it can be resumed from there. An interrupt takes effect after the
    current step, and that step is saved. So is the last step if clips can't be read any more, or something else fails
    (with several processes, only in the former case). If the gradient is not finite, nothing is saved.

    Args:
        trainer: the run's.
        folder: where it is saved.
        on_step: called after each step.
        validator: validates the averaged weights; in the main process only.
        callbacks: receive everything else that happens.
        limit: fits the last step to a deadline.
        saved: the step of the newest checkpoint.
    """
    callbacks = callbacks or TrainingCallbacks()
    loop = _Loop(trainer, folder, callbacks, saved)
    main = trainer.accelerator.is_main_process
    with (
        closing(trainer),
        TrainingLog(folder, trainer.step, active=main, note=callbacks.note) as log,
        held_interrupts(callbacks.on_interrupt) as interrupted,
        loop.saved_after_errors(),
    ):
        if trainer.step == 0:
            loop.save()
        while trainer.step < trainer.preset.training.steps and loop.next_clips(interrupted):
            report = trainer.train_step()
            log.step(report)
            on_step(report)
            if limit is not None:
                loop.fit(limit)
            training = trainer.preset.training
            done = trainer.step >= training.steps
            if trainer.step % training.checkpoint_every == 0 or done:
                loop.save()
            if training.validate_every and (trainer.step % training.validate_every == 0 or done):
                loop.validate(validator, log)
        loop.save()
    loop.raise_what_stopped_it()


class _Loop:
    """The parts of ``training_loop``."""

    def __init__(self, trainer: Trainer, folder: RunFolder, callbacks: TrainingCallbacks, saved: int | None) -> None:
        self.trainer, self.folder, self.callbacks, self._saved = trainer, folder, callbacks, saved
        self._problem: UserError | None = None
        self._overdue = 0.0

    def next_clips(self, interrupted: Callable[[], bool]) -> bool:
        """Fetch the clips of the next step; false in all processes if any is interrupted or can't read its clips."""

        def waiting(seconds: float) -> None:
            if interrupted():
                raise _Interrupted
            if seconds >= OVERDUE and self._overdue < OVERDUE:
                self.callbacks.note(
                    f"step {self.trainer.step + 1}: waiting for clips (a worker process is slow or stopped; --set "
                    "data.workers=0 reads them without)"
                )
            self._overdue = seconds

        stop = interrupted()
        if not stop:
            try:
                self._overdue = 0.0
                self.trainer.fetch(waiting)
            except _Interrupted:
                stop = True
            except UserError as error:
                self._problem = error
        return not any_process(self.trainer.accelerator, stop or self._problem is not None)

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.trainer.step == self._saved:
            return
        self.trainer.save(self.folder)
        self._saved = self.trainer.step
        self.callbacks.on_saved(self._saved)

    def fit(self, limit: TimeLimit) -> None:
        """Fit the last step to the time limit."""
        steps = limit.last_step(self.trainer.step, self.trainer.preset.training.steps, self.trainer.accelerator)
        if steps is None:
            return
        self.trainer.stop_at(steps)
        if self.trainer.accelerator.is_main_process:
            write_preset(self.trainer.preset, self.folder.path)
        self.callbacks.on_new_last_step(steps)

    def validate(self, validator: Validator | None, log: TrainingLog) -> None:
        """Validate the averaged weights. Training goes on if only the pictures can't be written."""
        weights = self.trainer.state.averaged_weights()
        if validator is None or not self.trainer.accelerator.is_main_process:
            return
        report = validator(weights, self.trainer.step, self.callbacks.note)
        log.validation(report)
        self.callbacks.on_validation(report)

    def raise_what_stopped_it(self) -> None:
        """Raise what ended the run before its last step."""
        if self._problem is None and self.trainer.step < self.trainer.preset.training.steps:
            self._problem = UserError("another process of this run stopped, and said why")
        if self._problem is not None:
            raise self._with_advice(self._problem) from self._problem

    @contextmanager
    def saved_after_errors(self) -> Iterator[None]:
        """Save the last step before an error ends the run, if its weights are good."""
        try:
            yield
        except Exception as error:
            trainer = self.trainer
            if self._saved is None or not trainer.whole or trainer.accelerator.num_processes > 1:
                raise
            with suppress(UserError):  # a full disk, which may be the error
                self.save()
            if self._saved != trainer.step:
                raise
            if isinstance(error, UserError):
                raise self._with_advice(error) from error
            self.callbacks.note(self._advice())
            raise

    def _with_advice(self, error: UserError) -> UserError:
        return type(error)(f"{error}; {self._advice()}")

    def _advice(self) -> str:
        return f"step {self._saved} is saved, continue with ca2vdm train --resume --out {self.folder.path}"


class _Interrupted(Exception):
    """An interrupt arrived while clips were awaited."""
