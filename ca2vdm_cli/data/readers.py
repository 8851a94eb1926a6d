"""Readers list the videos of a data set, one reader for each layout on disk.

Names inside lists (UCF-101, JSONL) are not trusted: a name that is absolute, or points outside the folder, is rejected.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ca2vdm_cli.config import DataConfig, Preset, Split
from ca2vdm_cli.errors import UsageError, UserError, as_user_error
from ca2vdm_cli.plugins import AUTO, Registry
from ca2vdm_cli.plugins import readers as _readers
from ca2vdm_cli.video_io import READABLE_IMAGE_SUFFIXES, natural_order

from .clips import VideoClips
from .digits import MovingDigits
from .records import find_records
from .source import ClipSource
from .videos import ArrayVideo, ImageFolder, RecordVideo, Video, VideoFile, open_array

VIDEO_SUFFIXES = frozenset(
    (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv", ".y4m")
)
"""Suffixes of video files in a folder."""
RECORD_SUFFIXES = frozenset((".tfrecord", ".tfrecords"))
"""Suffixes of TFRecord files."""
SYNTHETIC = "moving-digits"
"""The value of ``data.format`` for the preset's ``synthetic_data``, which needs no reader."""
LINE = 2**20
"""Longest line of a list in bytes."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_UCF_LISTS = "ucfTrainTestlist"
_UCF_LINE = re.compile(r"([A-Za-z0-9]+)/(v_[A-Za-z0-9]+_g\d+_c\d+\.avi)(?: \d+)?")


@dataclass(frozen=True)
class Layout:
    """The contents of a data set."""

    format: str
    """Name of the reader."""
    videos: tuple[Video, ...]
    """The videos, in an order that depends on their names only."""
    rejects: dict[str, str] = field(default_factory=dict)
    """Entries that should have been videos but cannot be used: reasons by name."""


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
    return VideoClips(str(path), layout.videos, layout.rejects, config.video, data, seed, frames)


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


# --- finding files ----------------------------------------------------------------------------------------------------


def _guess(path: Path) -> Reader:
    """The first reader that recognizes the files, those of plug-ins first; ``videos`` if none does."""
    suffixes = frozenset(file.suffix.lower() for file in (_files(path) if path.is_dir() else [path]))
    for name in sorted(readers, key=readers.is_builtin):
        if readers[name].recognizes(path, suffixes):
            return readers[name]
    return readers["videos"]


def _files(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, except hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(place, name) for name in names if name[0] != ".")


def _find(path: Path, suffixes: frozenset[str], split: Split) -> list[Path]:
    """``path`` itself if it is a file, else the files in it with these suffixes that belong to the split, sorted."""
    if path.is_file():
        _refuse_test_split(path, split)
        return [path]
    files = (file for root in _roots(path, split) for file in _files(root))
    return sorted(file for file in files if file.suffix.lower() in suffixes and file.is_file())  # not a named pipe


def _roots(path: Path, split: Split) -> list[Path]:
    """The subfolders of a split (``train``, ``sky_train``, …), or the folder itself if it is not split."""
    parts = None if split is Split.ALL else _parts(path)
    if parts is None:
        if split is not Split.ALL:
            _refuse_test_split(path, split)
        return [path]
    return parts[split]


def _parts(path: Path) -> dict[Split, list[Path]] | None:
    """The subfolders of both splits, or None. A single subfolder is searched too, since many archives unpack to one."""
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    parts = {
        split: [folder for folder in inner if re.fullmatch(rf"(.*[_-])?{split.value}(ing)?", folder.name.lower())]
        for split in (Split.TRAIN, Split.TEST)
    }
    if all(parts.values()):
        return parts
    return _parts(inner[0]) if len(inner) == 1 else None


def _refuse_test_split(path: Path, split: Split) -> None:
    if split is Split.TEST:
        raise UsageError(f"data.split: {path} has no folders train and test; use train or all, or name another folder")


def _name(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


def _is_safe(name: str) -> bool:
    """Whether a name in a list stays in the list's folder."""
    path = PurePosixPath(name)
    return bool(name) and "\0" not in name and "\\" not in name and not path.is_absolute() and ".." not in path.parts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-empty lines of a list, with their numbers.

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


# --- layouts ----------------------------------------------------------------------------------------------------------


def _ucf_lists(path: Path) -> Iterator[Path]:
    """The folders that hold the official lists."""
    for folder in (path / _UCF_LISTS, path):
        if (folder / "trainlist01.txt").is_file():
            yield folder


class VideosReader(Reader):
    """Video files."""

    name = "videos"
    description = "video files in nested folders, or one video file"

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        return bool(suffixes & VIDEO_SUFFIXES)

    def read(self, path: Path, data: DataConfig) -> Layout:
        files = _find(path, VIDEO_SUFFIXES, data.split)
        return Layout(self.name, tuple(VideoFile(_name(file, path), None, file) for file in files), {})


class FramesReader(Reader):
    """Folders of images."""

    name = "frames"
    description = "folders of images, one folder per video (SkyTimelapse, BAIR as images)"

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        return path.is_dir() and bool(suffixes & READABLE_IMAGE_SUFFIXES)

    def read(self, path: Path, data: DataConfig) -> Layout:
        if not path.is_dir():
            raise UsageError(f"{path}: not a folder; data.format frames takes a folder of folders of images")
        folders: dict[Path, list[str]] = {}
        for file in _find(path, READABLE_IMAGE_SUFFIXES, data.split):
            folders.setdefault(file.parent, []).append(file.name)
        videos = (
            ImageFolder(_name(folder, path), None, folder, tuple(sorted(images, key=natural_order)))
            for folder, images in sorted(folders.items())
        )
        return Layout(self.name, tuple(videos), {})


class Ucf101Reader(Reader):
    """UCF-101."""

    name = "ucf101"
    description = "UCF-101: class folders and the official lists"

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        return path.is_dir() and any(_ucf_lists(path))

    def read(self, path: Path, data: DataConfig) -> Layout:
        lists = next(_ucf_lists(path), None)
        if lists is None:
            raise UsageError(
                f"{path}: has no {_UCF_LISTS}/trainlist01.txt; unpack the official lists beside the videos"
            )
        root = next((place for place in (path / "UCF-101", path / "UCF101", path / "videos") if place.is_dir()), path)
        splits = [split for split in (Split.TRAIN, Split.TEST) if data.split in (split, Split.ALL)]
        videos: dict[str, Video] = {}
        rejects: dict[str, str] = {}
        for split in splits:
            list_file = lists / f"{split.value}list{data.split_list:02}.txt"
            if not list_file.is_file():
                raise UsageError(f"{list_file}: no such list; unpack all of {_UCF_LISTS}")
            for number, line in _lines(list_file):
                match = _UCF_LINE.fullmatch(line)
                if match is None:
                    rejects[f"{list_file.name} line {number}"] = "not a line such as Class/v_Class_g01_c01.avi 1"
                    continue
                name = f"{match[1]}/{match[2]}"
                words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", match[1])
                videos[name] = VideoFile(name, words, root / match[1] / match[2])
        return Layout(self.name, tuple(videos[name] for name in sorted(videos)), rejects)


class BairReader(Reader):
    """BAIR robot pushing."""

    name = "bair"
    description = "BAIR robot pushing: TFRecords"

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        return bool(suffixes & RECORD_SUFFIXES)

    def read(self, path: Path, data: DataConfig) -> Layout:
        videos: list[Video] = []
        rejects: dict[str, str] = {}
        for file in _find(path, RECORD_SUFFIXES, data.split):
            name = _name(file, path)
            records, problem = find_records(file)
            if problem:
                rejects[name] = problem
            videos += (RecordVideo(f"{name}[{n}]", None, file, *record) for n, record in enumerate(records))
        return Layout(self.name, tuple(videos), rejects)


class MovingMnistReader(Reader):
    """Moving MNIST."""

    name = "moving-mnist"
    description = "Moving MNIST: an .npy of shape (T, N, H, W)"

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        return ".npy" in suffixes

    def read(self, path: Path, data: DataConfig) -> Layout:
        videos: list[Video] = []
        rejects: dict[str, str] = {}
        for file in _find(path, frozenset({".npy"}), data.split):
            name = _name(file, path)
            try:
                count = open_array(file).shape[1]
            except UserError as error:
                rejects[name] = str(error).removeprefix(f"{file}: ")
                continue
            videos += (ArrayVideo(f"{name}[{n}]", None, file, n) for n in range(count))
        return Layout(self.name, tuple(videos), rejects)


class JsonLinesReader(Reader):
    """Lists in JSON Lines."""

    name = "jsonl"
    description = "one JSON object per line, with a path and optionally a text (MSR-VTT and similar)"

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        return path.is_file() and ".jsonl" in suffixes

    def read(self, path: Path, data: DataConfig) -> Layout:
        if not path.is_file():
            raise UsageError(f"{path}: not a file; data.format jsonl takes a .jsonl file in the videos' folder")
        _refuse_test_split(path, data.split)
        videos: list[Video] = []
        rejects: dict[str, str] = {}
        for number, line in _lines(path):
            label = f"line {number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                rejects[label] = "not JSON"
                continue
            name, text = (entry.get("path"), entry.get("text")) if isinstance(entry, dict) else (None, None)
            if any(isinstance(one, str) and _SURROGATE.search(one) for one in (name, text)):
                rejects[label] = "has half a character (a lone surrogate)"
                continue
            if not isinstance(name, str) or not (text is None or isinstance(text, str)):
                rejects[label] = "must be an object with a string 'path' and, optionally, a string 'text'"
            elif not _is_safe(name):
                rejects[label] = "path must be relative and stay in the list's folder"
            elif os.path.isdir(file := path.parent / name):
                images = [image for image in file.iterdir() if image.suffix.lower() in READABLE_IMAGE_SUFFIXES]
                names = tuple(sorted((image.name for image in images if image.is_file()), key=natural_order))
                if names:
                    videos.append(ImageFolder(f"{label}: {name}", text, file, names))
                else:
                    rejects[label] = f"{name} is a folder without images"
            else:
                videos.append(VideoFile(f"{label}: {name}", text, file))
        return Layout(self.name, tuple(videos), rejects)


videos, frames, ucf101, bair = VideosReader(), FramesReader(), Ucf101Reader(), BairReader()
moving_mnist, jsonl = MovingMnistReader(), JsonLinesReader()
