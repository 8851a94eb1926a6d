"""The built-in readers of folders and files: one for each layout on disk. ``lists`` reads other people's lists.

Names inside the lists of UCF-101 are not trusted: only names of the official form are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ca2vdm_cli.config import DataConfig, Split
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.video_io import READABLE_IMAGE_SUFFIXES, natural_order

from .files import find, lines, name_in
from .readers import Layout, Reader
from .records import find_records
from .videos import BAIR_BYTES, ArrayVideo, ImageFolder, RecordVideo, Video, VideoFile, open_array

_VIDEOS = """
264 265 3g2 3gp asf avi divx dv f4v flv gif h264 h265 hevc ivf m1v m2p m2t m2ts m2v m4v mjpeg mjpg mk3d mkv mod mov mp4
mpe mpeg mpg mts mxf nut obu ogm ogv qt rm rmvb tod ts vob webm wmv wtv y4m
"""
VIDEO_SUFFIXES = frozenset(f".{suffix}" for suffix in _VIDEOS.split())
"""Suffixes of video files in a folder."""
RECORD_SUFFIXES = frozenset((".tfrecord", ".tfrecords"))
"""Suffixes of TFRecord files."""
_UCF_LISTS = "ucfTrainTestlist"
_UCF_LINE = re.compile(r"([A-Za-z0-9]+)/(v_[A-Za-z0-9]+_g\d+_c\d+\.avi)(?: \d+)?")


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
        found = find(path, VIDEO_SUFFIXES, data.split)
        videos = tuple(VideoFile(name_in(path, file), None, file) for file in found.files)
        lists = [name for name in ("metadata.csv", "metadata.jsonl") if (path / name).is_file()]
        notes = (f"{path / lists[0]} is not read; use it in place of its folder if it has captions",) if lists else ()
        return Layout(self.name, videos, found.rejects, found.other, (*found.notes, *notes))


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
        found = find(path, READABLE_IMAGE_SUFFIXES, data.split)
        for file in found.files:
            folders.setdefault(file.parent, []).append(file.name)
        videos = (
            ImageFolder(name_in(path, folder), None, folder, tuple(sorted(images, key=natural_order)))
            for folder, images in sorted(folders.items())
        )
        return Layout(self.name, tuple(videos), found.rejects, found.other, found.notes)


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
            for number, line in lines(list_file):
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
        found = find(path, RECORD_SUFFIXES, data.split)
        for file in found.files:
            name = name_in(path, file)
            records, problem = find_records(file, BAIR_BYTES)
            if problem:
                found.rejects[name] = problem
            videos += (RecordVideo(f"{name}[{n}]", None, file, *record) for n, record in enumerate(records))
        return Layout(self.name, tuple(videos), found.rejects, found.other, found.notes)


class MovingMnistReader(Reader):
    """Moving MNIST."""

    name = "moving-mnist"
    description = "Moving MNIST: an .npy of shape (T, N, H, W)"

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        return ".npy" in suffixes

    def read(self, path: Path, data: DataConfig) -> Layout:
        videos: list[Video] = []
        found = find(path, frozenset({".npy"}), data.split)
        for file in found.files:
            name = name_in(path, file)
            try:
                count = open_array(file).shape[1]
            except UserError as error:
                found.rejects[name] = str(error).removeprefix(f"{file}: ")
                continue
            videos += (ArrayVideo(f"{name}[{n}]", None, file, n) for n in range(count))
        return Layout(self.name, tuple(videos), found.rejects, found.other, found.notes)


videos, frames, ucf101, bair, moving_mnist = (
    VideosReader(),
    FramesReader(),
    Ucf101Reader(),
    BairReader(),
    MovingMnistReader(),
)
