"""Training in processes of its own: killed at any moment and resumed, and shared between two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.run_folder import STATE_FILE, WEIGHTS_FILE, RunFolder

KILLED = -9
# Kills the process, as ``kill -9`` does, at the n-th thing that saving does to the disk; files are left half written.
DRIVER = """
import os, pathlib, signal, sys
from ca2vdm_cli import run_folder
from ca2vdm_cli.__main__ import main

left = int(sys.argv.pop(1))

def fatal(function):
    def wrapped(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            if function is save_tensors:
                function(*arguments, **options)
                content = arguments[0].read_bytes()
                arguments[0].write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapped

save_tensors = run_folder.save_tensors
run_folder.save_tensors = fatal(save_tensors)
run_folder._to_disk = fatal(run_folder._to_disk)
pathlib.Path.rename = fatal(pathlib.Path.rename)
pathlib.Path.replace = fatal(pathlib.Path.replace)
sys.exit(main())
"""
TRAIN = ["train", "--preset", "tiny", "--backend", "eager", "--device", "cpu", "--quiet"]
SETTINGS = ["--set", "training.batch_size=4", "--set", "training.checkpoint_every=1"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A trained autoencoder, so that the runs don't each train one."""
    folder = tmp_path_factory.mktemp("autoencoder")
    assert run(*TRAIN, "--steps", "1", "--set", "training.autoencoder_steps=2", "--out", str(folder / "run")) == 0
    return ["--set", f"autoencoder_weights={folder / 'run' / 'autoencoder.safetensors'}"]


def run(*arguments: str, kill: int = 0, processes: int = 1) -> int:
    """The command's exit code, in a process of its own, or several, on one thread each."""
    return launch(*arguments, kill=kill, processes=processes).returncode


def launch(*arguments: str, kill: int = 0, processes: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", DRIVER, str(kill)]
    if processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, "-m", *torchrun, "-m", "ca2vdm_cli"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, KILLED), done.stderr
    return done


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path, autoencoder: list[str]) -> None:
    settings = [*TRAIN, *SETTINGS, *autoencoder, "--steps", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*settings, "--out", str(whole)) == 0
    begun, kills, steps = False, 0, []
    for kill in (13, 2, 5, 9, 11, 12, 0):  # in either file, in the manifest, around the renames, before publishing
        again = ["train", "--backend", "eager", "--device", "cpu", "--quiet", "--resume"]
        code = run(*(again if begun else settings), "--out", str(parts), kill=kill)
        kills += code == KILLED
        last, problems = RunFolder(parts).newest()
        begun = last is not None
        steps.append(last.step if last is not None else 0)
        assert not problems, problems  # what is not whole has no name that anybody looks at
    for kill in (1, 4):  # a finished run is saved already, and stays so
        run("train", "--backend", "eager", "--device", "cpu", "--quiet", "--resume", "--out", str(parts), kill=kill)
    assert kills == 6 and steps == sorted(steps) and steps[-1] == 4, steps
    for file in (WEIGHTS_FILE, STATE_FILE):
        ours, theirs = (load_tensors(run / "checkpoints" / "step-00000004" / file)[0] for run in (parts, whole))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert losses(parts) == losses(whole)


def test_two_processes_train_as_one_does(tmp_path: Path, autoencoder: list[str]) -> None:
    settings = [*TRAIN, *SETTINGS, *autoencoder, "--steps", "3"]
    assert run(*settings, "--out", str(tmp_path / "one")) == 0
    report = json.loads(launch(*settings, "--json", "--out", str(tmp_path / "two"), processes=2).stdout)
    assert report["processes"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    ours, theirs = (load_tensors(tmp_path / run / WEIGHTS_FILE)[0] for run in ("two", "one"))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)
    sample = ["sample", "--preset", str(tmp_path / "two"), "--backend", "eager", "--device", "cpu", "--frames", "6"]
    for name, processes in (("alone", 1), ("shared", 2)):
        output = tmp_path / name / "video.npz"
        assert run(*sample, "--num-videos", "3", "--quiet", "-o", str(output), processes=processes) == 0
        assert sorted(path.name for path in output.parent.iterdir()) == [f"video-{k:02d}.npz" for k in range(3)]
    for k in range(3):
        ours, theirs = (np.load(tmp_path / name / f"video-{k:02d}.npz")["frames"] for name in ("shared", "alone"))
        assert np.abs(ours.astype(int) - theirs).max() <= 1  # beside others in a batch, sums may round differently
