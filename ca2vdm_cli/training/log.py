"""Training's logs: ``metrics.jsonl``, one line per step, ``validation.jsonl``, and TensorBoard if it is installed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import cv2

from .run_folder import METRICS_FILE, RunFolder

if TYPE_CHECKING:
    from .validation import ValidationReport

TENSORBOARD = "tensorboard"
VALIDATION_FILE = "validation.jsonl"


@dataclass(frozen=True)
class StepReport:
    """Results of one optimizer step, over all processes."""

    step: int
    """Steps done."""
    loss: float
    terms: dict[str, float]
    """The loss's terms by name."""
    learning_rate: float
    gradient_norm: float
    prefix: int
    """Frames of clean prefix before the first chunk."""
    seconds: float
    data_seconds: float
    """Part of ``seconds`` spent waiting for clips."""
    encode_seconds: float
    """Part of ``seconds`` spent encoding clips and captions."""
    frames: int
    """Frames that contributed to the loss."""
    memory_bytes: int
    """Peak memory of this process so far; on a GPU, of PyTorch's allocations."""


class TrainingLog:
    """Writes a run's reports.

    Args:
        folder: the run's folder.
        step: steps done; lines that a killed run wrote beyond that step are dropped.
        active: whether this process writes; only the main process should.
    """

    def __init__(self, folder: RunFolder, step: int, *, active: bool = True) -> None:
        self.path = folder.path
        self._file = self._board = None
        if active:
            for name in (METRICS_FILE, VALIDATION_FILE):
                folder.drop_lines_after(name, step)
            self._file = (folder.path / METRICS_FILE).open("a", encoding="utf-8")
            self._board = _tensorboard(folder.path / TENSORBOARD, step)

    def step(self, report: StepReport) -> None:
        """Log one step."""
        if self._file is None:
            return
        self._file.write(json.dumps(asdict(report)) + "\n")
        self._file.flush()
        if self._board is not None:
            scalars = {
                "loss": report.loss,
                "learning_rate": report.learning_rate,
                "gradient_norm": report.gradient_norm,
                "frames_per_second": report.frames / report.seconds,
                "data_share": report.data_seconds / report.seconds,
                **{f"loss/{name}": value for name, value in report.terms.items()},
            }
            for name, value in scalars.items():
                self._board.add_scalar(name, value, report.step)

    def validation(self, report: ValidationReport) -> None:
        """Log one validation and its contact sheet."""
        if self._file is None:
            return
        line: dict[str, Any] = {**asdict(report), "video": report.video.name, "sheet": report.sheet.name}
        with (self.path / VALIDATION_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            self._board.add_scalar("validation/loss", report.loss, report.step)
            for prefix, value in report.by_prefix.items():
                self._board.add_scalar(f"validation/prefix_{prefix}", value, report.step)
            for level, value in report.by_level.items():
                self._board.add_scalar(f"validation/noise_{level:g}", value, report.step)
            for name in ("reconstruction", "continuation", "repeat_last_frame"):
                for metric, value in getattr(report, name).items():
                    self._board.add_scalar(f"validation/{name}/{metric}", value, report.step)
            picture = cv2.imread(str(report.sheet))
            if picture is not None:
                self._board.add_image("validation/sheet", picture[:, :, ::-1], report.step, dataformats="HWC")

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, step: int) -> Any:
    """A TensorBoard writer, or None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
