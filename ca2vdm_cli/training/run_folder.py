"""A training run on disk: the last few checkpoints, and the newest averaged weights for sampling.

    RUN/preset.yaml              all settings; ``ca2vdm sample --preset RUN`` needs no others
    RUN/ema.safetensors          the newest averaged weights
    RUN/autoencoder.safetensors  weights of the conv or lowpass autoencoder
    RUN/metrics.jsonl            one line per step; validation.jsonl: one line per validation
    RUN/validation/              videos and contact sheets from fixed seeds
    RUN/tensorboard/             the same values for TensorBoard
    RUN/checkpoints/step-00000500/{ema,state}.safetensors, checkpoint.json

A checkpoint is written under a temporary name and renamed once it is complete and on disk, so a run can be killed at
any moment. ``checkpoint.json`` has the files' sizes and SHA-256, so that damage is detected.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ca2vdm_cli.atomic import replacing, to_disk, write_file
from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.errors import UserError, as_user_error

WEIGHTS_FILE = "ema.safetensors"
STATE_FILE = "state.safetensors"
AUTOENCODER_FILE = "autoencoder.safetensors"
METRICS_FILE = "metrics.jsonl"
MANIFEST_FILE = "checkpoint.json"
CHECKPOINTS = "checkpoints"
VALIDATION_FOLDER = "validation"
_NAME = re.compile(r"step-([0-9]{8,12})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    step: int
    """Steps done."""
    facts: dict[str, str]
    """What the run remembers besides tensors: its seed and the source of its data."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of one of its files."""
        tensors, _ = load_tensors(self.folder / name)
        return {key: value.clone() for key, value in tensors.items()}  # a copy, because the file will be removed


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder; created when something is written.
        keep: how many of the newest checkpoints to keep.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self.keep = path, keep

    @property
    def begun(self) -> bool:
        """Whether there is any checkpoint, complete or damaged."""
        return bool(self._numbered())

    def save(self, step: int, facts: dict[str, str], files: dict[str, dict[str, Tensor]]) -> None:
        """Write a checkpoint, publish its averaged weights, and remove all but the newest ``keep`` checkpoints.

        Args:
            step: steps done.
            facts: what the run remembers besides tensors.
            files: tensors by file name; ``WEIGHTS_FILE`` must be among them.

        Raises:
            UserError: it can't be written; earlier checkpoints are left as they were.
        """
        final = self.path / CHECKPOINTS / f"step-{step:08d}"
        with suppress(UserError):
            self._read(final)
            self.publish(final)  # saved already, and complete
            return
        partial = final.with_name(f".{final.name}.partial")
        with _one_line(final):
            for leftover in final.parent.glob(".step-*"):  # of runs that were killed
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        file_facts = {}
        for name, tensors in files.items():
            save_tensors(partial / name, tensors, {"step": str(step)})
            with _one_line(final):
                to_disk(partial / name)
                file_facts[name] = {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
        with _one_line(final):
            manifest = {"step": step, "facts": facts, "files": file_facts}
            (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (partial / MANIFEST_FILE, partial):
                to_disk(path)
            if final.exists():  # a damaged one
                final.rename(final.with_name(f".{final.name}.old"))
            partial.rename(final)
            to_disk(final.parent)
            self.publish(final)
            later = [
                folder for folder in self._numbered() if _number(folder) > step
            ]  # damaged, or from an abandoned run
            before = [folder for folder in self._numbered() if _number(folder) <= step]
            for leftover in (*final.parent.glob(".step-*"), *later, *before[self.keep :]):
                shutil.rmtree(leftover)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest complete checkpoint, and one line for each newer one that is damaged."""
        problems: list[str] = []
        for folder in self._numbered():
            try:
                return self._read(folder), problems
            except UserError as error:
                problems.append(str(error))
        return None, problems

    def drop_lines_after(self, name: str, step: int) -> None:
        """Drop the lines of a log beyond ``step``, which a killed run wrote after its last checkpoint."""
        path = self.path / name
        with _one_line(path):
            self.path.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
            remaining = [line for line in lines if _step_of(line) <= step]
            if remaining == lines:
                return
            write_file(path, "".join(f"{line}\n" for line in remaining))

    def _numbered(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        folders = (self.path / CHECKPOINTS).glob("step-*")
        return sorted((path for path in folders if _NAME.fullmatch(path.name)), key=_number, reverse=True)

    def _read(self, folder: Path) -> Checkpoint:
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            step, facts = int(manifest["step"]), {str(k): str(v) for k, v in manifest["facts"].items()}
            files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            raise UserError(f"{folder}: its {MANIFEST_FILE} is missing or damaged") from None
        if step != _number(folder) or not {WEIGHTS_FILE, STATE_FILE} <= files.keys():
            raise UserError(f"{folder}: its {MANIFEST_FILE} belongs to another checkpoint")
        for name, (size, digest) in files.items():
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise UserError(f"{folder}: {name} is missing")
            with as_user_error(f"{path}: cannot be read"):
                intact = path.stat().st_size == size and _digest(path) == digest
            if not intact:
                raise UserError(f"{path}: damaged (its content differs from what was written)")
        return Checkpoint(folder, step, facts)

    def publish(self, checkpoint: Path) -> None:
        """Atomically put a checkpoint's averaged weights where sampling looks for them."""
        weights = checkpoint / WEIGHTS_FILE
        with replacing(self.path / WEIGHTS_FILE) as temporary:
            try:
                os.link(weights, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(weights, temporary)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _step_of(line: str) -> float:
    """The step of a log line; infinity for half a line, which a killed run may leave."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return float("inf")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _one_line(path: Path) -> AbstractContextManager[None]:
    return as_user_error(f"{path}: cannot be written", "check permissions and free space")
