"""Whole videos as arrays, through the public functions."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ca2vdm_cli import UsageError, read_video, write_video


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), np.uint8)


@pytest.mark.parametrize("target", ["video.npz", "frames/"])
def test_what_is_written_is_read(tmp_path: Path, frames: np.ndarray, target: str) -> None:
    assert write_video(f"{tmp_path}/{target}", frames, 8) == 5
    video = read_video(f"{tmp_path}/{target}")
    assert video.fps is None and video.frames.dtype == np.uint8
    assert np.array_equal(video.frames, frames)


def test_rate_size_channels_and_the_last_frames(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "video.mkv"
    assert write_video(path, (frame for frame in frames), Fraction(30000, 1001)) == 5
    whole, part = read_video(path), read_video(path, size=(6, 6), channels=1, aspect="crop", last=2)
    assert whole.fps == part.fps == Fraction(30000, 1001)
    assert whole.frames.shape == (5, 12, 16, 3) and part.frames.shape == (2, 6, 6, 1)
    with pytest.raises(UsageError, match="exists already"):
        write_video(path, frames, 8)
    assert write_video(path, frames[:2, :, :, :1], 8, overwrite=True) == 2
    assert np.ptp(read_video(path).frames, axis=-1).max() <= 2, "gray"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"channels": 2}, "channels: 2 must be 1 or 3"),
        ({"aspect": "zoom"}, "aspect: 'zoom' is not one of crop, pad, stretch"),
        ({"last": 0}, "last: 0 must be at least one"),
        ({"size": (0, 8)}, r"size: \(0, 8\) must be a height and a width"),
        ({"size": (8,)}, r"size: \(8,\) must be a height and a width"),
    ],
)
def test_wrong_arguments_of_read_video(
    tmp_path: Path, frames: np.ndarray, arguments: dict[str, Any], expected: str
) -> None:
    write_video(tmp_path / "video.npz", frames, 8)
    with pytest.raises(UsageError, match=expected):
        read_video(tmp_path / "video.npz", **arguments)


@pytest.mark.parametrize("wrong", [[], np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros(3, np.uint8)])
def test_frames_that_are_no_video(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"^frames: "):
        write_video(tmp_path / "video.npz", wrong, 8)
    assert not any(tmp_path.iterdir())
