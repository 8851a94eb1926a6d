"""``bench``: benchmark the cache against baselines."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

from ca2vdm_cli.atomic import write_file
from ca2vdm_cli.bench.benchmark import Settings, add_autoencoder, count_chunks, environment, run_bench
from ca2vdm_cli.bench.plots import draw, require_matplotlib
from ca2vdm_cli.bench.report import TIME, WORK, as_csv, as_html, costs_table, notes, verdict, warnings
from ca2vdm_cli.bench.results import BackendRun, Report
from ca2vdm_cli.config import TemporalPositions
from ca2vdm_cli.errors import UsageError, as_user_error
from ca2vdm_cli.generate.context import contexts
from ca2vdm_cli.loading import find_weights
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.plugins import choose_backend
from ca2vdm_cli.terminal import ProgressBar, duration, note, output_console, print_json, size, table

FORMATS: dict[str, Callable[[Report], bytes]] = {
    ".html": lambda report: as_html(report, draw(report.runs[0], "svg").decode(), size, duration).encode(),
    ".json": lambda report: json.dumps(report.as_json(), indent=1).encode() + b"\n",
    ".csv": lambda report: as_csv(report).encode(),
    ".png": lambda report: draw(report.runs[0], "png"),
    ".svg": lambda report: draw(report.runs[0], "svg"),
    ".pdf": lambda report: draw(report.runs[0], "pdf"),
}
"""What ``--output`` writes, by suffix."""


def run(
    *,
    compare: str,
    preset: str | None,
    checkpoint: Path | None,
    frames: int | None,
    context_frames: str | None,
    fixed_window: int | None,
    steps: int | None,
    sampler: str | None,
    seed: int,
    repeat: int,
    backend: str,
    device: str,
    dtype: str,
    overrides: list[str],
    outputs: list[Path],
    as_json: bool,
    quiet: bool,
    force: bool,
) -> None:
    """Measure and report."""
    windows = _windows(context_frames)
    settings = Settings(
        baselines=parse_baselines(compare),
        frames=frames,
        context_frames=windows,
        fixed_frames=fixed_window,
        steps=steps,
        sampler=sampler,
        seed=seed,
        repeat=repeat,
    )
    _check_outputs(outputs)
    overrides = [*overrides, *_longer_table(preset, checkpoint, overrides, windows)]

    backends = tuple(dict.fromkeys(_split(backend, "--backend")))
    runs: list[BackendRun] = []
    for name in backends:
        pipeline = Pipeline.load(
            preset,
            checkpoint=checkpoint,
            overrides=overrides,
            backend=name,
            device=device,
            dtype=dtype,
            random_weights=True,
            pixels=False,
            seed=seed,
            force=force,
        )
        pipeline.check_memory(("cached", *settings.baselines), context_frames=max(windows, default=None))
        add_autoencoder(pipeline)
        if not runs:  # before anything is measured, check what would fail later
            for other in backends:
                choose_backend(other, pipeline.model.device, pipeline.model.dtype)
            for window in windows:
                TemporalWindow(pipeline.config.model, window)
            machine = environment(pipeline)
        runs.append(_measure(pipeline, settings, quiet=quiet))
    report = Report(verdict(runs[0]), machine, runs)
    for path in outputs:
        _write(path, FORMATS[path.suffix.lower()](report))
    if as_json:
        print_json(report.as_json())
    else:
        _print(report)
    for path in outputs:
        note(f"→ {path}", quiet=quiet)


def parse_baselines(compare: str) -> tuple[str, ...]:
    """The contexts that ``--compare`` names; ``cached`` is always measured and is not among them."""
    names = dict.fromkeys(_split(compare, "--compare"))
    for name in names:
        contexts.check(name, "--compare")
    return tuple(name for name in names if name != "cached")


def _windows(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = _split(text, "--context-frames")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--context-frames {text}: must be a number of frames, or several such as 25,9,57")
    return tuple(dict.fromkeys(map(int, parts)))


def _split(text: str, flag: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{flag} {text}: an entry is empty")
    return parts


def _longer_table(
    preset: str | None, checkpoint: Path | None, overrides: list[str], windows: tuple[int, ...]
) -> list[str]:
    """With random weights, which know no positions, the position table can grow to fit the longest window."""
    loaded, weights = find_weights(preset, checkpoint, overrides)
    model = loaded.config.model
    needed = max(windows, default=0) + model.chunk_frames
    if weights is not None or model.temporal_positions is TemporalPositions.ROPE or needed <= model.table_length:
        return []
    return [f"model.position_table={needed}"]


def _check_outputs(outputs: list[Path]) -> None:
    """Before the benchmark, reject outputs that could not be written after it."""
    for path in outputs:
        suffix = path.suffix.lower()
        if suffix not in FORMATS:
            *others, last = FORMATS
            raise UsageError(f"-o {path}: the suffix must be {', '.join(others)} or {last}")
        if not path.parent.is_dir():
            raise UsageError(f"-o {path}: there is no folder {path.parent}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"-o {path}: can't be written; choose another file")
        if suffix not in (".json", ".csv"):
            require_matplotlib()


def _write(path: Path, content: bytes) -> None:
    with as_user_error(f"{path}: cannot be written"):
        write_file(path.resolve(), content)


def _measure(pipeline: Pipeline, settings: Settings, *, quiet: bool) -> BackendRun:
    chunks = count_chunks(pipeline, settings)
    finished = itertools.count(1)
    with ProgressBar(f"benchmark, {pipeline.backend.name}", chunks, chunks, quiet=quiet, unit="chunks") as bar:
        return run_bench(pipeline, settings, lambda _: bar.advance(finished=next(finished)))


def _print(report: Report) -> None:
    out, machine, first = output_console(), report.environment, report.runs[0]
    weights = "trained weights" if machine.trained else "random weights"
    steps = f"{first.steps} step{'' if first.steps == 1 else 's'}"
    out.print(report.verdict, style="bold red" if first.outputs_agree is False else "bold", markup=False)
    out.print(
        f"{machine.preset} ({weights}) on {machine.device} in {machine.dtype}, {first.frames} frames in chunks of "
        f"{machine.chunk_frames}, {steps}, {machine.tokens_per_frame} tokens per frame, weights "
        f"{size(machine.weights_bytes)}, matrix products at {first.gemm_flops_per_second / 1e9:.0f} GFLOP/s",
        markup=False,
    )
    for run in report.runs:
        out.print()
        for wanted in (TIME, WORK):
            columns, rows = costs_table(run, size, duration, wanted)
            out.print(table([run.backend, *columns[1:]], rows))
            out.print()
    for line in notes(first):
        out.print(line, markup=False)
    for line in warnings(report):
        out.print(f"[yellow]warning:[/] {line}")
