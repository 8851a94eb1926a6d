"""``max_minutes``: as many steps as fit into a time, with the learning rate's schedule fitted to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

MEASURED_STEPS = 10
"""Steps after which the time of a step is known."""
RESERVE = 0.02
"""Share of the remaining time that is kept for the last checkpoint, and for steps that are slower than before."""


class TimeLimit:
    """Fits the last step of a training to a deadline.

    The first fit is after ``MEASURED_STEPS`` steps; it is repeated each time that half of the remaining steps are done.
    The preset's last step is never exceeded. Validations count as part of the steps.

    Args:
        minutes: time from now until training should end.
        clock: seconds.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._deadline = clock, clock() + 60 * minutes
        self._measured_from: tuple[int, float] | None = None
        self._next = 0
        self._most = 0

    def last_step(self, step: int, steps: int, accelerator: Accelerator) -> int | None:
        """The new last step; None to leave it as it is. All processes must call it after every step.

        Args:
            step: steps done, including those of earlier runs.
            steps: the current last step.
            accelerator: the processes; the main one decides.
        """
        fit = self._fit(step, steps)
        if accelerator.num_processes > 1:
            here = torch.tensor(float(fit if accelerator.is_main_process else 0), device=accelerator.device)
            fit = int(accelerator.reduce(here, reduction="sum").item())
        return None if fit == steps else fit

    def _fit(self, step: int, steps: int) -> int:
        now = self._clock()
        if now >= self._deadline:
            return step
        if self._measured_from is None:  # the first step does not count, since it warms up too
            self._measured_from, self._next, self._most = (step, now), step + MEASURED_STEPS, steps
        if step < self._next:
            return steps
        begun, since = self._measured_from
        per_step = max(now - since, 1e-9) / (step - begun)
        fit = step + int((self._deadline - now) * (1 - RESERVE) / per_step)
        fit = max(step, min(self._most, fit))
        self._measured_from = step, now
        self._next = step + max(MEASURED_STEPS, (fit - step) // 2)
        return fit
