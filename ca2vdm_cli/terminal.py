"""What users see in the terminal: on standard error, because standard output is for video and JSON."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from .errors import UserError

# Everything but line breaks that moves the cursor, changes colours, reverses the text or cannot be encoded.
_CONTROL = re.compile(r"[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
TIME_LEFT = "left"
FIRST_LINE, LINES_EVERY = 10.0, 60.0
"""Seconds until the first line of progress without a terminal, and between two of them."""


class _Console(Console):
    """A console that shows control characters, which a file's name may have, as ``\\x1b`` and the like, and that raises
    ``BrokenPipeError`` when its reader is gone; Rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


def printable(text: str) -> str:
    """The text with its control characters escaped, except for line breaks."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class _Unpadded:
    """A stream that leaves out the spaces at the ends of lines, with which Rich fills the columns of a table."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(" +(?=\n)", "", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console() -> Console:
    """Standard error. In a pipe, lines are 200 characters wide."""
    return _Console(stderr=True, highlight=False, emoji=False, width=None if sys.stderr.isatty() else 200)


def output_console() -> Console:
    """Standard output, for commands that print text, such as ``presets``.

    In a pipe, lines have up to 200 characters and no padding.
    """
    if sys.stdout.isatty():
        return _Console(highlight=False, emoji=False)
    return _Console(file=cast("TextIO", _Unpadded(sys.stdout)), highlight=False, emoji=False, width=200)


def print_error(error: UserError) -> None:
    """Print an error as one line."""
    out = console()
    line = printable(" ".join(str(error).split()))
    out.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def print_json(report: Mapping[str, Any]) -> None:
    """Print the JSON object of ``--json`` on standard output."""
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def note(message: str, *, quiet: bool = False) -> None:
    """Print one line."""
    if not quiet:
        console().print(printable(message).replace("\n", "\\n"), markup=False, soft_wrap=True)


def size(count: float) -> str:
    """A number of bytes with its unit: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """A time with its unit: 12 ms, 3.41 s, 2 min 5 s, 4 h 10 min, 4 d 20 h."""
    if seconds < 0.1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if minutes < 120:
        return f"{minutes} min {int(seconds) % 60} s"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class _Rate(ProgressColumn):
    """Finished units per second."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task), style="progress.data.speed", no_wrap=True)


class _Info(ProgressColumn):
    """As many of the texts at the end as fit into the terminal, so that rate and time left are never cut off."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def render(self, task: Task) -> Text:
        counter = f"{task.fields['finished']}/{task.fields['frames']}"
        room = self.room - len(task.description) - len(counter) - len(_rate(task))
        parts = list(task.fields["info"])
        while parts and len("  ".join(parts)) > room:
            parts.pop()
        return Text("  ".join(parts), no_wrap=True)


def _rate(task: Task) -> str:
    unit = task.fields["unit"]
    done, elapsed = task.fields["finished"] - task.fields["begun"], task.elapsed
    if not done or not elapsed:
        return f"    – {unit}/s"
    rate = done / elapsed
    return f"{rate:5.1f} {unit}/s" if rate >= 1 else f"{rate:5.3f} {unit}/s"


class ProgressBar:
    """A progress bar with frames per second and time left; hidden if quiet, or if standard error is not a terminal.

    Args:
        description: text at the start of the line.
        total: number of small steps, which move the bar.
        frames: total number of frames, shown beside the number of finished ones.
        quiet: hide the bar.
        unit: what is counted, by default frames.
        begun: number of frames and small steps that an earlier run finished.
        lines: without a terminal, print a line now and then instead (after 10 seconds, then every 60).
    """

    def __init__(
        self,
        description: str,
        total: int,
        frames: int,
        *,
        quiet: bool = False,
        unit: str = "frames",
        begun: int = 0,
        lines: bool = False,
    ) -> None:
        out = console()
        wide = out.width >= 100
        # short: a terminal prints ^C after the bar, and a line break would keep it from being erased
        length = 24 if wide else 8
        separators = 7 + len(TIME_LEFT) + len("0:00:00") + len("^C")
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(length),
            TextColumn("{task.fields[finished]}/{task.fields[frames]}"),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn(TIME_LEFT),
            _Info(out.width - length - separators),
            console=out,
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._next_line = time.monotonic() + FIRST_LINE if lines and not quiet and not sys.stderr.isatty() else None
        self._task = self._progress.add_task(
            description, total=total, completed=begun, finished=begun, begun=begun, frames=frames, unit=unit, info=()
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
        self._print_line()

    def advance(self, *, finished: int | None = None, info: Sequence[str] | None = None, steps: int = 1) -> None:
        """Advance by some small steps, and set the number of finished frames if given.

        ``info`` sets the texts at the end, the most important one first; a narrow terminal shows only the first ones.
        """
        fields: dict[str, Any] = {}
        if finished is not None:
            fields["finished"] = finished
        if info is not None:
            fields["info"] = info
        self._progress.update(self._task, advance=steps, **fields)
        self._print_line()

    def _print_line(self) -> None:
        """Without a terminal: print where the work is, now and then."""
        if self._next_line is None or time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + LINES_EVERY
        task = self._progress.tasks[0]
        done = task.fields["finished"] - task.fields["begun"]
        left = (task.fields["frames"] - task.fields["finished"]) * (task.elapsed or 0) / max(1, done)
        counter = f"{task.fields['finished']}/{task.fields['frames']}"
        note(
            "  ".join(
                [f"{task.description} {counter}", _rate(task).strip(), f"{clock(left)} left", *task.fields["info"]]
            )
        )


def urgent(message: str, *, quiet: bool = False) -> None:
    """Print one line from a signal handler, over a progress bar if there is one."""
    if quiet:
        return
    erase = "\r\x1b[2K" if sys.stderr.isatty() else ""
    with suppress(RuntimeError, OSError, ValueError):  # the signal interrupted another write
        sys.stderr.write(f"{erase}{message}\n")
        sys.stderr.flush()


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
    out = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in columns:
        out.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in rows:
        out.add_row(*map(printable, row))
    return out
