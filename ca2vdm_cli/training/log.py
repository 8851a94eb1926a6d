"""Training's logs: ``metrics.jsonl``, one line per step, ``validation.jsonl``, and TensorBoard if it is installed.

A log that can't be written (a full disk, a deleted folder) does not end training: the user is told once.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2

from ca2vdm_cli.errors import first_line

from .reports import COMPARISONS, StepReport, ValidationReport
from .run_folder import METRICS_FILE, RunFolder

TENSORBOARD = "tensorboard"
VALIDATION_FILE = "validation.jsonl"


class TrainingLog:
    """Writes a run's reports.

    Args:
        folder: the run's folder.
        step: steps done; lines that a killed run wrote beyond that step are dropped.
        active: whether this process writes; only the main process should.
        note: called with a line for the user, once for each log that can't be written.
    """

    def __init__(
        self, folder: RunFolder, step: int, *, active: bool = True, note: Callable[[str], None] = lambda line: None
    ) -> None:
        self.path, self._active, self._note = folder.path, active, note
        self._failed: set[Path] = set()
        self._board: _Board | None = None
        if active:
            for name in (METRICS_FILE, VALIDATION_FILE):
                folder.drop_lines_after(name, step)
            with self._told_once(folder.path / TENSORBOARD):
                self._board = _board(folder.path / TENSORBOARD, step)

    def step(self, report: StepReport) -> None:
        """Log one step."""
        if not self._active:
            return
        self._append(METRICS_FILE, asdict(report))
        scalars = {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
            "frames_per_second": report.frames / report.seconds,
            "data_share": report.data_seconds / report.seconds,
            **{f"loss/{name}": value for name, value in report.terms.items()},
        }
        self._show(scalars, None, report.step)

    def validation(self, report: ValidationReport) -> None:
        """Log one validation and its contact sheet."""
        if not self._active:
            return
        line: dict[str, Any] = {**asdict(report), "video": report.video.name, "sheet": report.sheet.name}
        self._append(VALIDATION_FILE, line)
        scalars = {"validation/loss": report.loss}
        scalars |= {f"validation/prefix_{prefix}": value for prefix, value in report.by_prefix.items()}
        scalars |= {f"validation/noise_{level:g}": value for level, value in report.by_level.items()}
        for name in COMPARISONS:
            scalars |= {f"validation/{name}/{metric}": value for metric, value in getattr(report, name).items()}
        self._show(scalars, report.sheet, report.step)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Append a line to a file. A line that a full disk cuts off is dropped when the run is resumed."""
        path = self.path / name
        with self._told_once(path), closing(_Appended(path)) as file:
            file.write(b"\n" * (path in self._failed and _ends_midway(path)) + json.dumps(line).encode() + b"\n")

    def _show(self, scalars: dict[str, float], picture: Path | None, step: int) -> None:
        """Write values, and perhaps a picture, to TensorBoard. After an error its file can't be read on."""
        path = self.path / TENSORBOARD
        if self._board is None or path in self._failed:
            return
        with self._told_once(path):
            for name, value in scalars.items():
                self._board.scalar(name, value, step)
            if picture is not None:
                self._board.picture("validation/sheet", picture, step)

    @contextmanager
    def _told_once(self, path: Path) -> Iterator[None]:
        """Tell the user about the first error in writing ``path``, and go on."""
        try:
            yield
        except OSError as error:
            if path not in self._failed:
                self._note(f"{path}: cannot be written ({first_line(error)}); training goes on without it")
            self._failed.add(path)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            with self._told_once(self.path / TENSORBOARD):
                self._board.close()


def _ends_midway(path: Path) -> bool:
    """Whether the last line of a file is not complete."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


class _Appended:
    """A file that grows by whole pieces, without a buffer that would fail again when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()


class _Board:
    """A TensorBoard event file, written at once: ``SummaryWriter`` writes in a thread, whose errors are tracebacks."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event, self._summary = event_pb2.Event, summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(_Appended(folder / name))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # purges what a killed run wrote beyond it
        try:
            self._write(step=step + 1, file_version="brain.Event:2")
            self._write(step=step + 1, session_log=start)
        except OSError:
            self.close()
            raise

    def scalar(self, name: str, value: float, step: int) -> None:
        self._write(step=step, summary=self._summary.scalar(name, value))

    def picture(self, name: str, path: Path, step: int) -> None:
        pixels = cv2.imread(str(path)) if path.is_file() else None
        if pixels is not None:
            self._write(step=step, summary=self._summary.image(name, pixels[:, :, ::-1], dataformats="HWC"))

    def close(self) -> None:
        self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def _board(folder: Path, step: int) -> _Board | None:
    """A TensorBoard file, or None without the package."""
    try:
        return _Board(folder, step)
    except ImportError:
        return None
