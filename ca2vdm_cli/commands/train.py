"""``train``: an autoencoder where one is needed, then the model."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..attention import Backend
from ..autoencoder import Autoencoder, ConvAutoencoder, load_autoencoder, save_autoencoder, train_autoencoder
from ..checkpoint import load_tensors, load_weights
from ..config import AutoencoderKind, Crop, Precision, Prediction, Preset, Split, Trainable
from ..data import Clips, ClipSource, cache_latents, open_clips
from ..errors import UsageError, UserError
from ..model import CausalVideoTransformer
from ..pipeline import find_weights
from ..plugins import choose_backend
from ..presets import LoadedPreset
from ..processes import make_accelerator
from ..run_folder import AUTOENCODER_FILE, CHECKPOINTS, WEIGHTS_FILE, Checkpoint, RunFolder
from ..terminal import ProgressBar, duration, note, print_json, size
from ..trainer import StepReport, Trainer, train, write_preset
from ..validation import Validator

SMOOTHED_STEPS = 50
"""Steps that a shown loss is averaged over."""
HELD_OUT = 1_000_003
"""Added to the seed for synthetic clips that are not trained on."""


def run(
    preset: str | None,
    data: Path | None,
    aspect: str | None,
    validation_data: Path | None,
    latents: Path | None,
    out: Path,
    steps: int | None,
    checkpoint: Path | None,
    distill: Path | None,
    resume: bool,
    seed: int | None,
    backend: str,
    device: str,
    overrides: list[str],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train and say how it went."""
    last = _check_folder(out, resume, quiet)
    stored = last.facts if last is not None else {}
    if resume and preset is None and checkpoint is None:
        preset = str(out)
    if distill is None and stored.get("teacher"):
        distill = Path(stored["teacher"])
    if distill is not None and not distill.exists():
        raise UsageError(f"--distill {distill}: no such file or folder; name the teacher's weights, or its run")
    if distill is not None and distill.is_dir() and preset is not None and not resume:
        raise UsageError(f"--distill {distill}: the folder has a preset of its own; leave out --preset {preset}")
    if distill is not None and checkpoint is None and not resume:
        checkpoint = distill  # where the student begins
    loaded, weights = find_weights(preset, checkpoint, overrides)
    config = loaded.config
    if distill is not None and config.diffusion.prediction is Prediction.EPSILON:
        raise UsageError("--distill: epsilon says nothing of the latents where all is noise; it takes v or flow")
    if config.training.trainable is not Trainable.ALL and checkpoint is None and not resume:
        raise UsageError(
            f"training.trainable: {config.training.trainable.value} needs weights to begin from, --checkpoint"
        )
    if config.video is None:
        raise UsageError(f"preset {loaded.name}: it works on latents only, and there is no data for those")
    without_prefix = not config.training.parallel_chunks and config.diffusion.unconditional_start
    accelerator = make_accelerator(device, config.training.precision, unused_parameters=without_prefix)
    quiet = quiet or not accelerator.is_main_process
    as_json = as_json and accelerator.is_main_process
    where = accelerator.device
    half = config.training.precision is Precision.BFLOAT16
    chosen = choose_backend(backend, where, torch.bfloat16 if half else torch.float32)
    config = replace(
        config,
        training=replace(config.training, steps=steps or config.training.steps),
        weights=WEIGHTS_FILE,
        autoencoder_weights=AUTOENCODER_FILE if config.autoencoder.kind is AutoencoderKind.CONV else None,
    )
    run_seed = int(stored.get("seed", 0)) if seed is None else seed
    if last is not None and run_seed != int(stored["seed"]):
        raise UsageError(f"--seed {seed}: the run in {out} has seed {stored['seed']}; leave out --seed")
    if data is None and stored.get("origin"):
        data = Path(stored["origin"])
    if validation_data is None and stored.get("validation"):
        validation_data = Path(stored["validation"])
    if latents is None and stored.get("latents"):
        latents = Path(stored["latents"])
    fit = Crop(aspect or stored.get("aspect") or config.data.crop)
    config = replace(config, data=replace(config.data, crop=fit))
    source = open_clips(data, config, run_seed, config.clip_frames)
    with accelerator.main_process_first():  # which trains and writes the autoencoder; the others read it
        autoencoder = _autoencoder(loaded, config, source, out, where, run_seed, quiet)
        clips = source if latents is None else _encoded(source, autoencoder, config, latents, where, quiet)
    teacher = None if distill is None else _teacher(distill, config, chosen, where)
    if teacher is not None:
        sampling = replace(config.sampling, sampler="trailing", steps=config.distillation.steps)
        config = replace(config, sampling=sampling)
    origin = {} if data is None else {"origin": str(data.resolve()), "aspect": fit.value}
    origin |= {} if validation_data is None else {"validation": str(validation_data.resolve())}
    origin |= {} if latents is None else {"latents": str(latents.resolve())}
    origin |= {} if distill is None else {"teacher": str(distill.resolve())}
    trainer = Trainer(config, clips, autoencoder, chosen, accelerator, config.training.steps, run_seed, origin, teacher)
    if last is not None:
        trainer.resume(last)
    elif checkpoint is not None and weights is not None:
        trainer.start_from(load_tensors(weights)[0], str(weights))
    folder = RunFolder(out, config.training.keep_checkpoints)
    validator = None
    if config.training.validate_every and accelerator.is_main_process:
        held_out = _held_out(source, data, validation_data, config, run_seed)
        prefixes = trainer.trained_prefixes
        validator = Validator(config, held_out, autoencoder, chosen, where, prefixes, out / "validation")
    if accelerator.is_main_process:
        write_preset(config, out)
    began, first_step, frames = time.perf_counter(), trainer.step, 0
    losses: list[float] = []
    bar = ProgressBar("training", trainer.steps, trainer.steps, quiet=quiet, unit="steps", begun=trainer.step)

    waited = 0.0

    def on_step(report: StepReport) -> None:
        nonlocal frames, waited
        frames, waited = frames + report.frames, waited + report.data_seconds
        losses.append(report.loss)
        rate = report.frames / report.seconds
        numbers = f"loss {_smooth(losses):.4f}  lr {report.learning_rate:.1e}  {rate:.0f} frames/s"
        bar.advance(finished=report.step, info=f"{numbers}  {size(report.memory_bytes)}")

    try:
        with bar:
            train(trainer, folder, on_step, validator)
    except KeyboardInterrupt:
        note(f"interrupted at step {trainer.step}: go on with ca2vdm train --resume --out {out}", quiet=quiet)
        raise
    seconds = time.perf_counter() - began
    loss = _smooth(losses) if losses else None
    if as_json:
        print_json(
            {
                "steps": trainer.step,
                "seconds": seconds,
                "steps_this_run": trainer.step - first_step,
                "trained_frames_per_second": frames / seconds,
                "data_share": waited / seconds,
                "loss": loss,
                "processes": accelerator.num_processes,
                "output": str(out),
            }
        )
    elif loss is None:
        note(f"{out} is at step {trainer.step} already; ask for more with --steps", quiet=quiet)
    else:
        note(f"trained to step {trainer.step} in {duration(seconds)}, loss {loss:.4f} → {out}", quiet=quiet)
        note(f"  {frames / seconds:.0f} frames/s, {waited / seconds:.0%} of the time waiting for data", quiet=quiet)
        note(f"  sample it with: ca2vdm sample --preset {out}", quiet=quiet)
    if isinstance(clips, Clips) and clips.skipped and not as_json:
        note(f"  left out {len(clips.skipped)} of {clips.count} videos: {clips.reasons()}", quiet=quiet)


def _smooth(losses: list[float]) -> float:
    """Mean of the last steps'."""
    last = losses[-SMOOTHED_STEPS:]
    return sum(last) / len(last)


def _check_folder(out: Path, resume: bool, quiet: bool) -> Checkpoint | None:
    """Refuse a folder that can't be used, before anything is made; returns what to resume from.

    Raises:
        UsageError: there is no run to resume, or one that would be overwritten, or no folder to write to.
        UserError: what is there can't be gone on from.
    """
    folder = RunFolder(out)
    if resume:
        last, problems = folder.newest()
        if last is None and problems:
            raise UserError(f"--out {out}: no whole checkpoint is left ({problems[0]})")
        if last is None:
            raise UsageError(f"--out {out}: no {CHECKPOINTS} there, so there is nothing to resume")
        known = last.facts.get("aspect", Crop.STRETCH) in list(Crop)
        if not known or not re.fullmatch(r"[0-9]{1,20}", last.facts.get("seed", "")):
            raise UserError(f"{last.folder}: it has no seed, or an unknown aspect; not a training run's checkpoint")
        for problem in problems:
            note(f"{problem}; going on from step {last.step}", quiet=quiet)
        return last
    if folder.begun:
        raise UsageError(f"--out {out}: holds a run already; go on with --resume, or choose another folder")
    if (out / WEIGHTS_FILE).exists():
        raise UsageError(f"--out {out}: holds a {WEIGHTS_FILE} already; choose another folder")
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"--out {out}: {nearest} is not a folder that you can write to; choose another")
    return None


def _held_out(source: ClipSource, data: Path | None, held_out: Path | None, config: Preset, seed: int) -> ClipSource:
    """Clips to validate on: of ``--validation-data`` the test part, where it has one; else the training data's."""
    if held_out is None:
        return source if data is not None else open_clips(None, config, seed + HELD_OUT, config.clip_frames)
    test = replace(config, data=replace(config.data, split=Split.TEST))
    try:
        return open_clips(held_out, test, seed, config.clip_frames)
    except UsageError:  # it has no parts
        return open_clips(held_out, config, seed, config.clip_frames)


def _teacher(weights: Path, config: Preset, backend: Backend, device: torch.device) -> CausalVideoTransformer:
    """The model to distill, frozen: the student's preset with the teacher's weights."""
    path = find_weights(None, weights)[1]
    if path is None:
        raise UsageError(f"--distill {weights}: no weights there")
    teacher = CausalVideoTransformer(config.model, backend).to(device).eval().requires_grad_(False)
    load_weights(teacher, load_tensors(path)[0], str(path))
    return teacher


def _encoded(
    source: ClipSource, autoencoder: Autoencoder, config: Preset, folder: Path, device: torch.device, quiet: bool
) -> ClipSource:
    """The clips as latents, of videos that are encoded once and kept in ``folder``."""
    with ProgressBar("encoding", 1, 1, quiet=quiet, unit="videos") as bar:
        clips, report = cache_latents(
            source, autoencoder, config.autoencoder, folder, device, lambda done, total: bar.count(done, total)
        )
    for name, reason in report.stale.items():
        note(f"{folder}: the entry of {name} was stale ({reason}) and is encoded anew", quiet=quiet)
    note(f"{folder}: {report.encoded} videos encoded, {report.reused} found there", quiet=quiet)
    return clips


def _autoencoder(
    loaded: LoadedPreset, config: Preset, source: ClipSource, out: Path, device: torch.device, seed: int, quiet: bool
) -> Autoencoder:
    """The preset's autoencoder; a conv one without weights is trained first. A copy goes beside the weights."""
    assert config.video is not None
    kept = out / AUTOENCODER_FILE
    path = kept if kept.is_file() else loaded.autoencoder_weights_path
    torch.manual_seed(seed)
    autoencoder = load_autoencoder(config.autoencoder, config.video, config.model.in_channels, path)
    autoencoder.to(device)
    if not isinstance(autoencoder, ConvAutoencoder):
        return autoencoder
    if path is None:
        steps = config.training.autoencoder_steps
        if not steps:
            raise UsageError(
                f"preset {loaded.name}: its autoencoder has no weights; --set training.autoencoder_steps=N"
            )
        with ProgressBar("autoencoder", steps, steps, quiet=quiet, unit="steps") as bar:
            train_autoencoder(
                autoencoder,
                source,
                config.training,
                seed,
                lambda step, loss: bar.advance(finished=step, info=f"loss {loss:.4f}"),
            )
    if path != kept:
        out.mkdir(parents=True, exist_ok=True)
        save_autoencoder(autoencoder, kept)
        # as stored, so rounded: what sampling and a resumed run will see
        autoencoder = load_autoencoder(config.autoencoder, config.video, config.model.in_channels, kept).to(device)
    return autoencoder
