"""The script that draws a run's training curve."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from command_kit import ROOT

from ca2vdm_cli.training.run_folder import METRICS_FILE

SCRIPT = ROOT / "presets" / "moving-digits" / "plot_training.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Callable[..., object]]:
    return runpy.run_path(str(SCRIPT))


def test_a_curve_is_drawn(
    script: dict[str, Callable[..., object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"step": n + 1, "loss": 2 / (n + 1), "learning_rate": 0.1, "frames": 8} for n in range(120)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "curve.png"
    assert script["main"]([str(tmp_path), "-o", str(picture)]) == 0
    last = sum(row["loss"] for row in rows[-50:]) / 50
    assert f"120 steps, 960 trained frames, loss 2.000 to {last:.4f}" in capsys.readouterr().err
    drawn = cv2.imread(str(picture))
    assert drawn is not None and drawn.std() > 5


@pytest.mark.parametrize("content", [None, "", "no numbers\n", '{"step": 1}\n'])
def test_a_folder_without_a_run_is_named(
    script: dict[str, Callable[..., object]], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / METRICS_FILE).write_text(content)
    assert script["main"]([str(tmp_path)]) != 0
    message = capsys.readouterr().err
    assert METRICS_FILE in message and message.count("\n") == 1
