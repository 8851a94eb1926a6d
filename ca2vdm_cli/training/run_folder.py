"""A training run on disk: numbered checkpoints of which the last few are kept, and the averaged weights for sampling.

    RUN/preset.yaml              what is trained, and how: ``ca2vdm sample --preset RUN`` needs nothing else
    RUN/ema.safetensors          the newest averaged weights
    RUN/autoencoder.safetensors  for the conv autoencoder
    RUN/metrics.jsonl            one line a step; validation.jsonl, one a validation
    RUN/validation/              videos and contact sheets from fixed seeds
    RUN/tensorboard/             the same numbers for TensorBoard
    RUN/checkpoints/step-00000500/{ema,state}.safetensors, checkpoint.json

A checkpoint is written under another name and renamed when it is whole and on the disk, so a run can be killed at any
moment. ``checkpoint.json`` has the files' sizes and SHA-256, so that a damaged one is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.errors import UserError, as_user_error

WEIGHTS_FILE = "ema.safetensors"
STATE_FILE = "state.safetensors"
AUTOENCODER_FILE = "autoencoder.safetensors"
METRICS_FILE = "metrics.jsonl"
MANIFEST_FILE = "checkpoint.json"
CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step-([0-9]{8,12})")


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint."""

    folder: Path
    step: int
    """Steps done."""
    facts: dict[str, str]
    """What the run remembers beside tensors: its seed, where its data come from."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of one of its files."""
        tensors, _ = load_tensors(self.folder / name)
        return {key: value.clone() for key, value in tensors.items()}  # not of the file, which will be removed


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder, made when something is written.
        keep: how many checkpoints stay.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self.keep = path, keep

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint, whole or not."""
        return bool(self._numbered())

    def save(self, step: int, facts: dict[str, str], files: dict[str, dict[str, Tensor]]) -> None:
        """Write the checkpoint of a step, publish its averaged weights, and remove the oldest beyond ``keep``.

        Args:
            files: tensors by file name; ``WEIGHTS_FILE`` must be among them.

        Raises:
            UserError: it can't be written; what was there before still is.
        """
        final = self.path / CHECKPOINTS / f"step-{step:08d}"
        with suppress(UserError):
            self._read(final)
            self.publish(final)  # saved already, and whole
            return
        partial = final.with_name(f".{final.name}.partial")
        with _one_line(final):
            for leftover in final.parent.glob(".step-*"):  # of runs that were killed
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        listed = {}
        for name, tensors in files.items():
            save_tensors(partial / name, tensors, {"step": str(step)})
            with _one_line(final):
                _to_disk(partial / name)
                listed[name] = {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
        with _one_line(final):
            manifest = {"step": step, "facts": facts, "files": listed}
            (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (partial / MANIFEST_FILE, partial):
                _to_disk(path)
            if final.exists():  # a damaged one
                final.rename(final.with_name(f".{final.name}.old"))
            partial.rename(final)
            _to_disk(final.parent)
            self.publish(final)
            later = [folder for folder in self._numbered() if _number(folder) > step]  # damaged, or of a run given up
            before = [folder for folder in self._numbered() if _number(folder) <= step]
            for leftover in (*final.parent.glob(".step-*"), *later, *before[self.keep :]):
                shutil.rmtree(leftover)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and a line on each newer one that is damaged."""
        problems: list[str] = []
        for folder in self._numbered():
            try:
                return self._read(folder), problems
            except UserError as error:
                problems.append(str(error))
        return None, problems

    def drop_lines_after(self, name: str, step: int) -> None:
        """Drop lines of a log beyond ``step``: what a killed run did after its last checkpoint."""
        path = self.path / name
        with _one_line(path):
            self.path.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= step]
            if kept == lines:
                return
            temporary = path.with_name(f".{path.name}.partial")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            temporary.replace(path)

    def _numbered(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        found = (self.path / CHECKPOINTS).glob("step-*")
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_number, reverse=True)

    def _read(self, folder: Path) -> Checkpoint:
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            step, facts = int(manifest["step"]), {str(k): str(v) for k, v in manifest["facts"].items()}
            files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            raise UserError(f"{folder}: its {MANIFEST_FILE} is missing or damaged") from None
        if step != _number(folder) or not {WEIGHTS_FILE, STATE_FILE} <= files.keys():
            raise UserError(f"{folder}: its {MANIFEST_FILE} is of another checkpoint")
        for name, (size, digest) in files.items():
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise UserError(f"{folder}: {name} is missing")
            with as_user_error(f"{path}: cannot be read"):
                whole = path.stat().st_size == size and _digest(path) == digest
            if not whole:
                raise UserError(f"{path}: damaged (not the bytes that were written)")
        return Checkpoint(folder, step, facts)

    def publish(self, checkpoint: Path) -> None:
        """Put a checkpoint's averaged weights where ``sample`` looks for them, at once."""
        weights = checkpoint / WEIGHTS_FILE
        temporary = self.path / f".{WEIGHTS_FILE}.{os.getpid()}.partial"
        temporary.unlink(missing_ok=True)
        try:
            os.link(weights, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(weights, temporary)
        temporary.replace(self.path / WEIGHTS_FILE)
        temporary.unlink(missing_ok=True)  # where both were links to one file already, nothing was replaced


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _step_of(line: str) -> float:
    """The step of a line of metrics; endless for half a line, which a killed run may leave."""
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


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems can't for folders
            os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(path: Path) -> AbstractContextManager[None]:
    return as_user_error(f"{path}: cannot be written", "check permissions and free space")
