"""``train``: flags, a progress bar and a report around ``training.setup.train``."""

from __future__ import annotations

from pathlib import Path

from ca2vdm_cli.data import Clips
from ca2vdm_cli.data.clips import list_reasons
from ca2vdm_cli.processes import launched
from ca2vdm_cli.terminal import ProgressBar, duration, note, print_json, size
from ca2vdm_cli.training.callbacks import TrainingCallbacks
from ca2vdm_cli.training.log import StepReport
from ca2vdm_cli.training.setup import TrainingResult, train


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
    progress = _Progress(quiet=quiet or not main)
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
            validation_data=validation_data,
            cache_latents=cache_latents,
            backend=backend,
            device=device,
            force=force,
            callbacks=progress,
        )
    except KeyboardInterrupt:
        if progress.step is not None:
            progress.note(f"interrupted at step {progress.step}: continue with ca2vdm train --resume --out {out}")
        raise
    finally:
        progress.close()
    if as_json and main:
        print_json(_as_json(result))
    elif not as_json:
        _print_result(result, quiet=quiet or not main)


class _Progress(TrainingCallbacks):
    """Shows one progress bar at a time: for the autoencoder, the latents, and the model."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.step: int | None = None
        """Steps done; None before training starts."""
        self._steps = 0
        self._bar: ProgressBar | None = None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def note(self, message: str) -> None:
        self.close()
        note(message, quiet=self.quiet)

    def on_autoencoder_step(self, step: int, steps: int, loss: float) -> None:
        bar = self._bar or self._open("autoencoder", steps, unit="steps")
        bar.advance(finished=step, info=f"loss {loss:.4f}")
        if step == steps:
            self.close()

    def on_encoded(self, videos: int, total: int) -> None:
        bar = self._bar or self._open("encoding", total, unit="videos")
        bar.count(videos, total)
        if videos == total:
            self.close()

    def on_start(self, step: int, steps: int) -> None:
        self.step, self._steps = step, steps
        self._open("training", steps, unit="steps", begun=step)

    def on_step(self, report: StepReport, mean_loss: float) -> None:
        bar = self._bar or self._open("training", self._steps, unit="steps", begun=self.step or 0)
        self.step = report.step
        speed = f"{report.frames / report.seconds:.0f} frames/s  {size(report.memory_bytes)}"
        info = f"loss {mean_loss:.4f}  lr {report.learning_rate:.1e}  {speed}"
        bar.advance(finished=report.step, info=info)

    def _open(self, description: str, total: int, *, unit: str, begun: int = 0) -> ProgressBar:
        self._bar = ProgressBar(description, total, total, quiet=self.quiet, unit=unit, begun=begun).__enter__()
        return self._bar


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
