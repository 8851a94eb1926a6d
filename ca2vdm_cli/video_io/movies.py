"""A video as a file that players read, or as a stream into a pipe."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

from .encoding import CODECS, Encoder, remux
from .formats import OutputFormat
from .frames import Frame
from .partial import PartialFile


class MovieFile:
    """Writes mp4, mkv, gif or y4m. The partial file can be played at any time, but not all players can seek in it.

    Args:
        path: the file.
        kind: its format.
        encoder: gives the bytes.
        metadata: title, comment and so on, for mp4 and mkv.
    """

    def __init__(self, path: Path, kind: OutputFormat, encoder: Encoder, metadata: Mapping[str, str] | None) -> None:
        self._kind, self._encoder, self._metadata = kind, encoder, metadata
        self._count, self._torn = 0, False
        self._file = PartialFile(path)
        self.partial: Path | None = self._file.path

    @property
    def kept(self) -> int:
        return max(0, self._count - CODECS[self._kind].held)

    def write(self, frame: Frame) -> None:
        self._torn = True
        self._file.append(self._encoder.encode(frame))
        self._count, self._torn = self._count + 1, False

    def finish(self, *, overwrite: bool) -> None:
        if not self._torn:  # by an interrupt within a frame, after which the encoder is not in step with the file
            self._file.append(self._encoder.finish())
        seekable = CODECS[self._kind].final_options is not None
        convert = partial(remux, self._kind, metadata=self._metadata, frames=None if self._torn else self._count)
        self._file.finish(overwrite=overwrite, convert=convert if seekable else None)

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        self._file.discard()


class MovieStream:
    """Writes a video into a pipe or device, each frame as soon as it is there.

    Args:
        path: a named pipe or device; None for standard output.
        encoder: gives the bytes.
    """

    partial: Path | None = None
    kept = 0

    def __init__(self, path: Path | None, encoder: Encoder) -> None:
        self._file: BinaryIO | None = path.open("wb", buffering=0) if path else None
        self._encoder, self._torn = encoder, False

    def write(self, frame: Frame) -> None:
        self._send(self._encoder.encode(frame))

    def finish(self, *, overwrite: bool) -> None:
        try:
            self._send(self._encoder.finish())
        finally:
            self.close()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def discard(self) -> None:
        self.close()

    def _send(self, data: bytes) -> None:
        """Pass bytes on, unless an earlier write was interrupted midway."""
        if self._torn:
            return
        self._torn = True
        out = self._file or sys.stdout.buffer
        raw = getattr(out, "raw", out)  # a buffer would fail again when Python exits
        left = memoryview(data)
        while left:
            left = left[raw.write(left) or 0 :]
        self._torn = False


def is_special(path: Path) -> bool:
    """Whether something exists at a path that is neither a file nor a folder: a named pipe, a device, a socket."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
