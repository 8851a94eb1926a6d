"""A run's autoencoder: its weights in the run's folder, its training, and how well it reconstructs frames.

Shapes: N frames, C channels, H and W pixels.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from ca2vdm_cli.autoencoder import Autoencoder, ConvAutoencoder, load_autoencoder, save_autoencoder
from ca2vdm_cli.checkpoint import load_tensors, load_weights
from ca2vdm_cli.config import Preset
from ca2vdm_cli.data import ClipSource
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.presets import LoadedPreset
from ca2vdm_cli.video_codec import to_uint8
from ca2vdm_cli.video_io import Frame, write_image
from ca2vdm_cli.video_metrics import psnr

from .autoencoder import train_autoencoder
from .callbacks import TrainingCallbacks
from .run_folder import AUTOENCODER_FILE, VALIDATION_FOLDER, RunFolder
from .sheets import Row, labelled_sheet

STEPS = "steps"
"""Key of the file's metadata: for how many steps the autoencoder was trained."""
FRAMES = 32
"""Frames that the reconstruction is measured on."""
SHEET_COLUMNS = 8
ERROR_SCALE = 4
"""How much stronger the sheet shows errors."""


def open_autoencoder(
    loaded: LoadedPreset, config: Preset, out: Path, device: torch.device, seed: int, *, reuse: bool
) -> tuple[Autoencoder, Path | None]:
    """The run's autoencoder, or the preset's, and the file of its weights; None if it has yet to be trained.

    Args:
        loaded: the preset as it was given, which may name weights.
        config: the preset as it is trained.
        out: the run's folder.
        device: where to put it.
        seed: seed of new weights.
        reuse: whether the weights in the run's folder are the run's own.

    Raises:
        UsageError: it has no weights and is not to be trained.
    """
    assert config.video is not None
    copy = out / AUTOENCODER_FILE
    path = copy if reuse and copy.is_file() else loaded.autoencoder_weights_path
    torch.manual_seed(seed)
    autoencoder = load_autoencoder(config.autoencoder, config.video, config.model.in_channels, path)
    if isinstance(autoencoder, ConvAutoencoder) and path is None and not config.training.autoencoder_steps:
        raise UsageError(
            f"preset {loaded.name}: its autoencoder has no weights; set training.autoencoder_steps to train it"
        )
    return autoencoder.to(device), path


def copy_given_weights(autoencoder: Autoencoder, given: Path | None, out: Path) -> None:
    """Put the weights that a new run was given into its folder."""
    copy = out / AUTOENCODER_FILE
    if isinstance(autoencoder, ConvAutoencoder) and given is not None and given != copy:
        save_autoencoder(autoencoder, copy, _steps(given))
        read_back(autoencoder, copy)


def complete_autoencoder(
    autoencoder: ConvAutoencoder,
    config: Preset,
    source: ClipSource,
    folder: RunFolder,
    device: torch.device,
    seed: int,
    callbacks: TrainingCallbacks,
) -> bool:
    """Train the autoencoder if it has no weights in the run's folder yet, or its decoder if it has had fewer steps.

    Args:
        autoencoder: the run's, trained in place.
        config: ``training.autoencoder_steps`` counts all steps.
        source: where frames come from.
        folder: the run's folder.
        device: where to train.
        seed: the run's.
        callbacks: receive progress.

    Returns:
        Whether it was trained.

    Raises:
        UserError: a file can't be written, or a checkpoint does not fit the settings.
        KeyboardInterrupt: after an interrupt, once a checkpoint is written.
    """
    copy, checkpoints = folder.path / AUTOENCODER_FILE, folder.autoencoder_checkpoints
    first, steps = 0, config.training.autoencoder_steps
    if copy.is_file():
        first = _steps(copy) or steps  # weights from elsewhere don't say how long they were trained
        last, _ = checkpoints.newest()
        if first >= steps or (last is not None and last.facts.get("first") != str(first)):
            shutil.rmtree(checkpoints.path, ignore_errors=True)  # of a training that is complete
        if first >= steps:
            return False

    def begin(step: int, problems: list[str]) -> None:
        for problem in problems:
            callbacks.note(f"{problem}; continuing the autoencoder from step {step}")
        callbacks.on_autoencoder_start(step, steps)

    train_autoencoder(
        autoencoder,
        source,
        config.training,
        seed,
        lambda step, loss: callbacks.on_autoencoder_step(step, steps, loss),
        first=first,
        checkpoints=checkpoints,
        on_start=begin,
        on_interrupt=callbacks.on_interrupt,
    )
    save_autoencoder(autoencoder, copy, steps)
    shutil.rmtree(checkpoints.path, ignore_errors=True)
    read_back(autoencoder, copy)
    return True


def read_back(autoencoder: Autoencoder, path: Path) -> None:
    """Load the weights of a file, which are rounded: those that sampling and a resumed run will use."""
    load_weights(autoencoder, load_tensors(path)[0], str(path))


@torch.no_grad()
def report_reconstruction(
    autoencoder: Autoencoder, source: ClipSource, where: str, out: Path, device: torch.device
) -> str:
    """Write a sheet of reconstructed frames, and return a line with their PSNR.

    Args:
        autoencoder: what reconstructs them.
        source: where the frames come from.
        where: the same in words.
        out: the run's folder.
        device: the autoencoder's.
    """
    pixels = torch.cat([source.clip(index, 1).frames for index in range(FRAMES)]).to(device)  # (N, C, H, W)
    decoded = torch.cat([autoencoder.decode(autoencoder.encode(part)) for part in pixels.split(8)])
    true, ours = to_uint8(pixels).cpu().numpy(), to_uint8(decoded).cpu().numpy()
    levels = [psnr.measure(one[None], other[None]) for one, other in zip(ours, true, strict=True)]
    line = f"the autoencoder reconstructs frames at {np.mean(levels):.1f} dB (PSNR, {FRAMES} {where})"
    sheet = out / VALIDATION_FOLDER / "autoencoder.png"
    shown = slice(SHEET_COLUMNS)
    errors: Frame = np.clip(ERROR_SCALE * np.abs(ours[shown].astype(int) - true[shown]), 0, 255).astype(np.uint8)
    rows = [
        Row("truth", list(true[shown])),
        Row("decoded", list(ours[shown])),
        Row(f"error x {ERROR_SCALE}", list(errors)),
    ]
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        write_image(sheet, labelled_sheet(line, [f"{level:.1f} dB" for level in levels[shown]], rows))
    except (UserError, OSError):  # the line says enough
        return line
    return f"{line} → {sheet}"


def _steps(path: Path) -> int | None:
    """For how many steps the autoencoder in a file was trained; None if the file does not say."""
    text = load_tensors(path)[1].get(STEPS, "")
    return int(text) if text.isdecimal() and len(text) < 20 else None
