"""Readers: a small replica of each layout, and what is wrong with some."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ca2vdm_cli.commands.check_data import run as check_data
from ca2vdm_cli.config import Crop, DataConfig, Preset, Split
from ca2vdm_cli.data import MovingDigits, VideoClips, clips, open_clips, read_layout, records
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.video_io import open_writer, write_image

LENGTH = 4


def preset(**data: Any) -> Preset:
    """``tiny`` with some data settings: gray 32x32 frames."""
    config = load_preset("tiny").config
    changed: Preset = replace(config, data=DataConfig(**data))
    return changed


def pictures(count: int, height: int = 16, width: int = 16, first: int = 0) -> list[np.ndarray]:
    """Frame t is of brightness 4 t everywhere."""
    return [np.full((height, width, 3), 4 * (first + t), np.uint8) for t in range(count)]


def write_video(path: Path, frames: Iterable[np.ndarray]) -> Path:
    with open_writer(path, fps=8, format=None if path.suffix else "png") as writer:
        for frame in frames:
            writer.write(frame)
    return path


def numbers(clip: torch.Tensor) -> list[int]:
    """Which of ``pictures`` the frames of a clip are."""
    return [round(value) for value in ((clip.mean((1, 2, 3)) + 1) * 127.5 / 4).tolist()]


def source(path: Path, frames: int = LENGTH, seed: int = 0, **data: Any) -> VideoClips:
    found = open_clips(path, preset(**data), seed, frames)
    assert isinstance(found, VideoClips)
    return found


def starts(path: Path, count: int = 12, **data: Any) -> set[int]:
    """First frames of some clips, which are checked to go on one by one."""
    clips_ = source(path, **data)
    step, found = data.get("stride", 1), set()
    for index in range(count):
        first, *rest = numbers(clips_.clip(index, LENGTH))
        assert rest == [first + step * n for n in range(1, LENGTH)]
        found.add(first)
    return found


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "gif", "y4m"])
def test_a_clip_is_the_same_frames_whether_sought_or_kept(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(40)]
    write_video(tmp_path / f"deep/er/a.{suffix}", noise)
    kept = source(tmp_path, stride=2)
    monkeypatch.setattr(clips, "MEMORY", 0)
    sought = source(tmp_path, stride=2)
    for index in range(6):
        assert torch.equal(kept.clip(index, LENGTH), sought.clip(index, LENGTH))
    assert not sought._decoded and kept._decoded
    assert torch.equal(source(tmp_path, stride=2).clip(5, LENGTH), kept.clip(5, LENGTH))


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


def test_no_test_part_is_an_error(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", pictures(6))
    with pytest.raises(UsageError, match=r"data\.split: .* has no folders train and test"):
        read_layout(tmp_path, DataConfig(split=Split.TEST))


def test_a_folder_in_which_nothing_is_usable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path, tmp_path / "pipe.mp4"):
        with pytest.raises(UserError, match=r"no usable video \(no video files\)|Not a directory"):
            source(path)
    (tmp_path / "pipe.mp4").unlink()
    (tmp_path / "video").mkdir()
    (tmp_path / "video/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no usable video \(video: .*cannot be read") as caught:
        source(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_video_that_breaks_off_is_used_up_to_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    for number, picture in enumerate(pictures(20)):
        write_image(folder / f"{number}.png", picture)
    (folder / "9.png").write_bytes(b"no image")
    assert starts(tmp_path, count=20) <= set(range(6))
    whole = [source(tmp_path).clip(index, 2) for index in range(4)]
    monkeypatch.setattr(clips, "MEMORY", 0)
    late = source(tmp_path)
    late.clip(9, LENGTH)  # what is found out about the video changes no clip
    assert [numbers(late.clip(index, 2)) for index in range(4)] == [
        numbers(source(tmp_path).clip(index, 2)) for index in range(4)
    ]
    assert all(len(clip) == 2 for clip in whole)
    with pytest.raises(UserError, match=r"no usable video \(v: damaged, 9 frames, a clip has 10\)"):
        source(tmp_path, frames=10).clip(0, 10)


def test_what_is_known_of_a_video_changes_no_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of ``v`` is too short for a clip, but what follows the damage can be read."""
    for name, first in (("v", 0), ("w", 30)):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(pictures(20, first=first)):
            write_image(tmp_path / name / f"{number}.png", picture)
    (tmp_path / "v/1.png").write_bytes(b"no image")
    monkeypatch.setattr(clips, "MEMORY", 0)
    fresh = [numbers(source(tmp_path).clip(index, 2)) for index in range(80)]
    known = source(tmp_path)
    assert [numbers(known.clip(index, 2)) for index in range(80)] == fresh
    assert "v" in known.skipped and any(first < 20 for first, _ in fresh[40:])


# --- UCF-101 ----------------------------------------------------------------------------------------------------------


def make_ucf101(root: Path) -> None:
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    names = [f"{c}/v_{c}_g{g:02}_c01.avi" for c in ("ApplyEyeMakeup", "YoYo") for g in (1, 8)]
    for place, name in enumerate(names):
        file = root / "UCF-101" / name
        write_video(file.with_suffix(".mkv"), pictures(8, first=10 * place))
        file.with_suffix(".mkv").rename(file)  # FFmpeg goes by content
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    (lists / "trainlist01.txt").write_text(f"{names[1]} 1\r\n{names[3]} 2\r\n../../etc/v_x_g01_c01.avi 1\r\n")
    (lists / "testlist01.txt").write_text(f"{names[0]}\n{names[2]}\n")
    (lists / "trainlist02.txt").write_text(f"{names[0]} 1\nYoYo/v_YoYo_g99_c01.avi 2\n")


def test_ucf101_with_its_lists(tmp_path: Path) -> None:
    make_ucf101(tmp_path)
    layout = read_layout(tmp_path, DataConfig())
    assert layout.format == "ucf101"
    assert [video.name for video in layout.videos] == [
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "YoYo/v_YoYo_g08_c01.avi",
    ]
    assert layout.rejects == {"trainlist01.txt line 3": "not a line such as Class/v_Class_g01_c01.avi 1"}
    assert starts(tmp_path) <= {*range(10, 15), *range(30, 35)}
    assert starts(tmp_path, split=Split.TEST) <= {*range(5), *range(20, 25)}
    assert {source(tmp_path).caption(index) for index in range(12)} == {"Apply Eye Makeup", "Yo Yo"}
    second = source(tmp_path, split_list=2)
    assert numbers(second.clip(0, LENGTH))[0] < 5
    assert second.skipped.keys() == {"YoYo/v_YoYo_g99_c01.avi"}
    with pytest.raises(UsageError, match=r"trainlist03\.txt: no such list"):
        source(tmp_path, split_list=3)


# --- BAIR -------------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(frames: Sequence[np.ndarray], view: str = "image_aux1") -> bytes:
    """A ``tf.Example`` as in the real set, other views and numbers between the frames."""
    features = b""
    for t, frame in enumerate(frames):
        image = field(1, field(1, frame.tobytes()))  # Feature.bytes_list.value
        action = field(2, field(1, struct.pack("<4f", 1, 2, 3, 4)))  # Feature.float_list.value, packed
        for key, feature in ((f"{t}/{view}/encoded", image), (f"{t}/action", action)):
            features += field(1, field(1, key.encode()) + field(2, feature))
    return field(1, features)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", records._masked_crc(length)) + data + struct.pack("<I", records._masked_crc(b""))


def test_checksum_of_tfrecords() -> None:
    crc = (records._masked_crc(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF
    assert (crc << 15 | crc >> 17) & 0xFFFFFFFF == 0xE3069283  # the published check value of CRC-32C


def test_bair_records(tmp_path: Path) -> None:
    train = tmp_path / "softmotion30_44k" / "train"
    test = train.with_name("test")
    for folder in (train, test):
        folder.mkdir(parents=True)
    videos = [example(pictures(8, 64, 64, first=first)) for first in (0, 20)]
    (train / "traj_0_to_255.tfrecords").write_bytes(b"".join(map(record, videos)))
    (test / "traj_0_to_255.tfrecords").write_bytes(record(example(pictures(8, 64, 64, first=40), "image_main")))
    layout = read_layout(tmp_path, DataConfig())
    assert layout.format == "bair" and not layout.rejects
    assert [video.name for video in layout.videos] == [
        f"softmotion30_44k/train/traj_0_to_255.tfrecords[{n}]" for n in (0, 1)
    ]
    assert starts(tmp_path) <= {*range(5), *range(20, 25)}
    assert starts(tmp_path, split=Split.TEST) <= set(range(40, 45))


def test_bair_as_images(tmp_path: Path) -> None:
    for part, number, first in (("train", 0, 0), ("train", 1, 20), ("test", 0, 40)):
        folder = tmp_path / "processed_data" / part / "traj_0_to_255" / str(number)
        folder.mkdir(parents=True)
        for t, picture in enumerate(pictures(11, 64, 64, first=first)):
            write_image(folder / f"{t}.png", picture)
    assert starts(tmp_path) <= {*range(8), *range(20, 28)}
    assert starts(tmp_path, split=Split.TEST) <= set(range(40, 48))


def test_damaged_records(tmp_path: Path) -> None:
    good = record(example(pictures(8, 64, 64)))
    (tmp_path / "cut.tfrecords").write_bytes(good + good[:-9])
    (tmp_path / "wrong.tfrecords").write_bytes(good + b"\xff" * 30)
    (tmp_path / "huge.tfrecords").write_bytes(struct.pack("<QI", 2**62, records._masked_crc(struct.pack("<Q", 2**62))))
    (tmp_path / "stub.tfrecords").write_bytes(b"12345")
    other = field(1, field(1, field(1, b"0/image_aux1/encoded") + field(2, field(1, field(1, b"jpeg")))))
    messages = [b"", other, b"\x0a\xff\x01ab", b"\x0a\xff" + b"\xff" * 20, field(1, field(1, varint(1 << 3) + b"\x05"))]
    (tmp_path / "messages.tfrecords").write_bytes(b"".join(map(record, messages)))
    clips_ = source(tmp_path)
    reasons = clips_.skipped
    assert reasons["cut.tfrecords"] == "it breaks off after 1 whole records"
    assert reasons["wrong.tfrecords"] == "the checksum of a length is wrong after 1 whole records"
    assert reasons["huge.tfrecords"] == reasons["stub.tfrecords"] == "it breaks off after 0 whole records"
    assert {numbers(clips_.clip(index, LENGTH))[0] for index in range(40)} == set(range(5))
    assert len([name for name in reasons if name.startswith("messages")]) == len(messages)
    assert "has 4 bytes, not a raw 64x64 frame" in reasons["messages.tfrecords[1]"]


# --- Moving MNIST -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_moving_mnist(tmp_path: Path, inside: bool) -> None:
    frames = np.zeros((20, 3, 64, 64), np.uint8)
    frames += (4 * np.arange(20, dtype=np.uint8))[:, None, None, None]
    frames[:, 1] += 80
    frames[:, 2] += 160
    np.save(tmp_path / "mnist_test_seq.npy", frames)
    path = tmp_path if inside else tmp_path / "mnist_test_seq.npy"
    layout = read_layout(path, DataConfig())
    assert layout.format == "moving-mnist"
    assert [video.name for video in layout.videos] == [f"mnist_test_seq.npy[{n}]" for n in range(3)]
    found = starts(path, count=30)
    assert found <= {*range(17), *range(20, 37), *range(40, 57)} and len(found) > 8


def test_arrays_that_are_something_else(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive", a=np.zeros(3))
    np.save(tmp_path / "float.npy", np.zeros((20, 2, 8, 8), np.float32))
    good = io.BytesIO()
    np.save(good, np.zeros((20, 2, 8, 8), np.uint8))
    contents = {
        "pickle.npy": buffer.getvalue(),
        "zip.npy": (tmp_path / "archive.npz").read_bytes(),
        "float.npy": (tmp_path / "float.npy").read_bytes(),
        "cut.npy": good.getvalue()[:-1],
        "empty.npy": b"",
        "text.npy": b"hello",
        "header.npy": b"\x93NUMPY\x01\x00\x10\x00{'descr': 1+1   \n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"no usable video \(.*cannot be read") as caught:
            source(tmp_path / name)
        assert "\n" not in str(caught.value)


# --- JSONL ------------------------------------------------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    write_video(tmp_path / "videos/video0.mp4", pictures(8))
    write_video(tmp_path / "frames/video1", pictures(8, first=20))
    outside = write_video(tmp_path.parent / f"{tmp_path.name}-outside.mp4", pictures(8))
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    lines = [
        {"path": "videos/video0.mp4", "text": "it brightens", "id": 7},
        {"path": "frames/video1"},
        {"path": f"../{outside.name}"},
        {"path": str(outside)},
        {"path": 3},
        {"path": "videos/absent.mp4", "text": "gone"},
        {"path": "empty"},
        {"path": "videos/video0.mp4", "text": ["a", "b"]},
        {"path": "videos/\0.mp4"},
        [1],
        {"path": "pipe.mp4"},
        {"path": "\ud800.mp4"},
        {"path": "videos/video0.mp4", "text": "half of a \ud83d"},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n{not json\n\n" + "[" * 100_000
    (tmp_path / "train.jsonl").write_text("\ufeff" + text)
    clips_ = source(tmp_path / "train.jsonl")
    seen = {(numbers(clips_.clip(index, LENGTH))[0] // 20, clips_.caption(index)) for index in range(20)}
    assert seen == {(0, "it brightens"), (1, None)}
    assert clips_.caption(3) == source(tmp_path / "train.jsonl").caption(3)
    reasons = clips_.skipped
    assert reasons["line 3"] == reasons["line 4"] == "path must be relative and stay in the list's folder"
    assert "No such file" in reasons["line 6: videos/absent.mp4"]
    assert reasons["line 7"] == "empty is a folder without images"
    assert {"line 5", "line 8", "line 9", "line 10", "line 11: pipe.mp4", "line 14", "line 16"} <= reasons.keys()
    assert reasons["line 12"] == reasons["line 13"] == "has half a character (a surrogate), which no text can hold"
    assert len(reasons) == 13


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe\n", "not UTF-8"), (b"x" * 2**21, "longer than")])
def test_a_list_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"line 1 is {message}"):
        source(tmp_path / "a.jsonl")


# --- settings ---------------------------------------------------------------------------------------------------------


def test_flip_mirrors_half_of_the_clips_and_changes_nothing_else(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(0, 255, 16, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, axis=2)
    frames = [ramp // 2 + t for t in range(12)]
    write_video(tmp_path / "v", frames)
    plain, flipped = source(tmp_path), source(tmp_path, flip=True)
    mirrored = 0
    for index in range(16):
        one, other = plain.clip(index, LENGTH), flipped.clip(index, LENGTH)
        mirrored += torch.equal(one.flip(-1), other)
        assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
    assert 2 < mirrored < 14


def test_random_crops_keep_the_shape_and_stay_in_place_during_a_clip(tmp_path: Path) -> None:
    still = np.tile(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (32, 1, 3))  # (32, 128, 3)
    write_video(tmp_path / "v", [still] * 6)
    clips_ = source(tmp_path, crop=Crop.RANDOM)
    places = set()
    for index in range(10):
        clip = clips_.clip(index, LENGTH)
        row = ((clip[0, 0, 0] + 1) * 127.5).round()
        assert clip.shape == (LENGTH, 1, 32, 32) and torch.equal(clip, clip[:1].expand_as(clip))
        assert torch.equal(row.diff(), torch.full((31,), 2.0))
        places.add(row[0].item())
    assert len(places) > 4
    assert clips_.crop(0, 8).shape == (1, 8, 8)
    centre = open_clips(tmp_path, preset(crop=Crop.CROP), 0, LENGTH).clip(0, 1)
    assert ((centre[0, 0, 0, 0] + 1) * 127.5).round().item() == 96
    write_image(tmp_path / "long.png", np.zeros((1, 5000, 3), np.uint8))
    assert source(tmp_path / "long.png", frames=1, crop=Crop.RANDOM, format="videos").clip(0, 1).shape[2:] == (32, 32)


def test_the_source_without_a_path_is_moving_digits(tmp_path: Path) -> None:
    digits = open_clips(None, preset(), 0, LENGTH)
    assert isinstance(digits, MovingDigits) and digits.caption(0) is None
    with pytest.raises(UsageError, match="leave out --data"):
        open_clips(tmp_path, preset(format="moving-digits"), 0, LENGTH)
    with pytest.raises(UsageError, match="name a folder of videos with --data"):
        open_clips(None, replace(preset(), synthetic_data=None), 0, LENGTH)
    with pytest.raises(UsageError, match="no such file or folder"):
        source(tmp_path / "absent")


# --- train --check-data -----------------------------------------------------------------------------------------------


def test_check_data_counts_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", pictures(24))
    write_video(tmp_path / "b.mp4", pictures(16, 32, 48))
    write_video(tmp_path / "short.mp4", pictures(3))
    (tmp_path / "bro[ken].mp4").write_bytes(b"nothing")
    window = load_preset("tiny").config.model.window_frames
    check_data("tiny", None, tmp_path, None, [], as_json=True, quiet=False)
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "videos"
    assert (report["videos"], report["usable_videos"], report["frames"]) == (4, 2, 40)
    assert report["hours"] == pytest.approx(5 / 3600)
    assert report["clips"] == 24 // window + 16 // window
    assert report["start_positions"] == 40 - 2 * (window - 1)
    assert report["resolutions"] == {"16x16": 1, "48x32": 1} and report["frame_rates"] == {"8": 2}
    assert report["rejects"]["short.mp4"] == f"3 frames, a clip has {window}"
    assert report["rejects"].keys() == {"short.mp4", "bro[ken].mp4"}
    check_data("tiny", None, tmp_path, "crop", [], as_json=False, quiet=False)
    text = capsys.readouterr()
    assert "bro[ken].mp4" in text.err and "48x32 (1)" in text.err and not text.out


def test_check_data_counts_a_video_of_many_captions_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", pictures(24))
    lines = [json.dumps({"path": "a.mp4", "text": text}) for text in ("one", "two", "three")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    check_data("tiny", None, tmp_path / "list.jsonl", None, [], as_json=True, quiet=False)
    report = json.loads(capsys.readouterr().out)
    assert (report["usable_videos"], report["captions"], report["frames"]) == (3, 3, 24)
    assert report["hours"] == pytest.approx(3 / 3600)


def test_check_data_of_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no usable video \(a\.mp4: cannot be read"):
        check_data("tiny", None, tmp_path, None, [], as_json=True, quiet=False)
    with pytest.raises(UsageError, match="name a data set with --data"):
        check_data("tiny", None, None, None, [], as_json=True, quiet=False)
    with pytest.raises(UsageError, match="moving-digits is made on the fly"):
        check_data("tiny", None, tmp_path, None, ["data.format=moving-digits"], as_json=True, quiet=False)
    with pytest.raises(UsageError, match="works on latents only"):
        check_data("bench-small", None, tmp_path, None, [], as_json=True, quiet=False)
