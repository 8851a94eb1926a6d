"""Moving digits: reproducible, in range, moving as specified."""

import pytest
import torch
from command_kit import batch

from ca2vdm_cli.config import SyntheticDataConfig, VideoConfig
from ca2vdm_cli.data import TILE, MovingDigits, digit_images
from ca2vdm_cli.errors import UsageError

GRAY = VideoConfig(height=64, width=64, channels=1)


def test_digits_can_move_in_few_directions() -> None:
    source = MovingDigits(SyntheticDataConfig(directions=4, min_speed=0.5, max_speed=0.5), GRAY, seed=0)
    steps = []
    for index in range(16):
        clip = (source.clip(index, 2).frames + 1) / 2
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
    assert torch.equal(MovingDigits(config, GRAY, seed=3).clip(6, 5).frames, clips[2])
    assert torch.equal(source.clip(4, 9).frames[:5], clips[0])
    assert not torch.equal(MovingDigits(config, GRAY, seed=4).clip(4, 5).frames, clips[0])
    assert not torch.equal(clips[0], clips[1])


def test_digits_stay_whole_and_inside_while_they_move_evenly_and_bounce() -> None:
    config = SyntheticDataConfig(min_speed=3.0, max_speed=3.0)
    for index in range(4):
        ink = (MovingDigits(config, GRAY, seed=0).clip(index, 60).frames[:, 0] + 1) / 2  # (T, H, W)
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


def test_digits_in_colour_and_as_high_as_the_frame() -> None:
    clip = MovingDigits(SyntheticDataConfig(), VideoConfig(height=TILE, width=40, channels=3), seed=0).clip(0, 8).frames
    assert clip.shape == (8, 3, TILE, 40)
    assert torch.equal(clip[:, 0], clip[:, 2])
    with pytest.raises(UsageError, match="too small for digits"):
        MovingDigits(SyntheticDataConfig(), VideoConfig(height=16, width=64), seed=0)


@pytest.mark.parametrize("size", [20, 42])
def test_size_of_digits(size: int) -> None:
    ink = (MovingDigits(SyntheticDataConfig(digit_size=size), GRAY, seed=0).clip(0, 1).frames[0, 0] + 1) / 2
    same = (MovingDigits(SyntheticDataConfig(), GRAY, seed=0).clip(0, 1).frames[0, 0] + 1) / 2
    assert (ink.sum() / same.sum()).item() == pytest.approx((size / TILE) ** 2, rel=0.05)
    assert ink.min() >= 0 and ink.max() <= 1
    with pytest.raises(UsageError, match="too small for digits of 65x65 pixels"):
        MovingDigits(SyntheticDataConfig(digit_size=65), GRAY, seed=0)


@pytest.mark.parametrize("size", [28, 42])
def test_crops_of_digits_are_places_in_a_frame(size: int) -> None:
    source = MovingDigits(SyntheticDataConfig(digit_size=size), GRAY, seed=0)
    offsets = set()
    for index in range(8):
        crop, frame = source.crop(index, 40), source.clip(index, 1).frames[0]
        assert crop.shape == (1, 40, 40)
        places = frame.unfold(1, 40, 1).unfold(2, 40, 1)  # (1, 25, 25, 40, 40)
        offsets |= {tuple(place) for place in (places == crop).all((0, 3, 4)).nonzero().tolist()[:1]}
    assert len(offsets) > 4
    assert torch.equal(source.crop(7, 40), crop)
    assert source.crop(0, 80).shape == (1, 64, 64)
