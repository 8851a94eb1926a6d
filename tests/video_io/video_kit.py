"""Clips to write and compare, and programs that read and write them."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np

from ca2vdm_cli.video_io import (
    Frame,
    open_reader,
    open_writer,
)

LOSSY = {"clip.mp4": 38.0, "clip.mkv": 38.0, "clip.gif": 30.0, "clip.y4m": 45.0}
EXACT = ["clip.npz", "clip/"]
NTSC = Fraction(30000, 1001)


def make_clip(count: int = 6, height: int = 48, width: int = 64) -> list[Frame]:
    """Smooth drifting colours without symmetry; every frame is different."""
    y, x = np.mgrid[0:height, 0:width]
    return [
        np.stack([40 + x * 3 - i * 2, 30 + y * 4 - i, 128 + 60 * np.sin((x + 2 * y) / 25 + i / 3)], -1)
        .clip(0, 255)
        .astype(np.uint8)
        for i in range(count)
    ]


def save(path: Path | str, frames: list[Frame], fps: Fraction | float = 8, **options: object) -> None:
    with open_writer(path, fps=fps, **options) as writer:  # type: ignore[arg-type]
        for frame in frames:
            writer.write(frame)
    assert writer.frames == len(frames)


def load(path: Path | str) -> list[Frame]:
    with open_reader(path) as reader:
        return list(reader)


def psnr(a: Frame, b: Frame) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def assert_close(frames: list[Frame], expected: list[Frame], decibels: float) -> None:
    assert len(frames) == len(expected)
    for frame, other in zip(frames, expected, strict=True):
        assert frame.shape == other.shape and frame.dtype == np.uint8
        assert psnr(frame, other) >= decibels


def child(code: str, **pipes: object) -> subprocess.Popen[bytes]:
    """Another Python that runs ``code`` and treats warnings as errors."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", "from ca2vdm_cli.video_io import *\n" + code]
    return subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]
