"""Nothing in a data set is left out without being counted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from data_kit import LENGTH, numbers, pictures, source, starts, write_video
from PIL import Image

from ca2vdm_cli.commands.check_data import run as check_data
from ca2vdm_cli.config import DataConfig, Split
from ca2vdm_cli.data import ClipLoader, cache_latents, clips, read_layout
from ca2vdm_cli.data.layouts import VIDEO_SUFFIXES
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.video_io import write_image


def check(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> Any:
    check_data("tiny", None, path, None, list(overrides), as_json=True, quiet=False)
    return json.loads(capsys.readouterr().out)


def names(path: Path, split: Split = Split.TRAIN) -> list[str]:
    return [video.name for video in read_layout(path, DataConfig(split=split)).videos]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    elsewhere = write_video(tmp_path / "elsewhere/deep/a.mp4", pictures(8)).parents[1]
    data = tmp_path / "data"
    write_video(data / "own/b.mp4", pictures(8, first=20))
    (data / "link").symlink_to(elsewhere, target_is_directory=True)
    (data / "again").symlink_to(elsewhere, target_is_directory=True)
    (data / "own/up").symlink_to(data, target_is_directory=True)
    (data / "sibling").symlink_to(data / "own", target_is_directory=True)
    assert names(data) == ["again/deep/a.mp4", "own/b.mp4"]
    assert starts(data) <= {*range(5), *range(20, 25)}


@pytest.mark.parametrize(
    ("name", "container", "codec"),
    [
        ("a.flv", "flv", "flv"),
        ("a.MTS", "mpegts", "mpeg2video"),
        ("a.3gp", "3gp", "libx264"),
        ("a.nut", "nut", "libx264"),
    ],
)
def test_videos_of_cameras_and_old_programs(tmp_path: Path, name: str, container: str, codec: str) -> None:
    with av.open(str(tmp_path / name), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height = stream.width = 16
        for picture in pictures(20):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode(None))
    assert names(tmp_path) == [name] and len(starts(tmp_path)) > 3


def test_suffixes() -> None:
    named = {".flv", ".3gp", ".mts", ".m2ts", ".vob", ".asf", ".mxf", ".divx", ".f4v", ".ogm", ".rmvb", ".m2v", ".h264"}
    assert named <= VIDEO_SUFFIXES


def test_what_is_no_video_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", pictures(24))
    for name in ("notes.txt", "b.txt", "b.json", "LICENSE", "._a.mp4", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    write_image(tmp_path / "thumb.jpg", pictures(1)[0])
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "absent.mp4")
    os.mkfifo(tmp_path / "pipe.mkv")
    report = check(tmp_path, capsys)
    assert report["other_files"] == {".txt": 2, "hidden": 2, ".json": 1, "without a suffix": 1, ".jpg": 1}
    assert report["rejects"] == {"gone.mp4": "a broken symbolic link", "pipe.mkv": "not a file"}
    check_data("tiny", None, tmp_path, None, [], as_json=False, quiet=False)
    text = capsys.readouterr().err
    assert "2 .txt" in text and "24 frames, 3.00 s" in text


def test_a_folder_that_cannot_be_read_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", pictures(8))
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(place: str) -> Any:
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    layout = read_layout(tmp_path, DataConfig())
    assert layout.rejects == {"locked": "this folder cannot be read (Permission denied)"}


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "clips_eval", "test"])
def test_a_folder_for_training_beside_one_for_validation(
    tmp_path: Path, held_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "train/a.mp4", pictures(24))
    write_video(tmp_path / f"{held_out}/b.mp4", pictures(24))
    assert names(tmp_path) == ["train/a.mp4"]
    assert names(tmp_path, Split.TEST) == [f"{held_out}/b.mp4"]
    assert names(tmp_path, Split.ALL) == sorted(["train/a.mp4", f"{held_out}/b.mp4"])
    note = f"data.split train reads train; 1 files in {held_out} are left out"
    assert check(tmp_path, capsys)["notes"] == [note]
    assert source(tmp_path).notes == (note,)


def test_the_test_split_comes_before_the_validation_split(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        write_video(tmp_path / f"{part}/{part}.mp4", pictures(8))
    assert names(tmp_path, Split.TEST) == ["test/test.mp4"] and names(tmp_path) == ["train/train.mp4"]
    assert read_layout(tmp_path, DataConfig()).notes == (
        "data.split train reads train; 2 files in test, val are left out",
    )


def test_an_undecodable_last_frame_does_not_reject_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "v", pictures(24))
    (tmp_path / "v/frame_000023.png").write_bytes(b"no image")
    report = check(tmp_path, capsys)
    assert report["rejects"] == {} and report["frames"] == 23
    assert report["damaged"] == {"v": "23 of 24 frames can be decoded"}


def damage(path: Path, frame: int) -> None:
    """Replace most of a frame's data in an mp4."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux() if packet.size][frame]
    data = bytearray(path.read_bytes())
    assert packet.pos is not None
    data[packet.pos + 10 : packet.pos + packet.size] = bytes(packet.size - 10)
    path.write_bytes(data)


@pytest.mark.parametrize("keep", [True, False])
def test_a_damaged_frame_ends_a_video_and_is_named(tmp_path: Path, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(24)]
    damage(write_video(tmp_path / "a.mp4", noise), 12)
    if not keep:
        monkeypatch.setattr(clips, "MEMORY", 0)
    clips_ = source(tmp_path)
    for index in range(10):
        clips_.clip(index, LENGTH)
    (reason,) = clips_.damaged_in_use().values()
    used, total = int(reason.split()[0]), reason.partition(" ")[2]
    assert 8 <= used <= 12 and total == "of 24 frames can be decoded" and not clips_.skipped


@pytest.mark.slow
def test_workers_name_damaged_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "v", pictures(12))
    (tmp_path / "v/frame_000007.png").write_bytes(b"no image")
    with ClipLoader(source(tmp_path), LENGTH, 4, workers=1) as loader:
        for _ in range(3):
            next(loader)
        assert isinstance(loader.source, clips.Clips) and loader.source.damaged == {
            "v": "7 of 12 frames can be decoded"
        }


def test_a_damaged_video_in_the_cache_of_latents_is_named(tmp_path: Path) -> None:
    from ca2vdm_cli.config import AutoencoderConfig

    class Identity:
        def encode(self, frames: Any) -> Any:
            return frames

    write_video(tmp_path / "data/v", pictures(12))
    (tmp_path / "data/v/frame_000007.png").write_bytes(b"no image")
    for _ in range(2):  # encoded, then reused
        cached, _report = cache_latents(source(tmp_path / "data"), Identity(), AutoencoderConfig(), tmp_path / "cache")
        assert cached.damaged_in_use() == {"v": "7 of 12 frames can be decoded"}


def test_an_animated_image_is_a_video_and_no_frame(tmp_path: Path) -> None:
    first, *rest = map(Image.fromarray, pictures(12))
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, duration=100, lossless=True)
    assert len(starts(tmp_path / "a.webp")) > 3
    for number in range(6):
        (tmp_path / f"{number}.webp").write_bytes((tmp_path / "a.webp").read_bytes())
    with pytest.raises(UserError, match="an animation or video, not an image"):
        source(tmp_path).clip(0, LENGTH)


# --- lists ------------------------------------------------------------------------------------------------------------

LISTS = {
    "metadata.csv": "file_name,text\na.mp4,it brightens\n",
    "spaced.csv": '\ufefftext, video\n"it\nbrightens, slowly",a.mp4\n',
    "metadata.jsonl": '{"file_name": "a.mp4", "text": "it brightens"}\n',
    "ltx.jsonl": '{"media_path": "a.mp4", "caption": "it brightens"}\n',
    "dataset.json": '[{"media_path": "a.mp4", "prompt": "it brightens"}]',
    "pairs.jsonl": '{"video_path": "a.mp4", "caption": "it brightens", "id": 3}\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_other_tools(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / "a.mp4", pictures(8))
    write_video(tmp_path / "b.mp4", pictures(8))
    (tmp_path / name).write_text(LISTS[name], encoding="utf-8")
    clips_ = source(tmp_path / name)
    assert len(clips_.videos) == 1 and not clips_.skipped
    caption = clips_.clip(0, LENGTH).caption
    assert caption is not None and caption.startswith("it") and "brightens" in caption


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"id": 1, "url": "a.mp4"}',
            "line 1: has 'id', 'url'; the video's path is expected under 'path'",
        ),
        (
            "a.csv",
            "id,url\n1,a.mp4\n",
            "has the columns id, url; the videos' paths are expected in a column path",
        ),
        ("a.csv", "", "has the columns of an empty file"),
        ("a.csv", 'path\n"a.mp4\n', "is not CSV"),
        ("a.csv", "path\n/etc/passwd\n", "row 2: path must be relative"),
        ("a.json", '{"path": "a.mp4"}', "holds dict, not an array"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.jsonl", "x\n" * 5000, r"not a list of videos \(line 1: not JSON; and 999 more\)"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        source(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_list_beside_videos_is_mentioned(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", pictures(8))
    (tmp_path / "metadata.csv").write_text(LISTS["metadata.csv"])
    (note,) = read_layout(tmp_path, DataConfig()).notes
    assert note == f"{tmp_path / 'metadata.csv'} is not read; use it in place of its folder if it has captions"


def test_a_list_of_folders_of_images_leaves_out_hidden_files(tmp_path: Path) -> None:
    folder = write_video(tmp_path / "v", pictures(8))
    (folder / "._frame_000000.png").write_bytes(b"Mac OS X")
    (tmp_path / "a.jsonl").write_text('{"path": "v"}')
    clips_ = source(tmp_path / "a.jsonl")
    assert numbers(clips_.clip(0, LENGTH).frames)[0] < 5 and not clips_.skipped


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_an_array_of_a_million_videos_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "bomb.npy", np.zeros((1, 1_000_000, 1, 1), np.uint8))
    with pytest.raises(UserError, match=r"it holds 1000000 videos of 1x1; at most 100000 in one file"):
        source(tmp_path / "bomb.npy")


def test_clips_of_a_video_with_damage_are_the_same_wherever_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(24)]
    damage(write_video(tmp_path / "a.mp4", noise), 12)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4")
    monkeypatch.setattr(clips, "MEMORY", 0)
    one = [source(tmp_path).clip(index, LENGTH).frames for index in range(8)]
    other = source(tmp_path)
    assert all((other.clip(index, LENGTH).frames == one[index]).all() for index in reversed(range(8)))
