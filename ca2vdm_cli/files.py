"""Files of runs: JSON written whole or not at all, checksums, and locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .atomic import replacing
from .errors import UserError, as_user_error

PARTIAL = ".partial"
"""Suffix of files that are being written; a killed process may leave one."""
ADVICE = "check permissions and free space"


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that a crash leaves either the old file or the complete new one, also if the machine stops.

    Args:
        path: the file; its folder exists.
        write: writes the content to the path that it is given.

    Raises:
        UserError: it cannot be written; the old file is left as it was.
    """
    with as_user_error(f"{path}: cannot be written", ADVICE), replacing(path) as temporary:
        write(temporary)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as indented JSON; see ``write_durably``."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_durably(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def read_json(path: Path) -> dict[str, Any]:
    """Read an object that ``write_json`` wrote.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: missing or damaged")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of the names and contents of its files."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.is_file()):
            digest.update(f"{file.name}\0{file_sha256(file)}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()
    with as_user_error(f"{path}: cannot be read"), path.open("rb") as source:
        while block := source.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def hold_lock(path: Path) -> int | None:
    """Lock a file, which is created if needed, until the returned handle is closed; None if another process holds it.

    The lock ends with the process, however it ends. The file itself stays. On a file system without locks, nothing is
    locked and nobody is refused.

    Raises:
        OSError: it cannot be created.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        pass
    return handle


def hold_marker(marker: Path) -> int | None:
    """Like ``hold_lock``, for a file that its last holder removes before it closes the handle."""
    while True:
        handle = hold_lock(marker)
        if handle is None:
            return None
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(marker)):
                return handle
        os.close(handle)  # it was removed in between


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


@contextmanager
def reserved(path: Path) -> Iterator[bool]:
    """Reserve a name that does not exist yet, among all processes that do so; yields whether it was free.

    A hidden lock file beside it marks the reservation, and is removed at the end. One that a killed process has left is
    taken over. Where no such file can be created, nothing is reserved.
    """
    marker = path.with_name(f".{path.name}.reserved")
    try:
        handle = hold_marker(marker)
    except OSError:
        yield True
        return
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            marker.unlink()
        os.close(handle)
