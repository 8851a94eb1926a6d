"""``bench``: what the cache gains."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ca2vdm_cli.bench.benchmark import Settings, add_autoencoder, count_chunks, environment, run_bench
from ca2vdm_cli.bench.plots import as_svg, require_matplotlib, save_png
from ca2vdm_cli.bench.report import (
    COSTS_NOTE,
    OTHER_VIDEOS,
    TIME,
    WORK,
    as_csv,
    as_html,
    costs_table,
    slide_note,
    verdict,
    warnings,
    write_text,
)
from ca2vdm_cli.config import TemporalPositions
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import contexts
from ca2vdm_cli.loading import find_weights
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.plugins import choose_backend
from ca2vdm_cli.terminal import ProgressBar, duration, note, output_console, print_json, size, table


@dataclass(frozen=True)
class Request:
    """The flags."""

    compare: str
    preset: str | None
    checkpoint: Path | None
    frames: int | None
    context_frames: str | None
    fixed_window: int | None
    steps: int | None
    sampler: str | None
    seed: int
    repeat: int
    backend: str
    device: str
    dtype: str
    overrides: list[str]
    json: str | None
    csv: Path | None
    html: Path | None
    plot: Path | None
    quiet: bool

    def settings(self) -> Settings:
        """What they ask to measure."""
        return Settings(
            opponents=_opponents(self.compare),
            frames=self.frames,
            context_frames=_windows(self.context_frames),
            fixed_frames=self.fixed_window,
            steps=self.steps,
            sampler=self.sampler,
            seed=self.seed,
            repeat=self.repeat,
        )

    def load(self, backend: str, windows: tuple[int, ...]) -> Pipeline:
        """The model on one of the backends."""
        return Pipeline.load(
            self.preset,
            checkpoint=self.checkpoint,
            overrides=[*self.overrides, *self._longer_table(windows)],
            backend=backend,
            device=self.device,
            dtype=self.dtype,
            random_weights=True,
            pixels=False,
            seed=self.seed,
        )

    def _longer_table(self, windows: tuple[int, ...]) -> list[str]:
        """Random weights are used to no positions, so the table may grow with the longest window."""
        loaded, weights = find_weights(self.preset, self.checkpoint, self.overrides)
        model = loaded.config.model
        needed = max(windows, default=0) + model.chunk_frames
        if weights is not None or model.temporal_positions is TemporalPositions.ROPE or needed <= model.table_length:
            return []
        return [f"model.position_table={needed}"]


def run(request: Request) -> None:
    """Measure and report."""
    settings = request.settings()
    files = [Path(request.json)] if request.json not in (None, "-") else []
    files += [path for path in (request.csv, request.html, request.plot) if path is not None]
    for path in files:
        if not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{path}: can't be written; choose another file")
    if request.html is not None or request.plot is not None:
        require_matplotlib()

    parts: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    names = tuple(dict.fromkeys(_listed(request.backend, "--backend")))
    for name in names:
        pipeline = request.load(name, settings.context_frames)
        if not parts:  # before anything is measured, what would be refused later
            for other in names:
                choose_backend(other, pipeline.model.device, pipeline.model.dtype)
            for window in settings.context_frames:
                TemporalWindow(pipeline.config.model, window)
        add_autoencoder(pipeline)
        chunks = count_chunks(pipeline, settings)
        report = report or environment(pipeline)
        title = f"benchmark, {pipeline.backend.name}"
        with ProgressBar(title, chunks, chunks, quiet=request.quiet, unit="chunks") as bar:
            done = iter(range(1, chunks + 1))
            parts.append(
                run_bench(pipeline, settings, on_chunk=lambda _, bar=bar, done=done: bar.advance(finished=next(done)))  # type: ignore[misc]
            )
    report |= parts[0] | {"other_backends": parts[1:]}
    report = {"verdict": verdict(report), **report}
    _write(request, report)
    if request.json == "-":
        print_json(report)
    else:
        _print(report)
    for path in files:
        note(f"→ {path}", quiet=request.quiet)


def _write(request: Request, report: dict[str, Any]) -> None:
    if request.json not in (None, "-"):
        write_text(Path(request.json), json.dumps(report, indent=1) + "\n")
    if request.csv is not None:
        write_text(request.csv, as_csv(report))
    if request.html is not None:
        write_text(request.html, as_html(report, as_svg(report), size, duration))
    if request.plot is not None:
        save_png(report, request.plot)


def _print(report: dict[str, Any]) -> None:
    out = output_console()
    weights = "trained weights" if report["trained"] else "random weights"
    steps = f"{report['steps']} step{'' if report['steps'] == 1 else 's'}"
    style = "bold red" if report["outputs_agree"] is False else "bold"
    out.print(report["verdict"], style=style, markup=False)
    out.print(
        f"{report['preset']} ({weights}) on {report['device']} in {report['dtype']}, "
        f"{report['frames']} frames in chunks of {report['chunk_frames']}, {steps}, "
        f"{report['tokens_per_frame']} tokens a frame, weights {size(report['weights_bytes'])}, "
        f"matrix products at {report['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s",
        markup=False,
    )
    for run in (report, *report["other_backends"]):
        out.print()
        for wanted in (TIME, WORK):
            columns, rows = costs_table(run, size, duration, wanted)
            out.print(table([run["backend"], *columns[1:]], rows))
            out.print()
    for line in filter(None, [COSTS_NOTE, slide_note(report), OTHER_VIDEOS if _other_videos(report) else ""]):
        out.print(line, markup=False)
    for line in warnings(report):
        out.print(f"[yellow]warning:[/] {line}")


def _other_videos(report: dict[str, Any]) -> bool:
    return any(not contexts[name].exact for name in report["results"])


def _opponents(compare: str) -> tuple[str, ...]:
    names = dict.fromkeys(_listed(compare, "--compare"))
    for name in names:
        contexts.check(name, "--compare")
    return tuple(name for name in names if name != "cached")


def _windows(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = _listed(text, "--context-frames")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--context-frames {text}: must be a number of frames, or several such as 25,9,57")
    return tuple(dict.fromkeys(map(int, parts)))


def _listed(text: str, flag: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{flag} {text}: an entry is empty")
    return parts
