"""Numbered checkpoints in a folder: the last few, each complete and checked.

    FOLDER/step-00000500/NAME.safetensors ..., checkpoint.json

A checkpoint is written under a temporary name and renamed once it is complete and on disk, so a run can be killed at
any moment. ``checkpoint.json`` has the files' sizes and SHA-256, so that damage is detected.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ca2vdm_cli.atomic import to_disk
from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.errors import UserError, as_user_error
from ca2vdm_cli.files import file_sha256

MANIFEST_FILE = "checkpoint.json"
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


class Checkpoints:
    """The newest checkpoints of a training.

    Args:
        path: their folder; created when something is written.
        files: names of the files that each checkpoint has.
        keep: how many of the newest to keep.
    """

    def __init__(self, path: Path, files: Collection[str], keep: int = 2) -> None:
        self.path, self.files, self.keep = path, frozenset(files), keep

    @property
    def begun(self) -> bool:
        """Whether there is any checkpoint, complete or damaged."""
        return bool(self._numbered())

    def save(self, step: int, facts: dict[str, str], files: dict[str, dict[str, Tensor]]) -> Path:
        """Write a checkpoint unless there is a complete one of this step, and remove all but the newest ``keep``.

        Args:
            step: steps done.
            facts: what the run remembers besides tensors.
            files: tensors by file name.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: it can't be written; earlier checkpoints are left as they were.
        """
        final = self.path / f"step-{step:08d}"
        with suppress(UserError):
            self._read(final)
            return final
        partial = final.with_name(f".{final.name}.partial")
        with cannot_write(final):
            for leftover in self.path.glob(".step-*"):  # of runs that were killed
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        file_facts = {}
        for name, tensors in files.items():
            save_tensors(partial / name, tensors, {"step": str(step)})
            with cannot_write(final):
                to_disk(partial / name)
                file_facts[name] = {"bytes": (partial / name).stat().st_size, "sha256": file_sha256(partial / name)}
        with cannot_write(final):
            manifest = {"step": step, "facts": facts, "files": file_facts}
            (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (partial / MANIFEST_FILE, partial):
                to_disk(path)
            if final.exists():  # a damaged one
                final.rename(final.with_name(f".{final.name}.old"))
            partial.rename(final)
            to_disk(self.path)
        return final

    def remove_others(self, step: int) -> None:
        """Remove all checkpoints but the newest ``keep`` up to this step, and what killed runs left."""
        # later ones are damaged, or from an abandoned run
        later = [folder for folder in self._numbered() if _number(folder) > step]
        before = [folder for folder in self._numbered() if _number(folder) <= step]
        with cannot_write(self.path):
            for leftover in (*self.path.glob(".step-*"), *later, *before[self.keep :]):
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

    def _numbered(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        folders = (path for path in self.path.glob("step-*") if _NAME.fullmatch(path.name))
        return sorted(folders, key=_number, reverse=True)

    def _read(self, folder: Path) -> Checkpoint:
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            step, facts = int(manifest["step"]), {str(k): str(v) for k, v in manifest["facts"].items()}
            files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            raise UserError(f"{folder}: its {MANIFEST_FILE} is missing or damaged") from None
        if step != _number(folder) or not self.files <= files.keys():
            raise UserError(f"{folder}: its {MANIFEST_FILE} belongs to another checkpoint")
        for name, (size, digest) in files.items():
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise UserError(f"{folder}: {name} is missing")
            if path.stat().st_size != size or file_sha256(path) != digest:
                raise UserError(f"{path}: damaged (its content differs from what was written)")
        return Checkpoint(folder, step, facts)


def cannot_write(path: Path) -> AbstractContextManager[None]:
    """Turn an operating system's error in the block into one line."""
    return as_user_error(f"{path}: cannot be written", "check permissions and free space")


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
