"""One training run: what it is trained with, and its two parts, the autoencoder and the model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ca2vdm_cli.autoencoder import ConvAutoencoder
from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.config import Preset
from ca2vdm_cli.data import Clips, ClipSource, check_cacheable
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.memory import check_memory, training_needs
from ca2vdm_cli.plugins import choose_backend
from ca2vdm_cli.presets import LoadedPreset
from ca2vdm_cli.processes import computes_half, make_accelerator

from .batches import TrainingData
from .callbacks import SMOOTHED_STEPS, TrainingCallbacks
from .checkpoints import Checkpoint
from .encoders import complete_autoencoder, copy_given_weights, open_autoencoder, read_back, report_reconstruction
from .held_out import HeldOut, held_out_clips
from .inputs import Inputs, Machine, cached_clips, open_source, open_text_encoder
from .loop import training_loop
from .reports import StepReport
from .run_folder import AUTOENCODER_FILE, VALIDATION_FOLDER, RunFolder
from .start import leaves_parameters_unused, load_start, load_teacher, settled, starting_point
from .time_limit import TimeLimit
from .trainer import Trainer, write_preset
from .validation import Validator
from .widen import widened


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


@dataclass(frozen=True)
class Start:
    """What ``train`` starts from and where it computes; see there."""

    preset: str | Path | Preset | LoadedPreset | None
    checkpoint: str | Path | None
    changes: Sequence[str]
    widen: bool
    backend: str
    device: str
    force: bool


def prepare(start: Start, inputs: Inputs, last: Checkpoint | None, out: Path, callbacks: TrainingCallbacks) -> Run:
    """Everything that ``train`` trains with, except for an autoencoder that has yet to be trained.

    Nothing is written before all of it is known to fit together.
    """
    preset, checkpoint, changes, widen = start.preset, start.checkpoint, start.changes, start.widen
    if last is None:
        preset, checkpoint = starting_point(preset, checkpoint, inputs.teacher)
    elif preset is None and checkpoint is None:
        preset = out
        if last.step == 0 and not (out / AUTOENCODER_FILE).is_file():  # it was being trained
            changes = ["autoencoder_weights=", *changes]
    loaded, weights = load_start(preset, checkpoint, changes)
    if last is None and checkpoint is not None and weights is None:
        raise UsageError(f"checkpoint: {checkpoint} has no weights; train it first, or name a weights file")
    if widen and weights is None:
        raise UsageError(f"preset {loaded.name}: it has no weights to widen; give some with `checkpoint`")
    distill, starts = inputs.teacher is not None, last is not None or widen or checkpoint is not None
    config = settled(loaded, widen=widen, distill=distill, starts=starts)
    accelerator = make_accelerator(
        start.device, config.training.precision, unused_parameters=leaves_parameters_unused(config)
    )
    dtype = torch.bfloat16 if computes_half(config.training.precision, accelerator.device) else torch.float32
    machine = Machine(accelerator, choose_backend(start.backend, accelerator.device, dtype), dtype)
    source = open_source(inputs.data, config, inputs.seed, "data")
    needs = training_needs(
        config,
        dtype,
        scores=machine.backend.writes_scores,
        processes=accelerator.num_processes,
        sharded=accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"),
        teacher=distill,
    )
    check_memory(needs, accelerator.device, force=start.force)
    for line in source.notes if isinstance(source, Clips) else ():
        callbacks.note(line)
    if inputs.cache_latents is not None:
        check_cacheable(source)
    autoencoder, given = open_autoencoder(loaded, config, out, machine.device, inputs.seed, reuse=last is not None)
    encoded = TrainingData(source, autoencoder, open_text_encoder(config, source, machine, callbacks))
    frozen = None if inputs.teacher is None else load_teacher(Path(inputs.teacher), config, machine)
    trainer = Trainer(config, encoded, machine.backend, accelerator, inputs.seed, frozen, inputs.facts)
    if last is not None:
        trainer.state.load(last)
    elif weights is not None and starts:
        tensors = load_tensors(weights)[0]
        if widen:
            tensors = widened(tensors, loaded.config.model, inputs.seed, str(weights))
        trainer.state.start_from(tensors, str(weights))
    run = Run(config, encoded, trainer, inputs, machine, RunFolder(out, config.training.keep_checkpoints), callbacks)
    run.begin(given, new=last is None)
    return run


class Run:
    """A run that is ready to be trained. Created by ``prepare``."""

    def __init__(
        self,
        config: Preset,
        data: TrainingData,
        trainer: Trainer,
        inputs: Inputs,
        machine: Machine,
        folder: RunFolder,
        callbacks: TrainingCallbacks,
    ) -> None:
        self.config, self.data, self.trainer, self.inputs, self.machine = config, data, trainer, inputs, machine
        self.folder, self.callbacks, self.pixels = folder, callbacks, data.source
        self.main = machine.accelerator.is_main_process
        self.validator: Validator | None = None
        self.held_out: HeldOut | None = None
        if config.training.validate_every and self.main:
            self.held_out = held_out_clips(inputs, data.source, config)
            if self.held_out.seen:
                callbacks.note(
                    f"validation reads clips that training sees too ({self.held_out.seen}); give held-out videos as "
                    "validation data to measure more than memory"
                )
            title = "clips that training sees, " if self.held_out.seen else "held-out clips, "
            self.validator = Validator(
                config,
                replace(data, source=self.held_out.source),
                machine.backend,
                machine.device,
                folder.path / VALIDATION_FOLDER,
                self.held_out.clips,
                title,
            )

    def begin(self, given: Path | None, *, new: bool) -> None:
        """Write the preset and a first checkpoint, from which the run can be resumed whatever happens next."""
        if self.main:
            if new:
                copy_given_weights(self.data.autoencoder, given, self.folder.path)
            write_preset(self.config, self.folder.path)
        if new:
            self.trainer.save(self.folder)
            self.callbacks.on_saved(0)

    def train(self, limit: TimeLimit | None) -> TrainingResult:
        """Train what is left to train: the autoencoder, then the model."""
        self._complete_data()
        trainer, callbacks = self.trainer, self.callbacks
        callbacks.on_start(trainer.step, self.config.training.steps)
        meter, first_step, started = _Meter(callbacks), trainer.step, time.perf_counter()
        training_loop(trainer, self.folder, meter.add, self.validator, callbacks, limit, saved=trainer.step)
        return TrainingResult(
            folder=self.folder.path,
            steps=trainer.step,
            steps_this_run=trainer.step - first_step,
            loss=meter.mean_loss,
            seconds=time.perf_counter() - started,
            frames=meter.frames,
            data_seconds=meter.data_seconds,
            processes=self.machine.accelerator.num_processes,
            clips=self.data.source,
        )

    def _complete_data(self) -> None:
        """Train the autoencoder if need be, and cache latents."""
        autoencoder, inputs, device = self.data.autoencoder, self.inputs, self.machine.device
        with self.machine.accelerator.main_process_first():  # it trains and encodes, the others read
            if isinstance(autoencoder, ConvAutoencoder):
                if self.main:
                    self._complete_autoencoder(autoencoder)
                else:
                    read_back(autoencoder, self.folder.path / AUTOENCODER_FILE)
            if inputs.cache_latents is not None:
                folder = Path(inputs.cache_latents)
                self.data.source = cached_clips(self.pixels, autoencoder, self.config, folder, device, self.callbacks)

    def _complete_autoencoder(self, autoencoder: ConvAutoencoder) -> None:
        device, seed, out = self.machine.device, self.inputs.seed, self.folder.path
        if not complete_autoencoder(autoencoder, self.config, self.pixels, self.folder, device, seed, self.callbacks):
            return
        with suppress(UserError):  # the validation data can't be read, and may not be needed
            held_out = self.held_out or held_out_clips(self.inputs, self.pixels, self.config)
            where = "training frames" if held_out.seen else "held-out frames"
            self.callbacks.note(report_reconstruction(autoencoder, held_out.source, where, out, device))


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
