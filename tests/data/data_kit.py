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
    """``tiny``, whose frames are gray and 32x32, with these data settings."""
    config = load_preset("tiny").config
    changed: Preset = replace(config, data=DataConfig(**data))
    return changed


def pictures(count: int, height: int = 16, width: int = 16, first: int = 0) -> list[np.ndarray]:
    """Frames; frame t has brightness 4 t everywhere."""
    return [np.full((height, width, 3), 4 * (first + t), np.uint8) for t in range(count)]


def write_video(path: Path, frames: Iterable[np.ndarray]) -> Path:
    with open_writer(path, fps=8, format=None if path.suffix else "png") as writer:
        for frame in frames:
            writer.write(frame)
    return path


def numbers(clip: torch.Tensor) -> list[int]:
    """The numbers of a clip's frames among ``pictures``."""
    return [round(value) for value in ((clip.mean((1, 2, 3)) + 1) * 127.5 / 4).tolist()]


def source(path: Path, frames: int = LENGTH, seed: int = 0, **data: Any) -> VideoClips:
    clips = open_clips(path, preset(**data), seed, frames)
    assert isinstance(clips, VideoClips)
    return clips


def starts(path: Path, count: int = 12, **data: Any) -> set[int]:
    """The numbers of the first frames of some clips; checks that the frames are consecutive."""
    clips_ = source(path, **data)
    step, firsts = data.get("stride", 1), set()
    for index in range(count):
        first, *rest = numbers(clips_.clip(index, LENGTH).frames)
        assert rest == [first + step * n for n in range(1, LENGTH)]
        firsts.add(first)
    return firsts
