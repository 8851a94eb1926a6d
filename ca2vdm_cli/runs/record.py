"""A run folder of ``sample`` or ``extend``: what was asked for, and the journals of its videos.

DIR/run.json       the request, the preset, the weights' checksums, versions, and how far it got
DIR/lock           locked while a process writes the run
DIR/given.npy      the given frames as the model sees them, if there are any
DIR/input          a copy of standard input, if that was the input
DIR/batch-000/     the journal of the first videos (see ``generate.journal``), and so on
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ca2vdm_cli.errors import UsageError, UserError, as_user_error
from ca2vdm_cli.files import ADVICE, PARTIAL, hold_lock, is_locked, read_json, write_durably, write_json
from ca2vdm_cli.generate.journal import Journal

from .provenance import Provenance

FORMAT = 1
"""Version of ``run.json``."""
RUN_FILE = "run.json"
LOCK_FILE = "lock"
GIVEN_FILE = "given.npy"
INPUT_FILE = "input"
_OWN = re.compile(rf"{LOCK_FILE}|{re.escape(GIVEN_FILE)}|{INPUT_FILE}|batch-\d+|.*{re.escape(PARTIAL)}")
"""What a process that was killed at the start may leave."""


@dataclass(frozen=True)
class InputVideo:
    """The input of ``extend``."""

    source: str
    """As the user named it; ``-`` for standard input."""
    path: str
    """The file or folder; relative to the run folder for a copy of standard input."""
    sha256: str
    height: int
    width: int
    only_new: bool
    aspect: str
    size: str | None


@dataclass(frozen=True)
class Request:
    """What was asked for: with the same preset and weights, it determines all frames."""

    command: str
    """``sample`` or ``extend``."""
    options: dict[str, Any]
    """Options of ``Pipeline.sample`` and ``extend`` that say how to generate, all resolved."""
    frames: int
    videos: list[int]
    batch: int
    """Number of videos that are generated together."""
    outputs: list[str]
    """One for each video. Relative ones are in the run folder."""
    fps: str
    """Frames per second of the output, as a fraction."""
    format: str | None
    first_frame: bool = False
    """sample: whether it begins with a given frame."""
    first_frame_source: str | None = None
    """sample: the image or video that this frame is from."""
    first_frame_sha256: str | None = None
    input: InputVideo | None = None


@dataclass(frozen=True)
class Parent:
    """The run that a take branches off from."""

    id: str
    path: str
    chunks: int
    """Number of shared chunks."""
    frame: int
    """The first frame that is not shared, as numbered in the output."""


@dataclass(frozen=True)
class RunRecord:
    """The content of ``run.json``."""

    request: Request
    provenance: Provenance
    command_line: list[str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    parent: Parent | None = None
    input_frames: int = 0
    """extend: number of frames of the input."""
    finished: bool = False
    seconds: float = 0.0
    """Time of all sessions that ended by themselves or by Ctrl-C."""
    files: list[list[int] | None] = field(default_factory=list)
    """Size and modification time (ns) of each output as last closed; None for a folder or a pipe."""


_ADAPTER = TypeAdapter(RunRecord)


class RunFolder:
    """A run on disk.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """Whether there is a run."""
        return (self.path / RUN_FILE).exists()

    def check_new(self) -> None:
        """Raise ``UsageError`` if a new run can't use the folder."""
        if self.exists:
            raise UsageError(f"run: {self.path} holds a run; continue it with `ca2vdm resume`, or name another folder")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"run: {self.path} is not a folder; name another")
        foreign = [name for name in os.listdir(self.path) if not _OWN.fullmatch(name)] if self.path.exists() else []
        if foreign:
            raise UsageError(f"run: {self.path} has other files in it, such as {foreign[0]}; name a new folder")

    @contextmanager
    def locked(self, *, create: bool = False) -> Iterator[None]:
        """Lock the run. A new one is removed if the request turns out to be invalid, or no chunk is finished.

        Raises:
            UsageError: another process writes it.
            UserError: the folder can't be written.
        """
        made, invalid = create and not self.path.exists(), False
        with as_user_error(f"{self.path}: cannot be written", ADVICE):
            if create:
                self.path.mkdir(parents=True, exist_ok=True)
            lock = hold_lock(self.path / LOCK_FILE)
        if lock is None:
            raise UsageError(f"{self.path}: another process is writing this run; wait for it, or name another folder")
        try:
            if create:
                self.check_new()
                self._remove_own()
            yield
        except UsageError:
            invalid = True
            raise
        finally:
            if create and (invalid or not any(self.path.glob("batch-*/chunk-*"))):
                self._remove_own()
                with suppress(OSError):
                    (self.path / RUN_FILE).unlink(missing_ok=True)
                    (self.path / LOCK_FILE).unlink(missing_ok=True)
                    if made:
                        self.path.rmdir()
            os.close(lock)

    @property
    def in_use(self) -> bool:
        """Whether a process writes it now."""
        return is_locked(self.path / LOCK_FILE)

    def read(self) -> RunRecord:
        """The content of ``run.json``.

        Raises:
            UserError: it is missing, damaged, or of another version.
        """
        if not self.exists:
            raise UsageError(f"{self.path}: not a run; name the folder that was given with --run")
        content = read_json(self.path / RUN_FILE)
        if content.pop("format", None) != FORMAT:
            raise UserError(f"{self.path / RUN_FILE}: written by another version of ca2vdm")
        try:
            return _ADAPTER.validate_python(content)
        except ValidationError as error:
            key = ".".join(map(str, error.errors()[0]["loc"]))
            raise UserError(f"{self.path / RUN_FILE}: damaged at {key}; restore it from a copy") from None

    def write(self, record: RunRecord) -> None:
        """Replace ``run.json``."""
        write_json(self.path / RUN_FILE, {"format": FORMAT, **asdict(record)})

    def write_given(self, frames: np.ndarray) -> None:
        """Write the given frames, (T, H, W, channels) uint8."""

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, frames, allow_pickle=False)

        write_durably(self.path / GIVEN_FILE, save)

    def read_given(self) -> np.ndarray:
        """The given frames, (T, H, W, channels) uint8.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            with (self.path / GIVEN_FILE).open("rb") as file:
                frames: np.ndarray = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise UserError(f"{self.path / GIVEN_FILE}: missing or damaged; start the run again") from None
        return frames

    def journal(self, number: int) -> Journal:
        """The journal of a batch of videos."""
        return Journal(self.path / f"batch-{number:03d}")

    def place(self, path: str) -> str:
        """How the record refers to a path: relative if it is inside the folder, else absolute."""
        if path == "-":
            return path
        absolute, end = Path(os.path.abspath(path)), "/" * path.endswith("/")
        inside = absolute.is_relative_to(self.path.resolve())
        return f"{absolute.relative_to(self.path.resolve()) if inside else absolute}{end}"

    def located(self, path: str) -> str:
        """The path that the record refers to."""
        return path if path == "-" else str(self.path / path) + "/" * path.endswith("/")

    def _remove_own(self) -> None:
        """Remove what an earlier or failed start has left."""
        for path in self.path.iterdir():
            if path.name != LOCK_FILE and _OWN.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
