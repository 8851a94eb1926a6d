"""Clips of videos: reproducible, in range; flipped and cropped as requested; unusable videos are named."""

from pathlib import Path

import av
import data_kit
import numpy as np
import pytest
import torch
from command_kit import batch
from data_kit import LENGTH, preset, source

from ca2vdm_cli.config import Crop, DataConfig, VideoConfig
from ca2vdm_cli.data import VideoClips, clips, open_clips, read_layout
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.video_io import write_image

RGB = VideoConfig(height=16, width=24, channels=3)


def write_video(path: Path, frames: int, height: int = 32, width: int = 48) -> None:
    """A lossless video whose frame t has brightness 4 t everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for t in range(frames):
            picture = np.full((height, width, 3), 4 * t, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def videos_of(path: Path, video: VideoConfig, seed: int, frames: int = 1) -> VideoClips:
    """Clips of a path with ``data.format: auto``."""
    layout = read_layout(path, DataConfig())
    return VideoClips(str(path), layout.videos, layout.rejects, video, DataConfig(), seed, frames)


def brightness(clip: torch.Tensor) -> list[int]:
    """Each frame's brightness as ``write_video`` set it, divided by 4."""
    return [round(value) for value in ((clip.mean((1, 2, 3)) + 1) * 127.5 / 4).tolist()]


def test_clips_of_a_nested_folder_are_consecutive_frames_of_one_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", 12)
    write_video(tmp_path / "deep" / "er" / "b.MKV", 20)
    (tmp_path / "notes.txt").write_text("not a video")
    source = videos_of(tmp_path, RGB, seed=1, frames=8)
    assert [Path(video.name).name for video in source.videos] == ["a.mkv", "b.MKV"] and not source.skipped
    starts = set()
    for index in range(12):
        clip = source.clip(index, 8).frames
        assert clip.shape == (8, 3, 16, 24) and clip.dtype == torch.float32
        first, *rest = brightness(clip)
        assert rest == list(range(first + 1, first + 8))
        starts.add(first)
    assert len(starts) > 3
    assert torch.equal(videos_of(tmp_path, RGB, seed=1, frames=8).clip(7, 8).frames, source.clip(7, 8).frames)


def test_one_file_and_gray_crops(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", 6)
    source = videos_of(tmp_path / "a.mkv", VideoConfig(height=16, width=24, channels=1), seed=0)
    assert source.clip(0, 6).frames.shape == (6, 1, 16, 24)
    assert source.crop(0, 8).shape == (1, 8, 8)
    assert source.crop(0, 20).shape == (1, 16, 20)


def test_unusable_videos_are_named_and_skipped(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mkv", 12)
    write_video(tmp_path / "short.mkv", 3)
    (tmp_path / "broken.mp4").write_bytes(b"not a video at all")
    source = videos_of(tmp_path, RGB, seed=0, frames=8)
    alone = videos_of(tmp_path / "good.mkv", RGB, seed=0, frames=8)
    assert all(source.clip(i, 8).frames.shape == (8, 3, 16, 24) for i in range(6))
    assert source.skipped.keys() == {"broken.mp4", "short.mkv"}
    assert source.skipped["short.mkv"] == "3 frames, a clip has 8"
    assert not alone.skipped


def test_a_folder_without_a_usable_video_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        videos_of(tmp_path / "absent", RGB, seed=0)
    with pytest.raises(UserError, match=r"no usable video \(no video files\)"):
        videos_of(tmp_path, RGB, seed=0)
    write_video(tmp_path / "short.mkv", 3)
    (tmp_path / "broken.mp4").write_bytes(b"not a video at all")
    with pytest.raises(UserError, match=r"broken\.mp4: .*short\.mkv: 3 frames, a clip has 8") as caught:
        videos_of(tmp_path, RGB, seed=0, frames=8).clip(0, 8)
    assert "\n" not in str(caught.value)


def test_memory_is_bounded_and_does_not_change_the_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write_video(tmp_path / f"{name}.mkv", 10)
    plenty = videos_of(tmp_path, RGB, seed=0, frames=4)
    expected = batch(plenty, 0, 8, 4)
    monkeypatch.setattr(clips, "MEMORY", 15 * 16 * 24 * 3)  # one video and a half
    scarce = videos_of(tmp_path, RGB, seed=0, frames=4)
    assert torch.equal(batch(scarce, 0, 8, 4), expected)
    assert not scarce._decoded and plenty._decoded


def test_flip_mirrors_half_of_the_clips_and_changes_nothing_else(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(0, 255, 16, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, axis=2)
    frames = [ramp // 2 + t for t in range(12)]
    data_kit.write_video(tmp_path / "v", frames)
    plain, flipped = source(tmp_path), source(tmp_path, flip=True)
    mirrored = 0
    for index in range(16):
        one, other = plain.clip(index, LENGTH).frames, flipped.clip(index, LENGTH).frames
        mirrored += torch.equal(one.flip(-1), other)
        assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
    assert 2 < mirrored < 14


def test_random_crops_keep_the_shape_and_stay_in_place_during_a_clip(tmp_path: Path) -> None:
    still = np.tile(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (32, 1, 3))  # (32, 128, 3)
    data_kit.write_video(tmp_path / "v", [still] * 6)
    clips_ = source(tmp_path, crop=Crop.RANDOM)
    places = set()
    for index in range(10):
        clip = clips_.clip(index, LENGTH).frames
        row = ((clip[0, 0, 0] + 1) * 127.5).round()
        assert clip.shape == (LENGTH, 1, 32, 32) and torch.equal(clip, clip[:1].expand_as(clip))
        assert torch.equal(row.diff(), torch.full((31,), 2.0))
        places.add(row[0].item())
    assert len(places) > 4
    assert clips_.crop(0, 8).shape == (1, 8, 8)
    centre = open_clips(tmp_path, preset(crop=Crop.CROP), 0, LENGTH).clip(0, 1).frames
    assert ((centre[0, 0, 0, 0] + 1) * 127.5).round().item() == 96
    write_image(tmp_path / "long.png", np.zeros((1, 5000, 3), np.uint8))
    assert source(tmp_path / "long.png", frames=1, crop=Crop.RANDOM, format="videos").clip(0, 1).frames.shape[2:] == (
        32,
        32,
    )
