"""Folders of videos and of images, whole and damaged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_kit import LENGTH, numbers, pictures, source, starts, write_video

from ca2vdm_cli.config import DataConfig, Split
from ca2vdm_cli.data import (
    clips,
    read_layout,
)
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.video_io import write_image


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "gif", "y4m"])
def test_seeking_and_keeping_videos_in_memory_give_the_same_clips(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(40)]
    write_video(tmp_path / f"deep/er/a.{suffix}", noise)
    in_memory = source(tmp_path, stride=2)
    monkeypatch.setattr(clips, "MEMORY", 0)
    sought = source(tmp_path, stride=2)
    for index in range(6):
        assert torch.equal(in_memory.clip(index, LENGTH).frames, sought.clip(index, LENGTH).frames)
    assert not sought._decoded and in_memory._decoded
    assert torch.equal(source(tmp_path, stride=2).clip(5, LENGTH).frames, in_memory.clip(5, LENGTH).frames)


def test_folders_of_frames_as_in_sky_timelapse(tmp_path: Path) -> None:
    for part, video, first in (("sky_train", "aX/aX_1", 0), ("sky_train", "b/b_2", 20), ("sky_test", "c/c_1", 40)):
        folder = tmp_path / part / video
        folder.mkdir(parents=True)
        for number, picture in enumerate(pictures(12, first=first)):
            write_image(folder / f"{folder.name}_frames_{number + 1}.jpg", picture)  # 10 comes after 9
    layout = read_layout(tmp_path, DataConfig())
    assert layout.format == "frames"
    assert [video.name for video in layout.videos] == ["sky_train/aX/aX_1", "sky_train/b/b_2"]
    assert starts(tmp_path) <= {*range(9), *range(20, 29)}
    assert starts(tmp_path, split=Split.TEST) <= set(range(40, 49))
    assert len(read_layout(tmp_path, DataConfig(split=Split.ALL)).videos) == 3
    assert starts(tmp_path, stride=3) <= {0, 1, 2, 20, 21, 22}


def test_a_missing_test_split_is_an_error(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", pictures(6))
    with pytest.raises(UsageError, match=r"data\.split: .* has no folders train and test"):
        read_layout(tmp_path, DataConfig(split=Split.TEST))


def test_a_folder_without_a_usable_video_says_why(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path, tmp_path / "pipe.mp4"):
        with pytest.raises(UserError, match=r"no usable video \(pipe\.mp4: not a file\)|neither a file nor a folder"):
            source(path)
    (tmp_path / "pipe.mp4").unlink()
    (tmp_path / "video").mkdir()
    (tmp_path / "video/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no usable video \(video: .*cannot be read") as caught:
        source(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_video_is_used_up_to_the_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    for number, picture in enumerate(pictures(20)):
        write_image(folder / f"{number}.png", picture)
    (folder / "9.png").write_bytes(b"no image")
    assert starts(tmp_path, count=20) <= set(range(6))
    whole = [source(tmp_path).clip(index, 2).frames for index in range(4)]
    monkeypatch.setattr(clips, "MEMORY", 0)
    late = source(tmp_path)
    late.clip(9, LENGTH)  # what is learned about the video changes no clip
    assert [numbers(late.clip(index, 2).frames) for index in range(4)] == [
        numbers(source(tmp_path).clip(index, 2).frames) for index in range(4)
    ]
    assert all(len(clip) == 2 for clip in whole)
    with pytest.raises(UserError, match=r"no usable video \(v: damaged, 9 frames, a clip has 10\)"):
        source(tmp_path, frames=10).clip(0, 10)


def test_clips_do_not_depend_on_what_is_known_about_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of ``v`` before the damage is too short for a clip, but the part after it can be read."""
    for name, first in (("v", 0), ("w", 30)):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(pictures(20, first=first)):
            write_image(tmp_path / name / f"{number}.png", picture)
    (tmp_path / "v/1.png").write_bytes(b"no image")
    monkeypatch.setattr(clips, "MEMORY", 0)
    fresh = [numbers(source(tmp_path).clip(index, 2).frames) for index in range(80)]
    known = source(tmp_path)
    assert [numbers(known.clip(index, 2).frames) for index in range(80)] == fresh
    assert "v" in known.skipped and any(first < 20 for first, _ in fresh[40:])
