"""Frame sizes, channels and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from video_kit import load, make_clip, psnr

from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.video_io import (
    Aspect,
    Geometry,
    contact_sheet,
    to_channels,
    write_image,
)

SIZES = [(48, 64), (64, 48), (90, 160), (33, 77), (200, 10), (64, 64)]


@pytest.mark.parametrize("model_size", [(64, 64), (32, 48)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aspect", Aspect)
def test_geometry_sizes(aspect: Aspect, size: tuple[int, int], model_size: tuple[int, int]) -> None:
    geometry = Geometry(size, model_size, aspect)
    for channels in (1, 3):
        frame = np.full((*size, channels), 77, np.uint8)
        inner = geometry.to_model(frame)
        assert inner.shape == (*model_size, channels)
        for output in (geometry.from_model(inner), geometry.input_to_output(frame)):
            assert output.shape == (*geometry.output_size, channels)
            assert (output == 77).all()  # no black bars
    height, width = geometry.output_size
    if aspect is Aspect.CROP:
        assert height == size[0] or width == size[1]
        assert abs(width - height * model_size[1] / model_size[0]) <= 1
    else:
        assert geometry.output_size == size


@pytest.mark.parametrize("size", SIZES[:4])
@pytest.mark.parametrize("aspect", Aspect)
def test_old_and_new_frames_match(aspect: Aspect, size: tuple[int, int]) -> None:
    """Frames from the model are aligned with the input."""
    geometry = Geometry(size, (96, 96), aspect)
    frame = make_clip(1, *size)[0]
    assert psnr(geometry.from_model(geometry.to_model(frame)), geometry.input_to_output(frame)) > 30


@pytest.mark.parametrize("aspect", Aspect)
def test_equal_sizes_change_nothing(aspect: Aspect) -> None:
    frame = make_clip(1)[0]
    geometry = Geometry((48, 64), (48, 64), aspect)
    for change in (geometry.to_model, geometry.from_model, geometry.input_to_output):
        assert np.array_equal(change(frame), frame)


def test_placement_of_the_picture() -> None:
    frame = np.zeros((10, 20, 3), np.uint8)
    frame[:, 5:15] = 200
    assert (Geometry((10, 20), (10, 10), Aspect.CROP).to_model(frame) == 200).all()
    padded = Geometry((10, 20), (20, 20), Aspect.PAD).to_model(np.full_like(frame, 200))
    assert (padded[5:15] == 200).all() and not padded[:5].any() and not padded[15:].any()


def test_channels() -> None:
    red = np.full((2, 3, 3), (255, 0, 0), np.uint8)
    gray = to_channels(red, 1)
    assert gray.shape == (2, 3, 1) and (gray == 76).all()
    assert to_channels(gray[:, :, 0], 1).shape == (2, 3, 1)
    assert (to_channels(gray, 3) == 76).all() and to_channels(gray, 3).shape == (2, 3, 3)
    assert to_channels(red, 3) is red


def test_contact_sheet(tmp_path: Path) -> None:
    clip = make_clip(5, 10, 20)
    sheet = contact_sheet(clip, columns=3, gap=2)
    assert sheet.shape == (22, 64, 3)
    assert np.array_equal(sheet[12:, 22:42], clip[4]) and (sheet[12:, 44:] == 255).all()
    write_image(tmp_path / "sheet.png", sheet)
    assert np.array_equal(load(tmp_path / "sheet.png")[0], sheet)
    with pytest.raises(UsageError, match=r"sheet\.mp4"):
        write_image(tmp_path / "sheet.mp4", sheet)
    with pytest.raises(UserError, match="cannot be written"):
        write_image(tmp_path / "missing" / "sheet.png", sheet)
