"""``train``: an autoencoder where one is needed, then the model."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ca2vdm_cli.autoencoder import Autoencoder, ConvAutoencoder, autoencoders, load_autoencoder, save_autoencoder
from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.config import Crop, Prediction, Preset, Split, Trainable
from ca2vdm_cli.data import Clips, ClipSource, cache_latents, open_clips
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.loading import build_model, find_weights
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import choose_backend
from ca2vdm_cli.presets import LoadedPreset
from ca2vdm_cli.processes import computes_half, launched, make_accelerator
from ca2vdm_cli.terminal import ProgressBar, duration, note, print_json, size
from ca2vdm_cli.text_encoder import TextEncoder
from ca2vdm_cli.training.autoencoder import train_autoencoder
from ca2vdm_cli.training.log import StepReport
from ca2vdm_cli.training.run_folder import AUTOENCODER_FILE, CHECKPOINTS, WEIGHTS_FILE, Checkpoint, RunFolder
from ca2vdm_cli.training.trainer import Trainer, train, write_preset
from ca2vdm_cli.training.validation import Validator

SMOOTHED_STEPS = 50
"""Steps that a shown loss is averaged over."""
HELD_OUT = 1_000_003
"""Added to the seed for synthetic clips that are not trained on."""


@dataclass(frozen=True)
class Request:
    """The flags of ``train``."""

    preset: str | None
    data: Path | None
    aspect: str | None
    validation_data: Path | None
    cache_latents: Path | None
    out: Path
    steps: int | None
    checkpoint: Path | None
    distill: Path | None
    resume: bool
    seed: int | None
    backend: str
    device: str
    overrides: list[str]
    as_json: bool
    quiet: bool

    def remembering(self, last: Checkpoint | None) -> Request:
        """What the run to go on with was asked, where nothing else is said now.

        Raises:
            UsageError: another seed than the run's, or a teacher that can't be.
        """
        facts = {} if last is None else last.facts
        if last is not None and self.seed is not None and str(self.seed) != facts["seed"]:
            raise UsageError(f"--seed {self.seed}: the run in {self.out} has seed {facts['seed']}; leave out --seed")

        def path(given: Path | None, name: str) -> Path | None:
            return given or (Path(facts[name]) if facts.get(name) else None)

        distill, preset, checkpoint = path(self.distill, "teacher"), self.preset, self.checkpoint
        if distill is not None and not distill.exists():
            raise UsageError(f"--distill {distill}: no such file or folder; name the teacher's weights, or its run")
        if last is None and distill is not None:
            if distill.is_dir() and preset is not None:
                raise UsageError(
                    f"--distill {distill}: the folder has a preset of its own; leave out --preset {preset}"
                )
            if checkpoint is not None and checkpoint.is_file() and distill.is_dir():
                preset = str(distill)
            checkpoint = checkpoint or distill  # where the student begins
        if last is not None and preset is None and checkpoint is None:
            preset = str(self.out)
        return replace(
            self,
            preset=preset,
            checkpoint=checkpoint,
            distill=distill,
            data=path(self.data, "origin"),
            validation_data=path(self.validation_data, "validation"),
            cache_latents=path(self.cache_latents, "latents"),
            seed=int(facts.get("seed", 0)) if self.seed is None else self.seed,
        )

    @property
    def facts(self) -> dict[str, str]:
        """What is to be remembered."""
        paths = {
            "origin": self.data,
            "validation": self.validation_data,
            "latents": self.cache_latents,
            "teacher": self.distill,
        }
        return {name: str(path.resolve()) for name, path in paths.items() if path is not None}


def run(request: Request) -> None:
    """Train and say how it went."""
    out = request.out
    last = _check_folder(out, request.resume, request.quiet)
    if last is not None and launched()[0] == 0:
        RunFolder(out).publish(last.folder)  # a killed run may not have come so far
    request = request.remembering(last)
    seed = request.seed or 0
    loaded, weights = find_weights(request.preset, request.checkpoint, request.overrides)
    config = _settled(loaded, request)
    alone = config.training.first_chunk_share > 0
    unused = any(prefix == 0 and (alone or config.chunks(prefix) == 1) for prefix in config.prefixes)
    accelerator = make_accelerator(request.device, config.training.precision, unused_parameters=unused)
    main, device = accelerator.is_main_process, accelerator.device
    quiet = request.quiet or not main
    half = computes_half(config.training.precision, device)
    backend = choose_backend(request.backend, device, torch.bfloat16 if half else torch.float32)
    source = open_clips(request.data, config, seed, config.clip_frames)
    clips, cache = source, request.cache_latents
    with accelerator.main_process_first():  # which trains and writes the autoencoder; the others read it
        kept = last is not None or not main
        autoencoder = _autoencoder(loaded, config, source, out, device, seed, quiet, kept=kept)
        if cache is not None:
            clips = _encoded(source, autoencoder, config, cache, device, quiet)
    teacher = None if request.distill is None else _teacher(request.distill, config, backend, device)
    with accelerator.main_process_first():  # it may come from the hub
        text = _text_encoder(config, source, device, half, quiet)
    steps, facts = config.training.steps, request.facts
    trainer = Trainer(config, clips, autoencoder, backend, accelerator, steps, seed, facts, teacher, text)
    if last is not None:
        trainer.resume(last)
    elif request.checkpoint is not None and weights is not None:
        trainer.start_from(load_tensors(weights)[0], str(weights))
    validator = None
    if config.training.validate_every and main:
        held_out = _held_out(source, request, config, seed)
        prefixes = trainer.trained_prefixes
        validator = Validator(config, held_out, autoencoder, backend, device, prefixes, out / "validation", text)
    if main:
        write_preset(config, out)
    tally = _Tally(trainer)
    bar = ProgressBar("training", steps, steps, quiet=quiet, unit="steps", begun=trainer.step)

    def on_step(report: StepReport) -> None:
        tally.add(report)
        numbers = f"loss {tally.loss:.4f}  lr {report.learning_rate:.1e}  {report.frames / report.seconds:.0f} frames/s"
        bar.advance(finished=report.step, info=f"{numbers}  {size(report.memory_bytes)}")

    try:
        with bar:
            train(trainer, RunFolder(out, config.training.keep_checkpoints), on_step, validator)
    except KeyboardInterrupt:
        note(f"interrupted at step {trainer.step}: go on with ca2vdm train --resume --out {out}", quiet=quiet)
        raise
    if request.as_json:
        if main:
            left_out = dict(clips.skipped) if isinstance(clips, Clips) else {}
            print_json({**tally.report(out), "left_out": left_out})
        return
    tally.say(out, quiet)
    if isinstance(clips, Clips) and clips.skipped:
        note(f"  left out {len(clips.skipped)} of {clips.count} videos: {clips.reasons()}", quiet=quiet)


class _Tally:
    """What a run has done so far."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.first_step, self.began = trainer, trainer.step, time.perf_counter()
        self.frames, self.waited = 0, 0.0
        self._losses: deque[float] = deque(maxlen=SMOOTHED_STEPS)

    def add(self, report: StepReport) -> None:
        """Count a step."""
        self.frames += report.frames
        self.waited += report.data_seconds
        self._losses.append(report.loss)

    @property
    def loss(self) -> float | None:
        """Mean of the last steps'; None before the first."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def report(self, out: Path) -> dict[str, object]:
        """The object of ``--json``."""
        seconds = time.perf_counter() - self.began
        return {
            "steps": self.trainer.step,
            "seconds": seconds,
            "steps_this_run": self.trainer.step - self.first_step,
            "trained_frames_per_second": self.frames / seconds,
            "data_share": self.waited / seconds,
            "loss": self.loss,
            "processes": self.trainer.accelerator.num_processes,
            "output": str(out),
        }

    def say(self, out: Path, quiet: bool) -> None:
        """The same for people."""
        seconds, step = time.perf_counter() - self.began, self.trainer.step
        if self.loss is None:
            note(f"{out} is at step {step} already; ask for more with --steps", quiet=quiet)
            return
        note(f"trained to step {step} in {duration(seconds)}, loss {self.loss:.4f} → {out}", quiet=quiet)
        share = self.waited / seconds
        note(f"  {self.frames / seconds:.0f} frames/s, {share:.0%} of the time waiting for data", quiet=quiet)
        note(f"  sample it with: ca2vdm sample --preset {out}", quiet=quiet)


def _settled(loaded: LoadedPreset, request: Request) -> Preset:
    """The preset as it is trained and left beside the weights.

    Raises:
        UsageError: settings that can't be trained.
    """
    config, begins = loaded.config, request.checkpoint is not None or request.resume
    if config.video is None:
        raise UsageError(f"preset {loaded.name}: it works on latents only, and there is no data for those")
    if config.training.trainable is not Trainable.ALL and not begins:
        kind = config.training.trainable.value
        raise UsageError(f"training.trainable: {kind} needs weights to begin from; name them with --checkpoint")
    sampling = config.sampling
    if request.distill is not None:
        if config.diffusion.prediction is Prediction.EPSILON:
            raise UsageError("--distill: epsilon says nothing of the latents where all is noise; it takes v or flow")
        sampling = replace(sampling, sampler=config.distillation.sampler.value, steps=config.distillation.steps)
    # the run may be sampled from another folder
    text, autoencoder = config.text, config.autoencoder
    if text is not None and Path(text.path).is_dir():
        text = replace(text, path=str(Path(text.path).resolve()))
    if autoencoder.path is not None and Path(autoencoder.path).is_dir():
        autoencoder = replace(autoencoder, path=str(Path(autoencoder.path).resolve()))
    return replace(
        config,
        text=text,
        autoencoder=autoencoder,
        training=replace(config.training, steps=request.steps or config.training.steps),
        sampling=sampling,
        data=replace(config.data, crop=Crop(request.aspect or config.data.crop)),
        weights=WEIGHTS_FILE,
        autoencoder_weights=AUTOENCODER_FILE if autoencoders[config.autoencoder.kind].trained_here else None,
    )


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
            raise UserError(f"--out {out}: no whole checkpoint is left ({problems[0]}); begin again in another folder")
        if last is None:
            raise UsageError(f"--out {out}: no {CHECKPOINTS} there, so there is nothing to resume")
        if not re.fullmatch(r"[0-9]{1,20}", last.facts.get("seed", "")):
            raise UserError(f"{last.folder}: no seed, so it is not a training run's checkpoint; choose another run")
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


def _held_out(source: ClipSource, request: Request, config: Preset, seed: int) -> ClipSource:
    """Clips to validate on: of ``--validation-data`` the test part, where it has one; else the training data's."""
    if request.validation_data is None:
        return source if request.data is not None else open_clips(None, config, seed + HELD_OUT, config.clip_frames)
    test = replace(config, data=replace(config.data, split=Split.TEST))
    try:
        return open_clips(request.validation_data, test, seed, config.clip_frames)
    except UsageError:  # it has no parts
        return open_clips(request.validation_data, config, seed, config.clip_frames)


def _teacher(weights: Path, config: Preset, backend: Backend, device: torch.device) -> CausalVideoTransformer:
    """The model to distill, frozen: the student's preset with the teacher's weights."""
    path = find_weights(None, weights)[1]
    if path is None:
        raise UsageError(f"--distill {weights}: no weights there; name the teacher's weights, or its run")
    return build_model(config.model, backend, device=device, weights=path)


def _text_encoder(
    config: Preset, source: ClipSource, device: torch.device, half: bool, quiet: bool
) -> TextEncoder | None:
    """What encodes captions, where the preset names it."""
    if config.text is not None:
        return TextEncoder(config.text, config.model, device, torch.bfloat16 if half else torch.float32)
    if config.model.text_channels and isinstance(source, Clips) and any(video.caption for video in source.videos):
        note("captions are there, and no text encoder: text.path names none; they are not learned from", quiet=quiet)
    return None


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
    note(f"{folder}: latents of {report.encoded} videos made, of {report.reused} found there", quiet=quiet)
    return clips


def _autoencoder(
    loaded: LoadedPreset,
    config: Preset,
    source: ClipSource,
    out: Path,
    device: torch.device,
    seed: int,
    quiet: bool,
    *,
    kept: bool,
) -> Autoencoder:
    """The preset's autoencoder, or the one ``kept`` in the run's folder.

    One of ours without weights is trained first. A copy goes beside the weights.
    """
    assert config.video is not None
    copy = out / AUTOENCODER_FILE
    path = copy if kept and copy.is_file() else loaded.autoencoder_weights_path
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
    if path != copy:
        out.mkdir(parents=True, exist_ok=True)
        save_autoencoder(autoencoder, copy)
        # as stored, so rounded: what sampling and a resumed run will see
        autoencoder = load_autoencoder(config.autoencoder, config.video, config.model.in_channels, copy).to(device)
    return autoencoder
