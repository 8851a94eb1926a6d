"""Readers list the videos of a data set, one reader for each layout on disk."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ca2vdm_cli.config import DataConfig, Preset
from ca2vdm_cli.errors import UsageError, as_user_error
from ca2vdm_cli.plugins import AUTO, Registry
from ca2vdm_cli.plugins import readers as _readers

from .clips import VideoClips
from .digits import MovingDigits
from .files import walk
from .source import ClipSource
from .videos import Video

SYNTHETIC = "moving-digits"
"""The value of ``data.format`` for the preset's ``synthetic_data``, which needs no reader."""


@dataclass(frozen=True)
class Layout:
    """The contents of a data set."""

    format: str
    """Name of the reader."""
    videos: tuple[Video, ...]
    """The videos, in an order that depends on their names only."""
    rejects: dict[str, str] = field(default_factory=dict)
    """Entries that should have been videos but cannot be used: reasons by name."""
    other: Mapping[str, int] = field(default_factory=dict)
    """Files that are no part of it: their number by suffix, such as ``{".txt": 3}``, and of ``hidden`` ones."""
    notes: tuple[str, ...] = ()
    """What the user should know about what is read, such as which folders are left out."""


class Reader(ABC):
    """Lists the videos of data sets that have one particular layout.

    Register an instance: ``ca2vdm_cli.readers.register(MyReader())``, or in a plug-in the hook
    ``ca2vdm_register_readers``. Most readers need only the ``Video`` classes of ``ca2vdm_cli.data``, such as
    ``VideoFile(name, caption, path)``. A ``Video`` class of your own is pickled for worker processes.
    """

    name: str
    """The value of ``data.format`` that selects this reader."""
    description: str
    """One line."""

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        """Whether ``data.format: auto`` should choose this reader. Plug-ins are asked before the built-in readers.

        Args:
            path: a file or folder.
            suffixes: the suffix of the file, or of all files in the folder, in lower case with the dot.
        """
        return False

    @abstractmethod
    def read(self, path: Path, data: DataConfig) -> Layout:
        """List the videos of a data set. Opens lists and indexes, but no video.

        Args:
            path: a file or folder, which exists.
            data: the preset's ``data`` section, with ``split`` and ``split_list``.

        Raises:
            UsageError: the path does not have this layout, or has no such split.
            UserError: a list or index cannot be read.
        """


readers: Registry[Reader] = _readers
"""All readers by name."""


def open_clips(path: Path | None, config: Preset, seed: int, frames: int) -> ClipSource:
    """Clips of a data set at a preset's frame size, drawn as its ``data`` section says.

    Args:
        path: a folder or file; None for the preset's synthetic data.
        config: a preset with a ``video`` section.
        seed: seed of the random draws.
        frames: length of the longest clip that will be drawn.

    Raises:
        UsageError: there is no such path, or it does not have the layout ``data.format``.
        UserError: no video in it is usable; the message gives the reasons.
    """
    if config.video is None:
        raise UsageError("video: this preset has no such section; it works on latents only and cannot read videos")
    data = config.data
    if path is None:
        if config.synthetic_data is None:
            raise UsageError("synthetic_data: this preset has no such section; name a data set")
        return MovingDigits(config.synthetic_data, config.video, seed)
    layout = read_layout(path, data)
    clips = VideoClips(str(path), layout.videos, layout.rejects, config.video, data, seed, frames)
    clips.notes = layout.notes
    return clips


def read_layout(path: Path, data: DataConfig) -> Layout:
    """List the videos of a data set. Opens lists and indexes, but no video.

    Args:
        path: a folder or file.
        data: the preset's ``data`` section; ``format``, ``split`` and ``split_list`` are used.

    Raises:
        UsageError: there is no such path, or it does not have the layout ``data.format``, or has no such split.
        UserError: a list or index cannot be read.
    """
    if data.format == SYNTHETIC:
        raise UsageError(f"{path}: data.format {SYNTHETIC} is synthesized on the fly, so no data set goes with it")
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such file or folder; name a video, a list, or a folder of videos")
    if data.format != AUTO:
        readers.check(data.format, "data.format")
    with as_user_error(f"{path}: cannot be read", "check its permissions"):
        reader = _guess(path) if data.format == AUTO else readers[data.format]
        return reader.read(path, data)


def _guess(path: Path) -> Reader:
    """The first reader that recognizes the files, those of plug-ins first; ``videos`` if none does."""
    suffixes = frozenset(file.suffix.lower() for file in (walk(path) if path.is_dir() else [path]))
    for name in sorted(readers, key=readers.is_builtin):
        if readers[name].recognizes(path, suffixes):
            return readers[name]
    return readers["videos"]
