"""Videos whose frames are numbered by their brightness, and clips of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ca2vdm_cli.config import DataConfig, Preset
from ca2vdm_cli.data import (
    VideoClips,
    open_clips,
)
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.video_io import open_writer

LENGTH = 4


def preset(**data: Any) -> Preset:
    """``tiny`` with some data settings: gray 32x32 frames."""
    config = load_preset("tiny").config
    changed: Preset = replace(config, data=DataConfig(**data))
    return changed


def pictures(count: int, height: int = 16, width: int = 16, first: int = 0) -> list[np.ndarray]:
    """Frame t is of brightness 4 t everywhere."""
    return [np.full((height, width, 3), 4 * (first + t), np.uint8) for t in range(count)]


def write_video(path: Path, frames: Iterable[np.ndarray]) -> Path:
    with open_writer(path, fps=8, format=None if path.suffix else "png") as writer:
        for frame in frames:
            writer.write(frame)
    return path


def numbers(clip: torch.Tensor) -> list[int]:
    """Which of ``pictures`` the frames of a clip are."""
    return [round(value) for value in ((clip.mean((1, 2, 3)) + 1) * 127.5 / 4).tolist()]


def source(path: Path, frames: int = LENGTH, seed: int = 0, **data: Any) -> VideoClips:
    found = open_clips(path, preset(**data), seed, frames)
    assert isinstance(found, VideoClips)
    return found


def starts(path: Path, count: int = 12, **data: Any) -> set[int]:
    """First frames of some clips, which are checked to go on one by one."""
    clips_ = source(path, **data)
    step, found = data.get("stride", 1), set()
    for index in range(count):
        first, *rest = numbers(clips_.clip(index, LENGTH).frames)
        assert rest == [first + step * n for n in range(1, LENGTH)]
        found.add(first)
    return found
