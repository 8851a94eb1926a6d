"""Progress of training: a bar that fits the terminal, lines without one, and what is said in between."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_kit import RUN, ca2vdm

from ca2vdm_cli.commands.train import _Progress
from ca2vdm_cli.terminal import ProgressBar
from ca2vdm_cli.training.reports import StepReport, ValidationReport

INFO = ["loss 0.1234", "lr 1.0e-03", "123 frames/s", "812.5 MiB"]


def report(step: int) -> StepReport:
    return StepReport(step, 0.5, {}, 1e-3, 1.0, 1, 2.0, 0.1, 0.1, 64, 2**30)


def validation(continuation: float, last_frame: float, reconstruction: float) -> ValidationReport:
    one, two, three = ({"psnr": value} for value in (reconstruction, continuation, last_frame))
    return ValidationReport(40, 0.25, {1: 0.25}, {0.5: 0.25}, one, two, three, Path("a.mp4"), Path("a.png"))


@pytest.mark.parametrize("width", [70, 80, 100, 160])
def test_a_bar_shows_rate_and_time_left_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar("autoencoder", 20_000, 20_000, unit="steps", begun=11_000) as bar:
        bar.advance(finished=11_001, info=INFO)
        bar._progress.refresh()
        (line,) = bar._progress.console.render_lines(bar._progress.get_renderable(), pad=False)
    text = "".join(segment.text for segment in line).rstrip()
    assert len(text) < width - 1 and "steps/s" in text and "11001/20000" in text and " left" in text and "…" not in text
    assert ("loss 0.1234" in text) == (width > 70) and ("812.5 MiB" in text) == (width == 160)


def test_without_a_terminal_lines_are_printed_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with ProgressBar("training", 400, 400, unit="steps", lines=True) as bar, ProgressBar("other", 9, 9):
        for step in range(1, 301):
            now += 1
            bar.advance(finished=step, info=INFO)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"training {step}/400" for step in (10, 70, 130, 190, 250)]
    assert all("steps/s" in line and " left  loss 0.1234" in line for line in lines)


def test_the_time_of_the_whole_training_is_estimated_after_ten_steps(capsys: pytest.CaptureFixture[str]) -> None:
    progress = _Progress(quiet=False)
    progress.on_start(0, 1000)
    for step in range(1, 12):
        progress.on_step(report(step), 0.5)
    progress.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("990 more steps at ") and "each take about 0:" in line and ", until " in line


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            (24.0, 22.0, 33.0),
            "continuation 24.0 dB, better than repeating the last frame (22.0 dB); autoencoder alone 33.0 dB;",
        ),
        ((21.0, 22.0, 33.0), "continuation 21.0 dB, NOT better than repeating the last frame (22.0 dB);"),
        (
            (24.0, 22.0, 25.3),
            "autoencoder alone 25.3 dB, 74% of the error: train its decoder longer (docs/training.md);",
        ),
    ],
)
def test_a_validation_says_what_it_found(
    values: tuple[float, float, float], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _Progress(quiet=False).on_validation(validation(*values))
    line = capsys.readouterr().err
    assert line.startswith("step 40: held-out loss 0.2500; continuation") and expected in line
    assert line.endswith("→ a.png\n")


@pytest.mark.usefixtures("in_an_empty_folder")
def test_a_run_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    settings: list[Any] = ["--set", "training.autoencoder_steps=1", "--set", "training.validate_every=12"]
    command = ["train", "--preset", "tiny", *RUN, "--steps", 12, "--out", "run", "--set", "training.validation_clips=1"]
    assert ca2vdm(*command, *settings) == 0
    text = capsys.readouterr().err
    for part in (
        "the autoencoder reconstructs frames at",
        "2 more steps at",
        "step 12: held-out loss",
        "trained to step",
    ):
        assert part in text
