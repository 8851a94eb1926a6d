"""A video as a folder of PNGs."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from .frames import Frame, encode_image
from .partial import PartialFolder

_NAME = re.compile(r"frame_(\d{6,})\.png")


def frame_names(folder: Path) -> set[str]:
    """Names of the frames in a folder; empty if there is no such folder."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return set(filter(_NAME.fullmatch, os.listdir(folder)))
    return set()


class ImageFolder:
    """Writes frame_000000.png and so on. An earlier video in the folder is replaced as a whole at the end.

    Args:
        folder: the folder; created, with its parents, if missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._folder, self._names = folder, list[str]()
        self._images = PartialFolder(folder)
        self.partial: Path | None = self._images.path

    @property
    def kept(self) -> int:
        return len(self._names)

    def write(self, frame: Frame) -> None:
        name = f"frame_{len(self._names):06d}.png"
        self._images.add(name, encode_image(".png", frame))
        self._names.append(name)

    def finish(self, *, overwrite: bool) -> None:
        replaced = frame_names(self._folder)
        if replaced and not overwrite:
            raise FileExistsError(f"{self._folder} has frames by now")
        self._images.finish(self._names, replaced)

    def close(self) -> None:
        self._images.close()

    def discard(self) -> None:
        self._images.discard()
