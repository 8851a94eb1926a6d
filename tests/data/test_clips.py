"""Clips: reproducible, in range, moving as promised; unusable videos named."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from command_kit import batch

from ca2vdm_cli.config import DataConfig, SyntheticDataConfig, VideoConfig
from ca2vdm_cli.data import TILE, MovingDigits, VideoClips, clips, digit_images, read_layout
from ca2vdm_cli.errors import UsageError, UserError

GRAY = VideoConfig(height=64, width=64, channels=1)
RGB = VideoConfig(height=16, width=24, channels=3)


def write_video(path: Path, frames: int, height: int = 32, width: int = 48) -> None:
    """A lossless video whose frame t is of brightness 4 t everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for t in range(frames):
            picture = np.full((height, width, 3), 4 * t, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def videos_of(path: Path, video: VideoConfig, seed: int, frames: int = 1) -> VideoClips:
    """Clips of a path whose layout is guessed."""
    layout = read_layout(path, DataConfig())
    return VideoClips(str(path), layout.videos, layout.rejects, video, DataConfig(), seed, frames)


def brightness(clip: torch.Tensor) -> list[int]:
    """What ``write_video`` put into each frame, divided by 4."""
    return [round(value) for value in ((clip.mean((1, 2, 3)) + 1) * 127.5 / 4).tolist()]


def test_directions_may_be_few() -> None:
    source = MovingDigits(SyntheticDataConfig(directions=4, min_speed=0.5, max_speed=0.5), GRAY, seed=0)
    steps = []
    for index in range(16):
        clip = (source.clip(index, 2) + 1) / 2
        places = torch.arange(64.0)
        rows, columns = ((clip.sum((1, 3)) @ places), (clip.sum((1, 2)) @ places))
        ink = clip.sum((1, 2, 3))
        steps.append((float((rows / ink).diff()), float((columns / ink).diff())))
    inside = [step for step in steps if min(map(abs, step)) > 0.3]  # not at a border
    assert len(inside) > 8 and all(abs(abs(part) - 0.5 / 2**0.5) < 0.01 for step in inside for part in step)
    assert len({(y > 0, x > 0) for y, x in inside}) == 4


def test_twenty_images_of_each_class_ship_and_more_are_refused() -> None:
    assert digit_images(20).shape == (200, TILE, TILE)
    assert torch.equal(torch.from_numpy(digit_images(3)[3:6]), torch.from_numpy(digit_images(20)[20:23]))
    with pytest.raises(UsageError, match=r"images_per_class: 21 must be at most 20"):
        digit_images(21)


def test_digit_clips_depend_on_seed_and_index_only() -> None:
    config = SyntheticDataConfig(digits=2)
    source = MovingDigits(config, GRAY, seed=3)
    clips = batch(source, index=4, size=3, frames=5)
    assert clips.shape == (3, 5, 1, 64, 64) and clips.dtype == torch.float32
    assert torch.equal(MovingDigits(config, GRAY, seed=3).clip(6, 5), clips[2])
    assert torch.equal(source.clip(4, 9)[:5], clips[0])
    assert not torch.equal(MovingDigits(config, GRAY, seed=4).clip(4, 5), clips[0])
    assert not torch.equal(clips[0], clips[1])


def test_digits_stay_whole_and_inside_while_they_move_evenly_and_bounce() -> None:
    config = SyntheticDataConfig(min_speed=3.0, max_speed=3.0)
    for index in range(4):
        ink = (MovingDigits(config, GRAY, seed=0).clip(index, 60)[:, 0] + 1) / 2  # (T, H, W)
        assert ink.min() >= 0 and ink.max() <= 1
        assert ink.sum((1, 2)).std() < 1e-3 * ink.sum((1, 2)).mean()  # nothing is ever cut off
        places = torch.arange(64.0)
        rows = (ink.sum(2) @ places) / ink.sum((1, 2))
        columns = (ink.sum(1) @ places) / ink.sum((1, 2))
        speeds = torch.stack([rows.diff(), columns.diff()]).abs()  # (2, T - 1)
        free = (speeds - speeds.median(1, keepdim=True).values).abs().max(0).values < 1e-2  # not at a border
        assert free.float().mean() > 0.6
        assert torch.allclose(speeds[:, free].square().sum(0).sqrt(), torch.tensor(3.0), atol=1e-2)
        assert any((path.diff() > 0).any() and (path.diff() < 0).any() for path in (rows, columns))


def test_digits_in_colour_and_as_large_as_the_frame() -> None:
    clip = MovingDigits(SyntheticDataConfig(), VideoConfig(height=TILE, width=40, channels=3), seed=0).clip(0, 8)
    assert clip.shape == (8, 3, TILE, 40)
    assert torch.equal(clip[:, 0], clip[:, 2])
    with pytest.raises(UsageError, match="too small for digits"):
        MovingDigits(SyntheticDataConfig(), VideoConfig(height=16, width=64), seed=0)


@pytest.mark.parametrize("size", [20, 42])
def test_size_of_digits(size: int) -> None:
    ink = (MovingDigits(SyntheticDataConfig(digit_size=size), GRAY, seed=0).clip(0, 1)[0, 0] + 1) / 2
    same = (MovingDigits(SyntheticDataConfig(), GRAY, seed=0).clip(0, 1)[0, 0] + 1) / 2
    assert (ink.sum() / same.sum()).item() == pytest.approx((size / TILE) ** 2, rel=0.05)
    assert ink.min() >= 0 and ink.max() <= 1
    with pytest.raises(UsageError, match="too small for digits of 65x65 pixels"):
        MovingDigits(SyntheticDataConfig(digit_size=65), GRAY, seed=0)


@pytest.mark.parametrize("size", [28, 42])
def test_crops_of_digits_are_places_in_a_frame(size: int) -> None:
    source = MovingDigits(SyntheticDataConfig(digit_size=size), GRAY, seed=0)
    offsets = set()
    for index in range(8):
        crop, frame = source.crop(index, 40), source.clip(index, 1)[0]
        assert crop.shape == (1, 40, 40)
        places = frame.unfold(1, 40, 1).unfold(2, 40, 1)  # (1, 25, 25, 40, 40)
        offsets |= {tuple(place) for place in (places == crop).all((0, 3, 4)).nonzero().tolist()[:1]}
    assert len(offsets) > 4
    assert torch.equal(source.crop(7, 40), crop)
    assert source.crop(0, 80).shape == (1, 64, 64)


def test_clips_of_a_nested_folder_are_consecutive_frames_of_one_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", 12)
    write_video(tmp_path / "deep" / "er" / "b.MKV", 20)
    (tmp_path / "notes.txt").write_text("not a video")
    source = videos_of(tmp_path, RGB, seed=1, frames=8)
    assert [Path(video.name).name for video in source.videos] == ["a.mkv", "b.MKV"] and not source.skipped
    starts = set()
    for index in range(12):
        clip = source.clip(index, 8)
        assert clip.shape == (8, 3, 16, 24) and clip.dtype == torch.float32
        first, *rest = brightness(clip)
        assert rest == list(range(first + 1, first + 8))
        starts.add(first)
    assert len(starts) > 3
    assert torch.equal(videos_of(tmp_path, RGB, seed=1, frames=8).clip(7, 8), source.clip(7, 8))


def test_one_file_and_gray_crops(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", 6)
    source = videos_of(tmp_path / "a.mkv", VideoConfig(height=16, width=24, channels=1), seed=0)
    assert source.clip(0, 6).shape == (6, 1, 16, 24)
    assert source.crop(0, 8).shape == (1, 8, 8)
    assert source.crop(0, 20).shape == (1, 16, 20)


def test_unusable_videos_are_named_and_skipped(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mkv", 12)
    write_video(tmp_path / "short.mkv", 3)
    (tmp_path / "broken.mp4").write_bytes(b"not a video at all")
    source = videos_of(tmp_path, RGB, seed=0, frames=8)
    alone = videos_of(tmp_path / "good.mkv", RGB, seed=0, frames=8)
    assert all(source.clip(i, 8).shape == (8, 3, 16, 24) for i in range(6))
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
