"""A training run on disk: the last few checkpoints, and the newest averaged weights for sampling.

    RUN/preset.yaml              all settings; ``ca2vdm sample --preset RUN`` needs no others
    RUN/ema.safetensors          the newest averaged weights
    RUN/autoencoder.safetensors  weights of the conv or lowpass autoencoder
    RUN/metrics.jsonl            one line per step; validation.jsonl: one line per validation
    RUN/validation/              videos and contact sheets from fixed seeds
    RUN/tensorboard/             the same values for TensorBoard
    RUN/checkpoints/step-00000500/{ema,state}.safetensors, checkpoint.json
    RUN/checkpoints/autoencoder/ the same for the autoencoder, while it is trained

While a run is trained, ``RUN/.lock`` keeps other runs out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from ca2vdm_cli.atomic import replacing, write_file
from ca2vdm_cli.errors import UsageError, as_user_error
from ca2vdm_cli.files import hold_marker

from .checkpoints import Checkpoint, Checkpoints, cannot_write

WEIGHTS_FILE = "ema.safetensors"
STATE_FILE = "state.safetensors"
AUTOENCODER_FILE = "autoencoder.safetensors"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
AUTOENCODER_CHECKPOINTS = "autoencoder"
VALIDATION_FOLDER = "validation"
LOCK_FILE = ".lock"


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder; created when something is written.
        keep: how many of the newest checkpoints to keep.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / CHECKPOINTS, {WEIGHTS_FILE, STATE_FILE}, keep)
        folder = path / CHECKPOINTS / AUTOENCODER_CHECKPOINTS
        self.autoencoder_checkpoints = Checkpoints(folder, {AUTOENCODER_FILE, STATE_FILE}, keep)

    @property
    def begun(self) -> bool:
        """Whether there is any checkpoint, complete or damaged."""
        return self.checkpoints.begun

    def save(self, step: int, facts: dict[str, str], files: dict[str, dict[str, Tensor]]) -> None:
        """Write a checkpoint, publish its averaged weights, and remove all but the newest ``keep`` checkpoints.

        Args:
            step: steps done.
            facts: what the run remembers besides tensors.
            files: tensors by file name: ``WEIGHTS_FILE`` and ``STATE_FILE``.

        Raises:
            UserError: it can't be written; earlier checkpoints are left as they were.
        """
        checkpoint = self.checkpoints.save(step, facts, files)
        with cannot_write(checkpoint):
            self.publish(checkpoint)
        self.checkpoints.remove_others(step)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest complete checkpoint, and one line for each newer one that is damaged."""
        return self.checkpoints.newest()

    def drop_lines_after(self, name: str, step: int) -> None:
        """Drop the lines of a log beyond ``step``, which a killed run wrote after its last checkpoint."""
        path = self.path / name
        with cannot_write(path):
            self.path.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
            remaining = [line for line in lines if _step_of(line) <= step]
            if remaining == lines:
                return
            write_file(path, "".join(f"{line}\n" for line in remaining))

    def publish(self, checkpoint: Path) -> None:
        """Atomically put a checkpoint's averaged weights where sampling looks for them."""
        weights = checkpoint / WEIGHTS_FILE
        with replacing(self.path / WEIGHTS_FILE) as temporary:
            try:
                os.link(weights, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(weights, temporary)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder during the block. A folder that is still empty afterwards is removed.

        The operating system releases the lock of a process that was killed.

        Raises:
            UsageError: another process trains in this folder, or it can't be created.
        """
        missing = [place for place in (self.path, *self.path.parents) if not place.exists()]
        lock = self.path / LOCK_FILE
        with as_user_error(f"{self.path}: cannot be created", "choose another folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = _lock(lock, self.path)
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
            os.close(handle)
            with suppress(OSError):  # not empty
                for place in missing:
                    place.rmdir()


def _lock(path: Path, folder: Path) -> int:
    """An open file at ``path`` that this process has locked."""
    handle = hold_marker(path)
    if handle is None:
        owner = ""
        with suppress(OSError):
            owner = path.read_text(encoding="ascii", errors="replace").strip()
        process = f" (process {owner})" if owner.isdigit() else ""
        raise UsageError(f"out: {folder} is in use by another training{process}; wait for it, or choose another folder")
    os.truncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    return handle


def _step_of(line: str) -> float:
    """The step of a log line; infinity for half a line, which a killed run may leave."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return float("inf")
