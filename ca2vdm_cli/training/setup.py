"""Training from Python: ``train`` decides what a run starts from, prepares it and trains a model.

The ``train`` command is flags, progress bars and a report around this function.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ca2vdm_cli.autoencoder import autoencoders
from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.config import Prediction, Preset, Trainable
from ca2vdm_cli.data import ClipSource
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.loading import build_model, find_weights
from ca2vdm_cli.memory import check_memory, training_needs
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import choose_backend
from ca2vdm_cli.presets import LoadedPreset, listed_overrides, load_preset
from ca2vdm_cli.processes import computes_half, launched, make_accelerator

from .callbacks import SMOOTHED_STEPS, TrainingCallbacks
from .inputs import Inputs, Machine, held_out_clips, open_source, training_data
from .log import StepReport
from .run_folder import AUTOENCODER_FILE, CHECKPOINTS, VALIDATION_FOLDER, WEIGHTS_FILE, Checkpoint, RunFolder
from .trainer import Trainer, training_loop, write_preset
from .validation import Validator
from .widen import widened, wider


@dataclass(frozen=True)
class TrainingResult:
    """Results of ``train``."""

    folder: Path
    """The run's folder, which ``Pipeline.load(result.folder)`` loads for sampling."""
    steps: int
    """Steps done, including those of earlier runs."""
    steps_this_run: int
    loss: float | None
    """Mean loss of the last ``SMOOTHED_STEPS`` steps; None if no step was left to do."""
    seconds: float
    """Time spent training, without the preparation."""
    frames: int
    """Frames that contributed to the loss in this run, over all processes."""
    data_seconds: float
    """Part of ``seconds`` spent waiting for clips."""
    processes: int
    clips: ClipSource
    """What was trained on. A data set's ``skipped`` says which videos were left out, and why."""


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

    An interrupt (Ctrl-C) takes effect after the current step, with a checkpoint to resume from. Under ``accelerate
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
        validation_data: held-out clips, like ``data``. If a data set has a test split, that split is used. By default,
            other synthetic clips, or else the training data.
        cache_latents: folder for the latents of all videos, which are then encoded only once.
        backend: attention backend, or ``auto`` for the best available one.
        device: a device's name, or ``auto``.
        force: train even if the estimate says that there is too little memory.
        callbacks: receives notes and progress.

    Raises:
        UsageError: an invalid request: unknown names, files that don't exist, settings that don't go together, ``out``
            that holds a run already.
        UserError: training failed: unusable data, weights that don't fit, a gradient that is not finite, a full disk.
        KeyboardInterrupt: after an interrupt, once the checkpoint is written.
    """
    callbacks = callbacks if callbacks is not None and launched()[0] == 0 else TrainingCallbacks()
    out = Path(out)
    last = _resumed_checkpoint(out, callbacks) if resume else None
    if last is None:
        _check_new_folder(out)
    elif launched()[0] == 0:
        RunFolder(out).publish(last.folder)  # a killed run may not have got that far
    inputs = Inputs(data, validation_data, cache_latents, teacher, seed).resumed(last)
    if widen and (resume or inputs.teacher is not None):
        raise UsageError("widen: this starts a new run; leave out `resume` and `teacher`")
    if last is None:
        preset, checkpoint = _starting_point(preset, checkpoint, inputs.teacher)
    elif preset is None and checkpoint is None:
        preset = out
    changes = [*listed_overrides(overrides), *([] if steps is None else [f"training.steps={steps}"])]
    loaded, weights = _load(preset, checkpoint, changes)
    if last is None and checkpoint is not None and weights is None:
        raise UsageError(f"checkpoint: {checkpoint} has no weights; train it first, or name a weights file")
    if widen and weights is None:
        raise UsageError(f"preset {loaded.name}: it has no weights to widen; give some with `checkpoint`")
    distill, starts = inputs.teacher is not None, resume or widen or checkpoint is not None
    config = _settled(loaded, widen=widen, distill=distill, starts=starts)
    accelerator = make_accelerator(
        device, config.training.precision, unused_parameters=_leaves_parameters_unused(config)
    )
    dtype = torch.bfloat16 if computes_half(config.training.precision, accelerator.device) else torch.float32
    machine = Machine(accelerator, choose_backend(backend, accelerator.device, dtype), dtype)
    needs = training_needs(
        config,
        dtype,
        scores=machine.backend.writes_scores,
        processes=accelerator.num_processes,
        sharded=accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"),
        teacher=distill,
    )
    check_memory(needs, accelerator.device, force=force)
    source = open_source(inputs.data, config, inputs.seed, "data")
    encoded = training_data(loaded, config, source, inputs, machine, out, callbacks, reuse=last is not None)
    frozen = None if inputs.teacher is None else _teacher(Path(inputs.teacher), config, machine)
    trainer = Trainer(config, encoded, machine.backend, accelerator, inputs.seed, frozen, inputs.facts)
    if last is not None:
        trainer.state.load(last)
    elif weights is not None and starts:
        tensors = load_tensors(weights)[0]
        if widen:
            tensors = widened(tensors, loaded.config.model, inputs.seed, str(weights))
        trainer.state.start_from(tensors, str(weights))
    validator = None
    if config.training.validate_every and accelerator.is_main_process:
        held_out = held_out_clips(inputs, source, config)
        validator = Validator(
            config, replace(encoded, source=held_out), machine.backend, machine.device, out / VALIDATION_FOLDER
        )
    if accelerator.is_main_process:
        write_preset(config, out)

    callbacks.on_start(trainer.step, config.training.steps)
    meter, first_step, started = _Meter(callbacks), trainer.step, time.perf_counter()
    training_loop(trainer, RunFolder(out, config.training.keep_checkpoints), meter.add, validator)
    return TrainingResult(
        folder=out,
        steps=trainer.step,
        steps_this_run=trainer.step - first_step,
        loss=meter.mean_loss,
        seconds=time.perf_counter() - started,
        frames=meter.frames,
        data_seconds=meter.data_seconds,
        processes=accelerator.num_processes,
        clips=encoded.source,
    )


class _Meter:
    """Adds up the step reports of one run."""

    def __init__(self, callbacks: TrainingCallbacks) -> None:
        self.frames, self.data_seconds = 0, 0.0
        self._callbacks = callbacks
        self._losses: deque[float] = deque(maxlen=SMOOTHED_STEPS)

    def add(self, report: StepReport) -> None:
        self.frames += report.frames
        self.data_seconds += report.data_seconds
        self._losses.append(report.loss)
        self._callbacks.on_step(report, sum(self._losses) / len(self._losses))

    @property
    def mean_loss(self) -> float | None:
        """Mean of the last losses; None before the first step."""
        return sum(self._losses) / len(self._losses) if self._losses else None


# What a run starts from


def _resumed_checkpoint(out: Path, callbacks: TrainingCallbacks) -> Checkpoint:
    """The newest complete checkpoint.

    Raises:
        UsageError: there is no run to resume.
        UserError: all of its checkpoints are damaged, or it is not a training run's.
    """
    last, problems = RunFolder(out).newest()
    if last is None and problems:
        raise UserError(f"out: {out} has no intact checkpoint left ({problems[0]}); start again in another folder")
    if last is None:
        raise UsageError(f"out: {out} has no {CHECKPOINTS}, so there is nothing to resume")
    if not re.fullmatch(r"[0-9]{1,20}", last.facts.get("seed", "")):
        raise UserError(f"{last.folder}: no seed, so it is not a training run's checkpoint; choose another run")
    for problem in problems:
        callbacks.note(f"{problem}; resuming from step {last.step}")
    return last


def _check_new_folder(out: Path) -> None:
    """Reject an unusable folder before anything is created.

    Raises:
        UsageError: a run or weights would be overwritten, or it is not a writable folder.
    """
    if RunFolder(out).begun:
        raise UsageError(f"out: {out} already holds a run; resume it (`resume`), or choose another folder")
    if (out / WEIGHTS_FILE).exists():
        raise UsageError(f"out: {out} already holds a {WEIGHTS_FILE}; choose another folder")
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"out: {nearest} is not a folder that you can write to; choose another")


def _starting_point(
    preset: str | Path | Preset | LoadedPreset | None, checkpoint: str | Path | None, teacher: str | Path | None
) -> tuple[str | Path | Preset | LoadedPreset | None, str | Path | None]:
    """The preset and checkpoint of a new run: a student starts from its teacher's weights unless others are given."""
    if teacher is None:
        return preset, checkpoint
    if Path(teacher).is_dir():
        if preset is not None:
            raise UsageError(f"teacher: the folder {teacher} has a preset of its own; leave out `preset`")
        if checkpoint is not None and Path(checkpoint).is_file():
            preset = teacher
    return preset, checkpoint or teacher


def _load(
    preset: str | Path | Preset | LoadedPreset | None, checkpoint: str | Path | None, overrides: Sequence[str]
) -> tuple[LoadedPreset, Path | None]:
    """The preset, and the weights that it or ``checkpoint`` names."""
    if not isinstance(preset, (Preset, LoadedPreset)):
        return find_weights(preset, checkpoint, overrides)
    loaded = load_preset(preset, overrides)
    return loaded, loaded.weights_path if checkpoint is None else find_weights(None, checkpoint)[1]


def _settled(loaded: LoadedPreset, *, widen: bool, distill: bool, starts: bool) -> Preset:
    """The preset as it is trained and written to the run's folder.

    Raises:
        UsageError: settings that can't be trained.
    """
    config = loaded.config
    if config.video is None:
        raise UsageError(f"preset {loaded.name}: it works on latents only; choose a preset with a video section")
    if config.training.trainable is not Trainable.ALL and not starts:
        trainable = config.training.trainable.value
        raise UsageError(f"training.trainable: {trainable} needs weights to start from; give them with `checkpoint`")
    sampling = config.sampling
    if distill:
        if config.diffusion.prediction is Prediction.EPSILON:
            raise UsageError("teacher: epsilon prediction can't be distilled; diffusion.prediction must be v or flow")
        sampling = replace(sampling, sampler=config.distillation.sampler.value, steps=config.distillation.steps)
    # absolute paths, so that the run can be sampled from any folder
    text, autoencoder = config.text, config.autoencoder
    if text is not None and Path(text.path).is_dir():
        text = replace(text, path=str(Path(text.path).resolve()))
    if autoencoder.path is not None and Path(autoencoder.path).is_dir():
        autoencoder = replace(autoencoder, path=str(Path(autoencoder.path).resolve()))
    return replace(
        config,
        model=wider(config.model) if widen else config.model,
        text=text,
        autoencoder=autoencoder,
        sampling=sampling,
        weights=WEIGHTS_FILE,
        autoencoder_weights=AUTOENCODER_FILE if autoencoders[config.autoencoder.kind].trained_here else None,
    )


def _leaves_parameters_unused(config: Preset) -> bool:
    """Whether some steps leave parameters without a gradient: those that read the prefix, when it is empty."""
    first_chunk_alone = config.training.first_chunk_share > 0
    return any(prefix == 0 and (first_chunk_alone or config.chunks(prefix) == 1) for prefix in config.prefixes)


def _teacher(weights: Path, config: Preset, machine: Machine) -> CausalVideoTransformer:
    """The model to distill, frozen: the student's preset with the teacher's weights."""
    path = find_weights(None, weights)[1]
    if path is None:
        raise UsageError(f"teacher: {weights} has no weights; name the teacher's weights, or its run")
    return build_model(config.model, machine.backend, device=machine.device, weights=path)
