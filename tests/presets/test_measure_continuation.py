"""The script that compares a continuation with the real frames."""

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_kit import ROOT

from ca2vdm_cli.video_io import Frame, open_reader, open_writer

SCRIPT = ROOT / "presets" / "one-clip" / "measure_continuation.py"


def save(path: Path, levels: list[int]) -> None:
    with open_writer(str(path), fps=8) as writer:
        for level in levels:
            writer.write(np.full((16, 16, 3), level, np.uint8))


def load(path: Path) -> list[Frame]:
    with open_reader(path) as reader:
        return list(reader)


def test_cut_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[list[str]], int] = runpy.run_path(str(SCRIPT))["main"]
    video, head, generated = (tmp_path / name for name in ("all.npz", "head.npz", "generated.npz"))
    save(video, [0, 10, 20, 30, 40])
    save(generated, [35, 45])
    common = [str(video), "--hold-out", "2", "--frames", "2"]
    assert main([*common, "--cut", str(head)]) == 0
    assert [int(frame[0, 0, 0]) for frame in load(head)] == [0, 10, 20]
    assert main([*common, "--generated", str(generated)]) == 0
    expected = [10 * np.log10(255**2 / error) for error in (25, (100 + 400) / 2)]
    assert f"{expected[0]:.2f} dB; repeating the last frame: {expected[1]:.2f} dB" in capsys.readouterr().err
    save(tmp_path / "worse.npz", [0, 0])
    assert main([*common, "--generated", str(tmp_path / "worse.npz")]) == 1
    save(tmp_path / "short.npz", [30])
    assert main([*common, "--generated", str(tmp_path / "short.npz")]) == 2
    assert main([str(video), "--hold-out", "9", "--cut", str(tmp_path / "none.npz")]) == 2
    assert not (tmp_path / "none.npz").exists()
