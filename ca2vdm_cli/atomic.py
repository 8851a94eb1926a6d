"""Files that appear whole or not at all, and temporary names that can't be guessed and don't stay behind."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\..*\.[a-z0-9_]{8}\.partial", re.DOTALL)
"""The folders of ``replacing``."""
_swept: set[Path] = set()
"""Folders in which this process has looked for temporary folders of killed ones."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file that takes the place of another, or of none, once it is complete and on disk.

    Yields a path in a new folder beside ``target`` that only its owner can enter, so that nobody can put a symbolic
    link there; libraries may write to it by name. If the block raises an error, ``target`` stays as it was. If the
    process is killed, the folder (``.NAME.xxxxxxxx.partial``) stays, until another process writes beside it.

    Args:
        target: the file; its folder must exist. A symbolic link is replaced, not followed.

    Raises:
        OSError: the folder cannot be made, or the file cannot be put in place.
    """
    _sweep(target.parent)
    folder, handle = _temporary_folder(target)
    try:
        temporary = folder / target.name
        yield temporary
        to_disk(temporary)
        temporary.replace(target)
        to_disk(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def write_file(target: Path, content: bytes | str) -> None:
    """Write a file with ``replacing``; text is encoded in UTF-8. Raises OSError."""
    with replacing(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def create(path: Path) -> int:
    """Create a file and lock it for as long as the returned descriptor is open.

    Raises:
        FileExistsError: the name is taken, even if by a symbolic link that leads nowhere.
        OSError: it cannot be created.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    lock(handle)
    return handle


def lock(handle: int) -> bool:
    """Lock an open file or folder until its descriptor is closed, or its process has ended; False if it is locked
    already, or its file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def in_use(path: Path) -> bool:
    """Whether a process has locked this file or folder. If that can't be found out, it counts as in use."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        return not lock(handle)
    finally:
        os.close(handle)


def to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk, so that they outlast a power failure. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems can't flush folders
            raise
    finally:
        os.close(handle)


def _temporary_folder(target: Path) -> tuple[Path, int]:
    """A new, locked folder beside ``target``, and the descriptor that holds the lock."""
    name = os.fsdecode(os.fsencode(target.name)[:200])  # names have up to 255 bytes
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=target.parent))
        with suppress(FileNotFoundError):  # another process may remove the folder before it is locked
            handle = os.open(folder, os.O_RDONLY)
            lock(handle)
            if folder.exists():
                return folder, handle
            os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove the temporary folders of processes that were killed; once per folder, because it may be large."""
    if folder in _swept:
        return
    _swept.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False) and not in_use(Path(entry)):
                shutil.rmtree(entry.path, ignore_errors=True)
