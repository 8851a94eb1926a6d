"""``train``: flags, a progress bar and a report around ``training.setup.train``."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path

from ca2vdm_cli.data import Clips
from ca2vdm_cli.data.clips import list_reasons
from ca2vdm_cli.processes import launched
from ca2vdm_cli.terminal import ProgressBar, clock, duration, note, print_json, size, urgent
from ca2vdm_cli.training.callbacks import TrainingCallbacks
from ca2vdm_cli.training.reports import StepReport, ValidationReport
from ca2vdm_cli.training.run import TrainingResult
from ca2vdm_cli.training.setup import train

MEASURED_STEPS = 10
"""Steps after which the time of the whole training is estimated."""
DECODER_LIMITS = 0.5
"""Share of a continuation's error from which on the decoder is said to limit the picture."""


def run(
    preset: str | None,
    *,
    data: Path | None,
    aspect: str | None,
    validation_data: Path | None,
    cache_latents: Path | None,
    out: Path,
    steps: int | None,
    checkpoint: Path | None,
    widen: bool,
    distill: Path | None,
    resume: bool,
    max_minutes: float | None,
    seed: int | None,
    backend: str,
    device: str,
    overrides: list[str],
    as_json: bool,
    quiet: bool,
    force: bool,
) -> None:
    """Train, and report the result."""
    main = launched()[0] == 0
    progress = _Progress(quiet=quiet or not main, limited=max_minutes is not None)
    try:
        result = train(
            preset,
            data,
            out=out,
            overrides=[*overrides, *([f"data.crop={aspect}"] if aspect else [])],
            steps=steps,
            seed=seed,
            checkpoint=checkpoint,
            widen=widen,
            teacher=distill,
            resume=resume,
            max_minutes=max_minutes,
            validation_data=validation_data,
            cache_latents=cache_latents,
            backend=backend,
            device=device,
            force=force,
            callbacks=progress,
        )
    except KeyboardInterrupt:
        progress.say_how_to_resume(out)
        raise
    finally:
        progress.close()
    if as_json and main:
        print_json(_as_json(result))
    elif not as_json:
        _print_result(result, quiet=quiet or not main)


class _Progress(TrainingCallbacks):
    """Shows one progress bar at a time: for the autoencoder, the latents, and the model."""

    def __init__(self, *, quiet: bool, limited: bool = False) -> None:
        self.quiet = quiet
        self._measured_steps = MEASURED_STEPS + 2 * limited  # once the last step is fitted to the limit
        self._step: int | None = None
        """Steps done; None before the model's training starts."""
        self._saved: int | None = None
        """The model's newest checkpoint; None if there is none."""
        self._autoencoder: int | None = None
        """Steps done while the autoencoder is trained, else None."""
        self._steps = 0
        self._ends: list[float] = []
        """When the first steps ended."""
        self._bar: ProgressBar | None = None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def say_how_to_resume(self, out: Path) -> None:
        """After an interrupt: where the run stands, and how to go on."""
        resume = f"continue with ca2vdm train --resume --out {out}"
        if self._saved is None:
            return
        if self._autoencoder is not None:
            self.note(f"interrupted at step {self._autoencoder} of the autoencoder: {resume}")
        elif self._step in (None, self._saved):
            self.note(f"interrupted at step {self._saved}: {resume}")
        else:
            self.note(f"interrupted at step {self._step}, and the last one that was saved is {self._saved}: {resume}")

    def note(self, message: str) -> None:
        self.close()
        note(message, quiet=self.quiet)

    def on_interrupt(self) -> None:
        urgent("stopping after this step; Ctrl-C again stops at once, without saving it", quiet=self.quiet)

    def on_autoencoder_start(self, step: int, steps: int) -> None:
        self._autoencoder = step
        self._open("autoencoder", steps, unit="steps", begun=step)

    def on_autoencoder_step(self, step: int, steps: int, loss: float) -> None:
        self._autoencoder = step
        bar = self._bar or self._open("autoencoder", steps, unit="steps", begun=step)
        bar.advance(finished=step, info=[f"loss {loss:.4f}"])
        if step == steps:
            self._autoencoder = None
            self.close()

    def on_encoded(self, videos: int, total: int) -> None:
        bar = self._bar or self._open("encoding", total, unit="videos")
        bar.count(videos, total)
        if videos == total:
            self.close()

    def on_start(self, step: int, steps: int) -> None:
        self._step = self._saved = step
        self._steps = steps
        self._open("training", steps, unit="steps", begun=step)

    def on_step(self, report: StepReport, mean_loss: float) -> None:
        if len(self._ends) < self._measured_steps:
            self._ends.append(time.monotonic())
            if len(self._ends) == self._measured_steps:
                self._say_how_long(report.step)
        bar = self._bar or self._open("training", self._steps, unit="steps", begun=self._step or 0)
        self._step = report.step
        speed = f"{report.frames / report.seconds:.0f} frames/s"
        info = [f"loss {mean_loss:.4f}", f"lr {report.learning_rate:.1e}", speed, size(report.memory_bytes)]
        bar.advance(finished=report.step, info=info)

    def on_new_last_step(self, steps: int) -> None:
        if steps != self._step:  # else it ends
            self.note(f"the last step is now {steps}, to end in time")
        self._steps = steps

    def on_saved(self, step: int) -> None:
        self._saved = step

    def on_validation(self, report: ValidationReport) -> None:
        self.note(_validation_line(report))

    def _say_how_long(self, step: int) -> None:
        per_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)  # the first step also warms up
        left = (self._steps - step) * per_step
        if left > 0:
            ends = (datetime.now() + timedelta(seconds=left)).strftime("%A, %H:%M")
            self.note(
                f"{self._steps - step} more steps at {duration(per_step)} each take about {clock(left)}, until {ends}"
            )

    def _open(self, description: str, total: int, *, unit: str, begun: int = 0) -> ProgressBar:
        self._bar = ProgressBar(
            description, total, total, quiet=self.quiet, unit=unit, begun=begun, lines=True
        ).__enter__()
        return self._bar


def _validation_line(report: ValidationReport) -> str:
    """What a validation found."""
    parts = [f"step {report.step}: held-out loss {report.loss:.4f}"]
    gain, share = report.gain, report.decoder_share
    if gain is not None and share is not None:
        verdict = "better" if gain > 0 else "NOT better"
        parts.append(
            f"continuation {report.continuation['psnr']:.1f} dB, {verdict} than repeating the last frame "
            f"({report.repeat_last_frame['psnr']:.1f} dB)"
        )
        decoder = f"autoencoder alone {report.reconstruction['psnr']:.1f} dB"
        if share > DECODER_LIMITS:
            decoder += f", {share:.0%} of the error: train its decoder longer (docs/training.md)"
        parts.append(decoder)
    parts.append(f"→ {report.sheet}")
    return "; ".join(parts)


def _as_json(result: TrainingResult) -> dict[str, object]:
    """The object of ``--json``."""
    return {
        "steps": result.steps,
        "seconds": result.seconds,
        "steps_this_run": result.steps_this_run,
        "trained_frames_per_second": result.frames / result.seconds,
        "data_share": result.data_seconds / result.seconds,
        "loss": result.loss,
        "processes": result.processes,
        "output": str(result.folder),
        "left_out": dict(result.clips.skipped) if isinstance(result.clips, Clips) else {},
        "damaged": result.clips.damaged_in_use() if isinstance(result.clips, Clips) else {},
    }


def _print_result(result: TrainingResult, *, quiet: bool) -> None:
    """The same for people."""
    lines = [f"{result.folder} is already at step {result.steps}; use --steps to train longer"]
    if result.loss is not None:
        share, speed = result.data_seconds / result.seconds, result.frames / result.seconds
        lines = [
            f"trained to step {result.steps} in {duration(result.seconds)}, loss {result.loss:.4f} → {result.folder}",
            f"  {speed:.0f} frames/s, {share:.0%} of the time waiting for data",
            f"  sample it with: ca2vdm sample --preset {result.folder}",
        ]
    clips = result.clips
    if isinstance(clips, Clips) and clips.skipped:
        lines.append(f"  skipped {len(clips.skipped)} of {clips.count} videos: {clips.reasons()}")
    if isinstance(clips, Clips) and (damaged := clips.damaged_in_use()):
        lines.append(f"  used {len(damaged)} damaged videos in part: {list_reasons(damaged)}")
    for line in lines:
        note(line, quiet=quiet)
