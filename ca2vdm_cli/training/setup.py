"""Training from Python: ``train`` decides what a run starts from, prepares it and trains a model.

The ``train`` command is flags, progress bars and a report around this function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ca2vdm_cli.config import Preset
from ca2vdm_cli.data import ClipSource
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.presets import LoadedPreset, listed_overrides
from ca2vdm_cli.processes import launched

from .callbacks import TrainingCallbacks
from .inputs import Inputs
from .run import Start, TrainingResult, prepare
from .run_folder import RunFolder
from .start import check_place, check_unused, resumed_checkpoint
from .time_limit import TimeLimit


def train(
    preset: str | Path | Preset | LoadedPreset | None = None,
    data: str | Path | ClipSource | None = None,
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    steps: int | None = None,
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    widen: bool = False,
    teacher: str | Path | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    validation_data: str | Path | ClipSource | None = None,
    cache_latents: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    force: bool = False,
    callbacks: TrainingCallbacks | None = None,
) -> TrainingResult:
    """Train a model, and its autoencoder first if that has no weights.

        import ca2vdm_cli

        result = ca2vdm_cli.train("tiny", "videos/", out="runs/mine", overrides={"training.batch_size": 4})
        print(f"loss {result.loss:.3f} after {result.steps} steps")
        pipeline = ca2vdm_cli.Pipeline.load(result.folder)

    An interrupt (Ctrl-C) takes effect after the current step, with a checkpoint to resume from. A script that passes a
    clip source of its own class to worker processes (``data.workers``) runs again in each of them, so it needs an
    ``if __name__ == "__main__":`` guard around this call. Under ``accelerate
    launch`` or ``torchrun``, every process calls this function with the same arguments.

    Args:
        preset: name, YAML file or folder of a preset, or a ``Preset`` object, whose files are relative to the working
            directory. By default, that of ``checkpoint`` or ``teacher``, or the resumed run's, or the default preset.
        data: a data set's folder or file, or an object with the methods of ``ClipSource`` (it is copied to the loader's
            processes if ``data.workers`` is set). By default, the resumed run's, or the preset's synthetic data.
        out: folder of the run; created if needed. It becomes a preset that can be sampled.
        overrides: changes to the preset: ``{"model.depth": 4}``, or ``["model.depth=4"]``, or nested dicts.
        steps: the last optimizer step, counted from the start of the run even if it is resumed; by default
            ``training.steps``.
        seed: seed of all randomness; by default 0, or the resumed run's.
        checkpoint: weights to start from (fine-tuning): a safetensors file, or a run's folder, which brings its preset.
        widen: double the width of the starting weights, without changing what they compute, and train that model.
        teacher: weights or run of a trained model, to distill into one that needs few steps.
        resume: continue the run in ``out`` from its newest checkpoint, with its own settings, data and seed unless
            given here.
        max_minutes: end after this time, the autoencoder's training included: after ten steps, the last step and the
            learning rate's schedule are fitted to it. ``training.steps`` is never exceeded.
        validation_data: held-out clips, like ``data``. If a data set has a test split, that split is used. By default,
            other synthetic clips, the training data's test split, or else the training data.
        cache_latents: folder for the latents of all videos, which are then encoded only once.
        backend: attention backend, or ``auto`` for the best available one.
        device: a device's name, or ``auto``.
        force: train even if the estimate says that there is too little memory.
        callbacks: receives notes and progress.

    Raises:
        UsageError: an invalid request: unknown names, files that don't exist, settings that don't go together, ``out``
            that holds a run already, or is in use by another training.
        UserError: training failed: unusable data, weights that don't fit, a gradient that is not finite, a full disk, a
            worker process that died. If steps were done, the last one is saved.
        KeyboardInterrupt: after an interrupt, once the checkpoint is written.
    """
    main = launched()[0] == 0
    callbacks = callbacks if callbacks is not None and main else TrainingCallbacks()
    limit = None if max_minutes is None else TimeLimit(_checked_minutes(max_minutes))
    out = Path(out)
    check_place(out)
    with RunFolder(out).locked() if main else nullcontext():
        last = resumed_checkpoint(out, callbacks) if resume else None
        if last is None:
            check_unused(out)
        elif main:
            RunFolder(out).publish(last.folder)  # a killed run may not have got that far
        inputs = Inputs(data, validation_data, cache_latents, teacher, seed).resumed(last)
        if widen and (resume or inputs.teacher is not None):
            raise UsageError("widen: this starts a new run; leave out `resume` and `teacher`")
        changes = [*listed_overrides(overrides), *([] if steps is None else [f"training.steps={steps}"])]
        start = Start(preset, checkpoint, changes, widen=widen, backend=backend, device=device, force=force)
        run = prepare(start, inputs, last, out, callbacks)
        return run.train(limit)


def _checked_minutes(minutes: float) -> float:
    if not 0 < minutes < math.inf:
        raise UsageError(f"max_minutes: {minutes} must be above 0")
    return minutes
