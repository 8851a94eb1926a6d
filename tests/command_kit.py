"""Helpers shared by tests: running commands, and clips for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.__main__ import main
from ca2vdm_cli.data import ClipSource
from ca2vdm_cli.video_io import Frame, open_reader, open_writer, to_channels

Make = Callable[..., list[Frame]]
"""Type of the fixture ``make``."""
Refused = Callable[..., str]
"""Type of the fixture ``refused``."""
Report = Callable[..., Any]
"""Type of the fixture ``report``."""
AddPlugin = Callable[..., None]
"""Type of the fixture ``add_plugin``."""

ROOT = Path(__file__).parents[1]
"""The root of the repository."""
COMMANDS = [
    *("sample", "extend", "resume", "runs", "reproduce", "train", "bench", "plan", "verify", "import"),
    *("backends", "plugins", "presets"),
]
SUBCOMMANDS = ["presets show"]
RUN = ["--device", "cpu", "--backend", "eager"]
GENERATE = [*RUN, "--dtype", "float32", "--steps", 3]
STRATEGIES = ["cached", "recompute"]
WINDOW, CHUNK = 9, 4  # of the tiny preset


def ca2vdm(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def load(path: str | Path) -> list[Frame]:
    with open_reader(path) as reader:
        return list(reader)


def save(path: str | Path, frames: list[Frame], fps: float = 8) -> list[Frame]:
    with open_writer(path, fps=fps) as writer:
        for frame in frames:
            writer.write(frame)
    return frames


def clip(count: int, height: int = 32, width: int = 32) -> list[Frame]:
    """Drifting coloured stripes; every frame is different."""
    y, x = np.mgrid[0:height, 0:width]
    return [
        np.stack([128 + 100 * np.sin((x + 2 * y + 3 * i) / 7), 4 * y + i, 255 - 3 * x], -1)
        .clip(0, 255)
        .astype(np.uint8)
        for i in range(count)
    ]


def batch(source: ClipSource, index: int, size: int, frames: int) -> Tensor:
    """The clips ``index`` to ``index + size - 1`` as one (B, T, C, H, W) tensor."""
    return torch.stack([source.clip(i, frames).frames for i in range(index, index + size)])


def gray(frames: list[Frame]) -> list[Frame]:
    """A clip as a grayscale model sees it, in RGB."""
    return [to_channels(to_channels(frame, 1), 3) for frame in frames]


def apart(frames: list[Frame], others: list[Frame]) -> list[int]:
    """The largest difference of a pixel value in each pair of frames, in levels from 0 to 255."""
    pairs = zip(frames, others, strict=True)
    return [int(np.abs(frame.astype(int) - other).max()) for frame, other in pairs]
