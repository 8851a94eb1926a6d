"""Choosing a reader by name or by what it recognizes, including a reader that a user registered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_kit import LENGTH, numbers, pictures, preset, source, write_video

import ca2vdm_cli
from ca2vdm_cli.config import DataConfig
from ca2vdm_cli.data import ClipLoader, Layout, MovingDigits, Reader, VideoFile, open_clips, read_layout
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.presets import load_preset


class NotesReader(Reader):
    """Videos named in a file ``notes.txt``."""

    name = "notes"
    description = "a file notes.txt with a video's file name and caption in each line"

    def recognizes(self, path: Path, suffixes: frozenset[str]) -> bool:
        return (path / "notes.txt").is_file()

    def read(self, path: Path, data: DataConfig) -> Layout:
        lines = [line.split(" ", 1) for line in (path / "notes.txt").read_text().splitlines()]
        return Layout(self.name, tuple(VideoFile(name, caption, path / name) for name, caption in lines))


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    """A folder for ``NotesReader``, which is registered; the built-in readers would find two videos in it."""
    write_video(tmp_path / "a.mp4", pictures(8))
    write_video(tmp_path / "b.mp4", pictures(8, first=20))
    (tmp_path / "notes.txt").write_text("a.mp4 it brightens\n")
    ca2vdm_cli.readers.register(NotesReader())
    yield tmp_path
    if "notes" in ca2vdm_cli.readers:
        ca2vdm_cli.readers.unregister("notes")


@pytest.mark.parametrize("format", ["notes", "auto"])
def test_a_registered_reader_is_chosen_by_name_and_by_what_it_recognizes(notes: Path, format: str) -> None:
    config = load_preset("tiny", [f"data.format={format}"]).config
    assert read_layout(notes, config.data).format == "notes"
    clip = open_clips(notes, config, 0, LENGTH).clip(0, LENGTH)
    assert clip.caption == "it brightens"
    assert numbers(clip.frames)[0] < 5
    with ClipLoader(open_clips(notes, config, 0, LENGTH), LENGTH, 1, workers=1) as loader:
        batch = next(loader)
    assert batch.captions == ("it brightens",) and torch.equal(batch.clips[0], clip.frames)


def test_an_unregistered_reader_is_unknown(notes: Path) -> None:
    ca2vdm_cli.readers.unregister("notes")
    assert read_layout(notes, DataConfig()).format == "videos"
    with pytest.raises(UsageError, match=r"data\.format: there is no reader 'notes'; known: auto, moving"):
        read_layout(notes, DataConfig(format="notes"))
    with pytest.raises(UsageError, match=r"data\.format: there is no reader 'notes'"):
        load_preset("tiny", ["data.format=notes"])


@pytest.mark.parametrize("name", ["auto", "moving-digits", "videos"])
def test_names_that_no_reader_can_have(name: str) -> None:
    reader = NotesReader()
    reader.name = name
    with pytest.raises(UserError, match=f"reader '{name}' is registered by .* and by ca2vdm itself"):
        ca2vdm_cli.readers.register(reader)


def test_the_source_without_a_path_is_moving_digits(tmp_path: Path) -> None:
    digits = open_clips(None, preset(), 0, LENGTH)
    assert isinstance(digits, MovingDigits) and digits.clip(0, LENGTH).caption is None
    with pytest.raises(UsageError, match="no data set goes with it"):
        open_clips(tmp_path, preset(format="moving-digits"), 0, LENGTH)
    with pytest.raises(UsageError, match="name a data set"):
        open_clips(None, replace(preset(), synthetic_data=None), 0, LENGTH)
    with pytest.raises(UsageError, match="no such file or folder"):
        source(tmp_path / "absent")
