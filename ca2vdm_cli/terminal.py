"""What users see in the terminal: on standard error, because standard output is for video and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .errors import UserError


class _Console(Console):
    """A console that raises ``BrokenPipeError`` when its reader is gone; Rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Standard error. In a pipe, lines are 200 characters wide."""
    return _Console(stderr=True, highlight=False, emoji=False, width=None if sys.stderr.isatty() else 200)


def output_console() -> Console:
    """Standard output, for commands that print text, such as ``presets``. In a pipe, lines are 200 characters wide."""
    return _Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)


def print_error(error: UserError) -> None:
    """Print an error as one line."""
    out = console()
    line = " ".join(str(error).split())
    out.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def print_json(report: Mapping[str, Any]) -> None:
    """Print the JSON object of ``--json`` on standard output."""
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def note(message: str, *, quiet: bool = False) -> None:
    """Print one line."""
    if not quiet:
        console().print(message, markup=False, soft_wrap=True)


def size(count: float) -> str:
    """A number of bytes with its unit: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """A time with its unit: 12 ms, 3.41 s, 2 min 5 s."""
    if seconds < 0.1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


class _Rate(ProgressColumn):
    """Finished units per second."""

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "frames")
        done, elapsed = task.fields.get("finished", 0) - task.fields.get("begun", 0), task.elapsed
        rate = f"{done / elapsed:5.1f} {unit}/s" if done and elapsed else f"    – {unit}/s"
        return Text(rate, style="progress.data.speed", no_wrap=True)


class ProgressBar:
    """A progress bar with frames per second and time left; hidden if quiet, or if standard error is not a terminal.

    Args:
        description: text at the start of the line.
        total: number of small steps, which move the bar.
        frames: total number of frames, shown beside the number of finished ones.
        quiet: hide the bar.
        unit: what is counted, by default frames.
        begun: number of frames and small steps that an earlier run finished.
    """

    def __init__(
        self, description: str, total: int, frames: int, *, quiet: bool = False, unit: str = "frames", begun: int = 0
    ) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(24),  # short: a terminal prints ^C after it, and a line break would keep it from being erased
            TextColumn("{task.fields[finished]}/{task.fields[frames]}"),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("left {task.fields[info]}"),
            console=console(),
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(
            description, total=total, completed=begun, finished=begun, begun=begun, frames=frames, unit=unit, info=""
        )

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def count(self, finished: int, total: int) -> None:
        """Set both the finished number and the total, if the total is not known in advance."""
        self._progress.update(self._task, completed=finished, total=total, finished=finished, frames=total)

    def advance(self, *, finished: int | None = None, info: str | None = None, steps: int = 1) -> None:
        """Advance by some small steps, and set the number of finished frames and the text at the end if given."""
        fields: dict[str, Any] = {}
        if finished is not None:
            fields["finished"] = finished
        if info is not None:
            fields["info"] = info
        self._progress.update(self._task, advance=steps, **fields)


@contextmanager
def status(message: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a spinner during the block, for work without countable steps."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    with console().status(message):
        yield


def print_run_report(report: Mapping[str, Any]) -> None:
    """Print what a run of ``sample`` or ``extend`` generated, its memory and its time."""
    out = console()
    output = report["output"]
    if not isinstance(output, str):
        output = output[0] if len(output) == 1 else f"{output[0]} … {output[-1]}"
    frames = f"{report['frames']} {'new ' if report['input_frames'] else ''}frame{'' if report['frames'] == 1 else 's'}"
    what = frames + (f" × {report['num_videos']} videos" if report["num_videos"] > 1 else "")
    what += f" in {report['processes']} processes" if report["processes"] > 1 else ""
    out.print(
        Text.assemble(
            ("✔ ", "green"),
            f"{what} in {duration(report['seconds'])}",
            (f"  {report['frames_per_second']:.1f} frames/s", "bold"),
            f", first chunk after {duration(report['first_chunk_seconds'])} → {output}",
        )
    )
    out.print(
        f"  {report['preset']}, {report['strategy']}, {report['sampler']} × {report['steps']} steps, "
        f"{report['backend']} on {report['device']} in {report['dtype']}, seed {report['seed']}",
        style="dim",
        markup=False,
    )
    context = "cache" if report["strategy"] == "cached" else "context"
    memory = [("weights", "weights_bytes"), (context, "context_bytes"), ("peak", "peak_memory_bytes")]
    lines = Table.grid(padding=(0, 2))
    lines.add_row("  memory", "  ".join(f"{name} [bold]{size(report[key])}[/]" for name, key in memory))
    steps = [
        ("input", "input_seconds"),
        ("denoise", "denoise_seconds"),
        ("cache write", "cache_write_seconds"),
        ("decode", "decode_seconds"),
        ("encode", "encode_seconds"),
        ("output", "output_seconds"),
        ("start", "startup_seconds"),
    ]
    parts = (f"{name} [bold]{duration(report[key])}[/]" for name, key in steps if report[key] >= 1e-4)
    lines.add_row("  time", "  ".join(parts))
    out.print(lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A plain table. A column whose name ends in ``>`` is right-aligned."""
    out = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        out.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out
