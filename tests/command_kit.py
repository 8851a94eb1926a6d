"""What tests share: how a command is called, and clips to give it."""

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
"""Of the fixture ``make``."""
Refused = Callable[..., str]
"""Of the fixture ``refused``."""
Report = Callable[..., Any]
"""Of the fixture ``report``."""
AddPlugin = Callable[..., None]
"""Of the fixture ``add_plugin``."""

ROOT = Path(__file__).parents[1]
"""The checkout."""
COMMANDS = ["sample", "extend", "train", "bench", "plan", "verify", "import", "backends", "plugins", "presets"]
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
    """Stripes that drift, in colour; every frame is different."""
    y, x = np.mgrid[0:height, 0:width]
    return [
        np.stack([128 + 100 * np.sin((x + 2 * y + 3 * i) / 7), 4 * y + i, 255 - 3 * x], -1)
        .clip(0, 255)
        .astype(np.uint8)
        for i in range(count)
    ]


def batch(source: ClipSource, index: int, size: int, frames: int) -> Tensor:
    """The clips ``index`` to ``index + size - 1`` as one (B, T, C, H, W) tensor."""
    return torch.stack([source.clip(i, frames) for i in range(index, index + size)])


def gray(frames: list[Frame]) -> list[Frame]:
    """What a gray model sees of a clip, as the RGB that it writes."""
    return [to_channels(to_channels(frame, 1), 3) for frame in frames]


def apart(frames: list[Frame], others: list[Frame]) -> list[int]:
    """Of every frame, by how many levels the pixel differs that differs most."""
    pairs = zip(frames, others, strict=True)
    return [int(np.abs(frame.astype(int) - other).max()) for frame, other in pairs]
