"""Locks of run folders and names, also on a file system that has none."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from ca2vdm_cli.files import hold_lock, hold_marker, is_locked, reserved


def test_a_lock_lasts_as_long_as_its_handle(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    handle = hold_lock(path)
    assert handle is not None and is_locked(path) and hold_lock(path) is None
    os.close(handle)
    assert not is_locked(path)


def test_a_file_system_without_locks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    handles = [hold_lock(tmp_path / "lock"), hold_lock(tmp_path / "lock"), hold_marker(tmp_path / "marker")]
    assert not is_locked(tmp_path / "lock")
    with reserved(tmp_path / "out.mp4") as free:
        assert free
    for handle in handles:
        assert handle is not None
        os.close(handle)
