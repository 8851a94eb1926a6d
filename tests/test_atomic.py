"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ca2vdm_cli import atomic
from ca2vdm_cli.atomic import replacing, write_file
from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.config import Preset
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.training.run_folder import WEIGHTS_FILE, RunFolder
from ca2vdm_cli.training.trainer import write_preset


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "old")
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "old")

    def interrupted() -> None:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_temporary_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from ca2vdm_cli.atomic import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "file"], check=False)
    (leftover,) = os.listdir(tmp_path)
    assert leftover.startswith(".file.")
    assert leftover.endswith(".partial")
    (tmp_path / ".other.partial").mkdir()  # not such a name
    with replacing(tmp_path / "live") as temporary:  # in use
        monkeypatch.setattr(atomic, "_swept", set())
        write_file(tmp_path / "new", "whole")
        assert temporary.parent.exists()
        temporary.touch()
    assert sorted(os.listdir(tmp_path)) == [".other.partial", "live", "new"]


@pytest.fixture
def preset() -> Preset:
    return load_preset("tiny").config


def test_no_symbolic_link_is_followed_at_a_predictable_name(tmp_path: Path, preset: Preset) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    files = ["preset.yaml", WEIGHTS_FILE, "metrics.jsonl", "entry.safetensors"]
    for name in files:
        for end in ("partial", f"{os.getpid()}.partial"):
            (folder / f".{name}.{end}").symlink_to(precious)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 9}\n')
    run = RunFolder(folder)
    run.drop_lines_after("metrics.jsonl", 3)
    run.save(3, {}, {WEIGHTS_FILE: {"w": torch.ones(2)}, "state.safetensors": {"s": torch.ones(1)}})
    write_preset(preset, folder)
    save_tensors(folder / "entry.safetensors", {"latents": torch.zeros(1)})
    assert precious.read_text() == "mine"
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert load_tensors(folder / WEIGHTS_FILE)[0]["w"].tolist() == [1, 1]
    assert not any((folder / name).is_symlink() for name in files)


def test_a_link_at_the_name_itself_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "weights.safetensors").symlink_to(tmp_path / "precious")
    save_tensors(tmp_path / "weights.safetensors", {"w": torch.ones(2)})
    assert (tmp_path / "precious").read_text() == "mine"
