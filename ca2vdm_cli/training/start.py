"""What a training run starts from: a folder, a preset, weights, a teacher, or an earlier run's checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ca2vdm_cli.autoencoder import autoencoders
from ca2vdm_cli.config import Prediction, Preset, Trainable
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.loading import build_model, find_weights
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.presets import LoadedPreset, load_preset

from .callbacks import TrainingCallbacks
from .checkpoints import Checkpoint
from .inputs import Machine
from .run_folder import AUTOENCODER_FILE, CHECKPOINTS, WEIGHTS_FILE, RunFolder
from .widen import wider


def resumed_checkpoint(out: Path, callbacks: TrainingCallbacks) -> Checkpoint:
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


def check_place(out: Path) -> None:
    """Reject a place for a run's folder before anything is created.

    Raises:
        UsageError: it is not a writable folder.
    """
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"out: {nearest} is not a folder that you can write to; choose another")


def check_unused(out: Path) -> None:
    """Raises UsageError if a new run would overwrite another run or weights."""
    if RunFolder(out).begun:
        raise UsageError(f"out: {out} already holds a run; resume it (`resume`), or choose another folder")
    if (out / WEIGHTS_FILE).exists():
        raise UsageError(f"out: {out} already holds a {WEIGHTS_FILE}; choose another folder")


def starting_point(
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


def load_start(
    preset: str | Path | Preset | LoadedPreset | None, checkpoint: str | Path | None, overrides: Sequence[str]
) -> tuple[LoadedPreset, Path | None]:
    """The preset, and the weights that it or ``checkpoint`` names."""
    if not isinstance(preset, (Preset, LoadedPreset)):
        return find_weights(preset, checkpoint, overrides)
    loaded = load_preset(preset, overrides)
    return loaded, loaded.weights_path if checkpoint is None else find_weights(None, checkpoint)[1]


def settled(loaded: LoadedPreset, *, widen: bool, distill: bool, starts: bool) -> Preset:
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


def leaves_parameters_unused(config: Preset) -> bool:
    """Whether some steps leave parameters without a gradient: those that read the prefix, when it is empty."""
    first_chunk_alone = config.training.first_chunk_share > 0
    return any(prefix == 0 and (first_chunk_alone or config.chunks(prefix) == 1) for prefix in config.prefixes)


def load_teacher(weights: Path, config: Preset, machine: Machine) -> CausalVideoTransformer:
    """The model to distill, frozen: the student's preset with the teacher's weights."""
    path = find_weights(None, weights)[1]
    if path is None:
        raise UsageError(f"teacher: {weights} has no weights; name the teacher's weights, or its run")
    return build_model(config.model, machine.backend, device=machine.device, weights=path)
