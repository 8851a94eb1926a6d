"""Outputs that are being written: under a name of their own, such as ``x.partial.mp4``, until they are finished.

After ``kill -9``, a power failure or a full disk the finished frames are there, in a file that FFmpeg or NumPy reads.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from ca2vdm_cli.atomic import create, in_use, lock, replacing, to_disk

LONGEST_NAME = 255
"""Bytes that a file name may have."""


class PartialFile:
    """A new file beside the target, locked while it is written.

    Each ``append`` adds all of its bytes or none. A killed process leaves the file. ``finish`` also removes what killed
    processes left for the same target if the new file begins with the same content, so that nothing is lost.

    Args:
        target: the file that it will become.
        suffix: suffix of the partial file, the target's by default.
        header: bytes at the beginning that differ between files of the same content.

    Attributes:
        path: the partial file.
        size: its length in bytes.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, target: Path, suffix: str | None = None, *, header: int = 0) -> None:
        self._target, self._suffix = target, target.suffix if suffix is None else suffix
        self._header, self.size = header, 0
        for path in _names(target, self._suffix):
            with suppress(FileExistsError):
                self._handle, self.path = create(path), path
                return

    def append(self, data: bytes | memoryview) -> None:
        """Add bytes at the end. Raises OSError, for example on a full disk; the file is then as long as before."""
        try:
            self.size += self._write(data, self.size)
        except BaseException:
            os.ftruncate(self._handle, self.size)
            raise

    def rewrite(self, header: bytes) -> None:
        """Write other bytes over the first ones. Raises OSError."""
        self._write(header, 0)

    def close(self) -> None:
        """Close the file; it stays under its partial name."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def discard(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        self.close()

    def finish(self, *, overwrite: bool, convert: Callable[[Path, Path], None] | None = None) -> None:
        """Give the complete file the target's name.

        Args:
            overwrite: replace a file that has this name by now.
            convert: makes the final file, at its second argument, from the partial one, its first.

        Raises:
            FileExistsError: there is such a file.
            OSError: the file cannot be converted or put in place. It keeps its partial name.
        """
        os.fsync(self._handle)
        for path in _leftovers(self._target, self._suffix, self.path):
            if path.is_file() and not in_use(path) and _begins_with(self.path, path, self._header):
                path.unlink(missing_ok=True)
        if convert:
            with replacing(self.path) as temporary:
                convert(self.path, temporary)
        if overwrite:
            self.path.replace(self._target)
        else:
            _rename_new(self.path, self._target)
        to_disk(self._target.parent)
        self.close()

    def _write(self, data: bytes | memoryview, offset: int) -> int:
        left = memoryview(data).cast("B")
        while left:
            written = os.pwrite(self._handle, left, offset)
            offset, left = offset + written, left[written:]
        return memoryview(data).nbytes


class PartialFolder:
    """The same for a folder of files: ``x.partial/`` beside a folder that doesn't exist yet, else inside of it.

    Args:
        target: the folder; if it exists, other files in it are left alone.

    Attributes:
        path: the partial folder.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, target: Path) -> None:
        self._target, self._inside = target, target.is_dir()
        self._place = target / "frames" if self._inside else target
        for path in _names(self._place, ""):
            with suppress(FileExistsError):
                path.mkdir()
                self.path, self._handle = path, os.open(path, os.O_RDONLY)
                lock(self._handle)
                return

    def add(self, name: str, data: bytes) -> None:
        """Add a file; it has its name only once it is complete. Raises OSError."""
        temporary = self.path / f"{name}.partial"
        try:
            with temporary.open("xb") as file:  # follows no symbolic link
                file.write(data)
            temporary.rename(self.path / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def finish(self, names: list[str], replaced: set[str]) -> None:
        """Put the files into the target's place.

        Args:
            names: all files of the partial folder.
            replaced: files of the target that they replace, which have these or other names.

        Raises:
            OSError: they cannot be put in place; the target's files are then as before.
        """
        os.sync()  # so that no file is empty after a power failure; to flush each on its own takes milliseconds
        self._remove_superseded()
        if not self._inside:
            self.path.rename(self._target)  # fails if there is a folder with files by now
            to_disk(self._target.parent)
        else:
            self._move(names, replaced)
        to_disk(self._target)
        self.close()

    def close(self) -> None:
        """Close the folder; it stays under its partial name."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def _move(self, names: list[str], replaced: set[str]) -> None:
        """Add new names first, which may fail on a full disk; to replace a file and to remove one takes no space."""
        added: list[str] = []
        try:
            for name in names:
                if name not in replaced:
                    (self.path / name).replace(self._target / name)
                    added.append(name)
        except OSError:
            for name in added:
                (self._target / name).replace(self.path / name)
            raise
        for name in names:
            if name in replaced:
                (self.path / name).replace(self._target / name)
        for name in replaced.difference(names):
            (self._target / name).unlink()
        self.path.rmdir()

    def _remove_superseded(self) -> None:
        for path in _leftovers(self._place, "", self.path):
            if path.is_dir() and not in_use(path):
                copies = ((self.path / file.name.removesuffix(".partial"), file) for file in path.iterdir())
                if all(copy.is_file() and file.is_file() and _begins_with(copy, file) for copy, file in copies):
                    shutil.rmtree(path, ignore_errors=True)


def _rename_new(path: Path, target: Path) -> None:
    """Rename a file to a name that is not taken. Raises FileExistsError, or another OSError."""
    try:
        os.link(path, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(17, os.strerror(17), str(target)) from None
        path.replace(target)
    else:
        path.unlink()


def _names(target: Path, suffix: str) -> Iterator[Path]:
    """x.partial.mp4, x.partial-2.mp4, ..."""
    stem = target.name.removesuffix(target.suffix) if suffix else target.name
    for number in count(1):
        end = f".partial{'' if number == 1 else f'-{number}'}{suffix}"
        yield target.with_name(os.fsdecode(os.fsencode(stem)[: LONGEST_NAME - len(os.fsencode(end))]) + end)


def _leftovers(target: Path, suffix: str, own: Path) -> list[Path]:
    """Other partial outputs for the same target."""
    stem, _, _ = next(_names(target, suffix)).name.rpartition(f".partial{suffix}")
    name = re.compile(rf"{re.escape(stem)}\.partial(-\d+)?{re.escape(suffix)}")
    return [
        target.with_name(other) for other in os.listdir(target.parent) if name.fullmatch(other) and other != own.name
    ]


def _begins_with(path: Path, start: Path, header: int = 0) -> bool:
    """Whether a file begins with all the content of another, regardless of a header."""
    with path.open("rb") as whole, start.open("rb") as part:
        whole.seek(header)
        part.seek(header)
        while block := part.read(1 << 20):
            if whole.read(len(block)) != block:
                return False
    return True
