"""Choosing a reader: by name, by what it recognizes, and one that a user has registered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from data_kit import LENGTH, preset, source

from ca2vdm_cli.data import (
    MovingDigits,
    open_clips,
)
from ca2vdm_cli.errors import UsageError


def test_the_source_without_a_path_is_moving_digits(tmp_path: Path) -> None:
    digits = open_clips(None, preset(), 0, LENGTH)
    assert isinstance(digits, MovingDigits) and digits.clip(0, LENGTH).caption is None
    with pytest.raises(UsageError, match="leave out --data"):
        open_clips(tmp_path, preset(format="moving-digits"), 0, LENGTH)
    with pytest.raises(UsageError, match="name a folder of videos with --data"):
        open_clips(None, replace(preset(), synthetic_data=None), 0, LENGTH)
    with pytest.raises(UsageError, match="no such file or folder"):
        source(tmp_path / "absent")
