"""Readers of lists: JSON Lines, JSON and CSV files that name videos and their captions, in the spellings that other
tools use."""

from __future__ import annotations

import csv
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ca2vdm_cli.config import DataConfig
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.video_io import READABLE_IMAGE_SUFFIXES, natural_order

from .files import is_safe, lines, refuse_test_split
from .readers import Layout, Reader
from .videos import ImageFolder, Video, VideoFile

PATH_KEYS = ("path", "file_name", "media_path", "video_path", "video", "file_path", "filepath", "filename", "file")
"""Keys that may hold a video's path; the first that an entry has is used."""
TEXT_KEYS = ("text", "caption", "prompt", "description")
"""Keys that may hold its caption."""
UNUSABLE = 1000
"""After this many unusable entries and no usable one, a file is not a list of videos."""
JSON_BYTES = 2**28
"""Largest JSON file, which is read as a whole."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class ListReader(Reader):
    """A file of entries, each a mapping with a path and optionally a caption."""

    suffix: str
    """Suffix of the files that are recognized."""

    @abstractmethod
    def entries(self, path: Path) -> Iterator[tuple[str, object]]:
        """The entries with their names in messages; ValueError in place of one that cannot be parsed."""

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        return path.is_file() and self.suffix in suffixes

    def read(self, path: Path, data: DataConfig) -> Layout:
        if not path.is_file():
            raise UsageError(
                f"{path}: not a file; data.format {self.name} takes a {self.suffix} file in the videos' folder"
            )
        refuse_test_split(path, data.split)
        videos: list[Video] = []
        rejects: dict[str, str] = {}
        for label, entry in self.entries(path):
            try:
                videos.append(_video(path.parent, label, entry))
            except _Unusable as error:
                rejects[error.name] = str(error)
            if len(rejects) >= UNUSABLE and not videos:
                first = next(iter(rejects.items()))
                raise UserError(f"{path}: not a list of videos ({first[0]}: {first[1]}; and {UNUSABLE - 1} more)")
        return Layout(self.name, tuple(videos), rejects)


class _Unusable(Exception):
    """An entry that names no video."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


def _video(folder: Path, label: str, entry: object) -> Video:
    """The video that an entry of a list in ``folder`` names; raises _Unusable."""
    if isinstance(entry, ValueError):
        raise _Unusable(label, str(entry))
    if not isinstance(entry, Mapping):
        raise _Unusable(label, "must be an object with a string 'path' and, optionally, a string 'text'")
    key = next((key for key in PATH_KEYS if key in entry), None)
    if key is None:
        seen = ", ".join(repr(str(key)[:40]) for key in list(entry)[:8]) or "no keys"
        raise _Unusable(label, f"has {seen}; the video's path is expected under {', '.join(map(repr, PATH_KEYS[:3]))}")
    name, text = entry[key], next((entry[key] for key in TEXT_KEYS if key in entry), None)
    if any(isinstance(one, str) and _SURROGATE.search(one) for one in (name, text)):
        raise _Unusable(label, "has half a character (a lone surrogate)")
    if not isinstance(name, str) or not (text is None or isinstance(text, str)):
        raise _Unusable(label, f"must have a string {key!r} and, optionally, a string 'text'")
    if not is_safe(name):
        raise _Unusable(label, f"{key} must be relative and stay in the list's folder")
    title, file = f"{label}: {name}", folder / name
    if not os.path.isdir(file):
        return VideoFile(title, text, file)
    images = [image for image in file.iterdir() if image.suffix.lower() in READABLE_IMAGE_SUFFIXES]
    names = sorted((image.name for image in images if image.name[0] != "." and image.is_file()), key=natural_order)
    if not names:
        raise _Unusable(label, f"{name} is a folder without images")
    return ImageFolder(title, text, file, tuple(names))


class JsonLinesReader(ListReader):
    """Lists in JSON Lines."""

    name = "jsonl"
    description = "one JSON object per line, with a path and optionally a text (MSR-VTT and similar)"
    suffix = ".jsonl"

    def entries(self, path: Path) -> Iterator[tuple[str, object]]:
        for number, line in lines(path):
            entry: object
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = ValueError("not JSON")
            yield f"line {number}", entry


class JsonReader(ListReader):
    """Lists in JSON."""

    name = "json"
    description = "one JSON array of such objects"
    suffix = ".json"

    def entries(self, path: Path) -> Iterator[tuple[str, object]]:
        if path.stat().st_size > JSON_BYTES:
            raise UserError(f"{path}: larger than {JSON_BYTES // 2**20} MiB; convert it to JSON Lines")
        try:
            content: Any = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise UserError(f"{path}: not JSON; a list is an array of objects") from None
        if not isinstance(content, list):
            raise UserError(f"{path}: holds {type(content).__name__}, not an array of objects; make it one")
        yield from ((f"entry {number}", entry) for number, entry in enumerate(content, 1))


class CsvReader(ListReader):
    """Lists in CSV."""

    name = "csv"
    description = "a table with a header line, and columns as in jsonl"
    suffix = ".csv"

    def entries(self, path: Path) -> Iterator[tuple[str, object]]:
        table = csv.DictReader((f"{line}\n" for _, line in lines(path)), restkey="", strict=True)
        try:
            columns = [column.strip() for column in table.fieldnames or ()]
            if not set(columns) & set(PATH_KEYS):
                raise UsageError(
                    f"{path}: has the columns {', '.join(columns)[:200] or 'of an empty file'}; the videos' paths are "
                    f"expected in a column {', '.join(PATH_KEYS[:3])}"
                )
            table.fieldnames = columns
            for row in table:
                yield f"row {table.line_num}", {key: value for key, value in row.items() if key and value}
        except csv.Error as error:
            raise UserError(f"{path}: row {table.line_num} is not CSV ({error}); check its quotes") from None


jsonl, json_list, csv_table = JsonLinesReader(), JsonReader(), CsvReader()
