"""Finding the files of a data set. Whatever is not read is counted.

Names inside lists are not trusted: a name that is absolute, or points outside the folder, is rejected.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ca2vdm_cli.config import Split
from ca2vdm_cli.errors import UsageError, UserError, first_line

LINE = 2**20
"""Longest line of a list in bytes."""
_PARTS = {
    "train": r"(.*[_-])?train(ing)?",
    "test": r"(.*[_-])?test(ing)?",
    "val": r"(.*[_-])?(val|valid|validation|eval|dev)",
}
"""Names of the folders that hold the parts of a data set."""


@dataclass
class Found:
    """The files of a data set."""

    files: list[Path]
    """Those with the wanted suffixes, sorted."""
    rejects: dict[str, str] = field(default_factory=dict)
    """Why other entries cannot be read, by name."""
    other: Counter[str] = field(default_factory=Counter)
    """Number of other files by suffix."""
    notes: tuple[str, ...] = ()
    """What the user should know about the choice."""


def find(path: Path, suffixes: frozenset[str], split: Split) -> Found:
    """``path`` itself if it is a file, else the files in it with these suffixes that belong to the split."""
    if path.is_file():
        refuse_test_split(path, split)
        return Found([path])
    roots, left_out = _roots(path, split)
    found = Found([])
    for root in roots:
        for file in walk(root, lambda folder, reason: found.rejects.update({name_in(path, folder): reason})):
            suffix = file.suffix.lower()
            if file.name[0] == ".":
                found.other["hidden"] += 1
            elif suffix not in suffixes:
                found.other[suffix or "without a suffix"] += 1
            elif file.is_file():
                found.files.append(file)
            else:  # opening a named pipe would block
                found.rejects[name_in(path, file)] = "not a file" if file.exists() else "a broken symbolic link"
    found.files.sort()
    count = sum(file.suffix.lower() in suffixes for part in left_out for file in walk(part))
    if count:
        read, others = (", ".join(sorted(name_in(path, part) for part in parts)) for parts in (roots, left_out))
        found.notes = (f"data.split {split.value} reads {read}; {count} files in {others} are left out",)
    return found


def walk(folder: Path, on_error: Callable[[Path, str], None] = lambda folder, reason: None) -> Iterator[Path]:
    """All files in a folder and its subfolders, hidden files too, but not those in hidden folders.

    Symbolic links to folders are followed, after all other folders; each folder is read once.
    """

    def report(error: OSError) -> None:
        on_error(Path(error.filename), f"this folder cannot be read ({first_line(error)})")

    waiting, seen = [str(folder)], set()
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=report):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if name[0] != ".")
            waiting += (link for name in folders if os.path.islink(link := os.path.join(place, name)))
            yield from (Path(place, name) for name in names)


def _roots(path: Path, split: Split) -> tuple[list[Path], list[Path]]:
    """The subfolders of a split (``train``, ``sky_train``, …), or the folder itself if it is not split; and the
    subfolders of other splits."""
    if not path.is_dir():
        raise UserError(f"{path}: neither a file nor a folder; name a video, a list, or a folder of videos")
    parts = None if split is Split.ALL else _parts(path)
    if parts is None:
        if split is not Split.ALL:
            refuse_test_split(path, split)
        return [path], []
    held_out = parts["test"] or parts["val"]
    roots = parts["train"] if split is Split.TRAIN else held_out
    return roots, [folder for part in parts.values() for folder in part if folder not in roots]


def _parts(path: Path) -> dict[str, list[Path]] | None:
    """The subfolders of the splits, or None. A single subfolder is searched too, since many archives unpack to one."""
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name[0] != "."]
    parts = {
        part: [folder for folder in inner if re.fullmatch(pattern, folder.name.lower())]
        for part, pattern in _PARTS.items()
    }
    if parts["train"] and (parts["test"] or parts["val"]):
        return parts
    return _parts(inner[0]) if len(inner) == 1 and not inner[0].is_symlink() else None


def refuse_test_split(path: Path, split: Split) -> None:
    """Raise UsageError if the test split is wanted of a data set that has no splits."""
    if split is Split.TEST:
        raise UsageError(
            f"data.split: {path} has no folders train and test (or val); use train or all, or name another folder"
        )


def name_in(root: Path, path: Path) -> str:
    """A file's name in messages about a data set."""
    return path.name if path == root else path.relative_to(root).as_posix()


def is_safe(name: str) -> bool:
    """Whether a name in a list stays in the list's folder."""
    path = PurePosixPath(name)
    return bool(name) and "\0" not in name and "\\" not in name and not path.is_absolute() and ".." not in path.parts


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a list that are not empty, with their numbers.

    Raises:
        UserError: a line is too long, or not UTF-8.
    """
    number = 0
    with path.open("rb") as file:
        while line := file.readline(LINE + 1):
            number += 1
            if len(line) > LINE:
                raise UserError(f"{path}: line {number} is longer than {LINE} bytes; not a list of videos")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise UserError(f"{path}: line {number} is not UTF-8 text; not a list of videos") from None
            if text:
                yield number, text
