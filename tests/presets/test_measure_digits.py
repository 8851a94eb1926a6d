"""The measuring script: real sequences pass, visibly wrong ones fail, and its numbers are those of known cases."""

import importlib.util
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from command_kit import ROOT

from ca2vdm_cli.config import Preset
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.presets import load_preset

SCRIPT = ROOT / "presets" / "moving-digits" / "measure_digits.py"
SMALLER = {"TRAIN_STEPS": 250, "REFERENCE_VIDEOS": 80, "MOTION_VIDEOS": 16, "FLOOR_SETS": 3}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module, made quick: fewer training steps and fewer real sequences."""
    spec = importlib.util.spec_from_file_location("measure_digits", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    for name, value in SMALLER.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    return module


@pytest.fixture(scope="module")
def config() -> Preset:
    return load_preset("moving-digits").config


@pytest.fixture(scope="module")
def judge(script: ModuleType, config: Preset) -> Any:
    return script.Judge(config, seed=0, videos=4)


@pytest.fixture(scope="module")
def digits(script: ModuleType, config: Preset, judge: Any) -> np.ndarray:
    """A real frame of each class, the digit in the middle: (10, 64, 64) uint8."""
    frames_by_digit: dict[int, np.ndarray] = {}
    for clip in script.real_videos(config, 5, 120, 1):
        frames_by_digit.setdefault(judge.true_class(clip), centred(script, clip[0]))
    return np.stack([frames_by_digit[digit] for digit in range(10)])


def centred(script: ModuleType, frame: np.ndarray) -> np.ndarray:
    y, x = script.centres(script.to_ink(frame[None]))[0].tolist()
    return cv2.warpAffine(frame, np.array([[1, 0, 31.5 - x], [0, 1, 31.5 - y]]), (64, 64))


def legible(judge: Any, frames: np.ndarray) -> list[bool]:
    return np.logical_and.reduce(list(judge.rules(judge.look(frames)).values())).tolist()


def test_real_sequences_meet_every_bar(script: ModuleType, config: Preset, judge: Any) -> None:
    assert judge.accuracy >= script.ACCURACY_BAR
    result, real = (judge.measure(script.real_videos(config, seed, 4, 400)) for seed in (21, 22))
    assert result.legible.mean() >= 0.99 and all(result.keeps_digit)
    assert result.speeds_within > 0.99 and result.bounces_within == 1 and len(result.bounces) >= 4
    rows = {row.name: row.passed for row in script.compare(judge, result, real)}
    assert len(rows) >= 6 and rows.pop("Fréchet distance of differences, first → last") is not None  # 4 are too few
    assert all(passed is not False for passed in rows.values())


def test_whole_digits_are_legible_and_nothing_else_is(judge: Any, digits: np.ndarray) -> None:
    assert all(legible(judge, digits))
    assert judge.look(digits).classes.tolist() == list(range(10))
    assert legible(judge, np.zeros((2, 64, 64), np.uint8)) == [False, False]
    assert legible(judge, np.full((2, 64, 64), 255, np.uint8)) == [False, False]
    two = np.maximum(np.roll(digits[1], -16, axis=1), np.roll(digits[7], 12, axis=1))
    assert judge.look(two[None]).blobs[0, 0] == 2 and legible(judge, two[None]) == [False]
    assert not any(legible(judge, np.stack([cv2.GaussianBlur(digit, (0, 0), 3) for digit in digits])))


def test_blends_of_two_digits_are_not_legible(judge: Any, digits: np.ndarray) -> None:
    pairs = [(digits[a].astype(float), digits[b].astype(float)) for a, b in combinations(range(10), 2)]
    halfway = np.stack([((a + b) / 2).astype(np.uint8) for a, b in pairs])
    assert not any(legible(judge, halfway))
    union = np.stack([np.maximum(a, b).astype(np.uint8) for a, b in pairs])
    assert sum(legible(judge, union)) <= 2  # of 45
    halves = np.stack([np.concatenate([a[:32], b[32:]]).astype(np.uint8) for a, b in pairs])
    assert sum(legible(judge, halves)) <= 2


def test_a_digit_that_turns_into_another_is_not_kept(judge: Any, digits: np.ndarray) -> None:
    changed = np.stack([digits[3]] * 30 + [digits[5]] * 30)
    same = np.stack([digits[3]] * 60)
    gone = np.concatenate([same[:30], np.zeros((30, 64, 64), np.uint8)])
    result = judge.measure([changed, same, gone])
    assert result.begin == [3, 3, 3] and result.end[:2] == [5, 3] and result.keeps_digit == [False, True, False]
    assert result.speeds_within < 0.5 and result.bounces_within == 0  # they stand still


def test_the_frechet_distance_is_that_of_gaussians(script: ModuleType) -> None:
    draw = np.random.default_rng(0)
    a = draw.normal(size=(40, 32)) * np.linspace(0, 2, 32)  # of nearly deficient rank
    assert script.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert script.frechet(a, a + 0.1) == pytest.approx(32 * 0.01)
    assert script.frechet(a, a + 1) == pytest.approx(32)
    centre = a.mean(0)
    assert script.frechet(a, centre + 3 * (a - centre)) == pytest.approx(4 * np.cov(a, rowvar=False).trace())


def test_speeds_and_bounces_of_a_known_path(script: ModuleType) -> None:
    there = np.arange(200)[:, None] * np.array([0.3, 0.0]) + 20
    path = 42 - np.abs(there - 42) * [1, 0] - [0, 22]  # y rises from 20 to 42 and falls again, x stands at 20
    (bounce,) = script.find_bounces(path, slowest=0.2)
    assert (bounce.frame, bounce.axis, bounce.far) == (73, 0, True) and bounce.place == pytest.approx(42, abs=0.2)
    assert script.find_speeds(path, slowest=0.2) == pytest.approx(0.3)


def test_a_moved_digit_has_a_moved_centre(script: ModuleType, digits: np.ndarray) -> None:
    moved = np.roll(digits, (3, -5), axis=(1, 2))
    steps = script.centres(script.to_ink(moved)) - script.centres(script.to_ink(digits))
    assert steps.numpy() == pytest.approx(np.tile([3.0, -5.0], (10, 1)), abs=1e-3)


def test_presets_that_cannot_be_measured_are_refused(script: ModuleType) -> None:
    for change, reason in (("digits=2", "digits must be 1"), ("images_per_class=16", "at most 15")):
        with pytest.raises(UsageError, match=reason):
            script.Judge(load_preset("moving-digits", [f"synthetic_data.{change}"]).config, seed=0)


def test_the_command_writes_numbers_and_a_sheet(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    flags = ["--real", "--videos", "2", "--frames", "60", "--json", str(report), "--sheet", str(sheet)]
    assert script.main(flags) in (0, 1)
    picture = cv2.imread(str(sheet))
    assert picture is not None and picture.shape[0] == 3 * 65
    assert '"least_match"' in report.read_text()
    assert "frames with one legible digit" in capsys.readouterr().out
    assert script.main(["--preset", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
