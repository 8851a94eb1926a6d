"""Small valid files, which the cases damage: weights, a training run, and videos in several formats."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
from command_kit import ROOT, RUN, ca2vdm, clip, save

from ca2vdm_cli.training.run_folder import AUTOENCODER_FILE, WEIGHTS_FILE

RECORDED = ROOT / "tests" / "golden" / "cyclic_prev2.safetensors"


@dataclass(frozen=True)
class Material:
    """Contents of files, by name."""

    run: dict[str, bytes]
    """A training run of the tiny preset."""
    recorded: bytes
    """A recorded run."""
    videos: dict[str, bytes]
    """Videos and images."""

    @property
    def surroundings(self) -> dict[str, bytes]:
        """Files that command lines name."""
        files = {name: self.videos[name] for name in ("clip.npz", "clip.mp4")}
        return self.run_folder | files | {"text.txt": b"text\n", "folder/0.png": self.videos["still.png"]}

    @property
    def run_folder(self) -> dict[str, bytes]:
        """The training run as the folder ``run``."""
        return {f"run/{name}": content for name, content in self.run.items()}


def make_material() -> Material:
    """Train the tiny preset for a step, and write a few frames in every format."""
    with tempfile.TemporaryDirectory() as folder:
        out, videos = Path(folder, "run"), Path(folder, "videos")
        short = ["--steps", 1, "--set", "training.autoencoder_steps=1", "--out", out, "-q"]
        assert ca2vdm("train", "--preset", "tiny", *RUN, *short) == 0
        videos.mkdir()
        for suffix in ("mp4", "mkv", "gif", "npz", "y4m"):
            save(videos / f"clip.{suffix}", clip(6))
        for suffix in ("png", "jpg", "webp"):
            assert cv2.imwrite(str(videos / f"still.{suffix}"), clip(1)[0])
        return Material(
            run={name: (out / name).read_bytes() for name in ("preset.yaml", WEIGHTS_FILE, AUTOENCODER_FILE)},
            recorded=RECORDED.read_bytes(),
            videos={path.name: path.read_bytes() for path in videos.iterdir()},
        )
