"""Separate processes: training that is killed and resumed; training and sampling that two processes share."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import pytest
import torch

from ca2vdm_cli import processes
from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.config import Optimizer, Precision, TrainingConfig
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.processes import make_accelerator
from ca2vdm_cli.training.run_folder import STATE_FILE, WEIGHTS_FILE, RunFolder
from ca2vdm_cli.training.sharding import DeepSpeedSharding, make_sharding

pytestmark = pytest.mark.slow

KILLED = -9
# Runs a command for each line of its input, in a fork, since PyTorch need then be loaded only once. Kills the fork (as
# ``kill -9`` does) at the n-th disk operation of saving; files are left half written.
DRIVER = """
import json, os, pathlib, signal, sys
import accelerate, torch.utils.tensorboard, torch._dynamo
from ca2vdm_cli.commands import generate, train
from ca2vdm_cli.training import checkpoints, setup
from ca2vdm_cli.__main__ import main

left = 0

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

save_tensors = checkpoints.save_tensors
checkpoints.save_tensors = fatal(save_tensors)
checkpoints.to_disk = fatal(checkpoints.to_disk)
pathlib.Path.rename = fatal(pathlib.Path.rename)
pathlib.Path.replace = fatal(pathlib.Path.replace)
for line in sys.stdin:
    kill, arguments = json.loads(line)
    child = os.fork()
    if not child:
        left = kill
        sys.exit(main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# FSDP between CPU processes, which accelerate supports on GPUs only.
FSDP_DRIVER = """
import sys
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from ca2vdm_cli.__main__ import main

begin = PartialState.__init__

def begin_as_on_gpus(self, *arguments, **options):
    begin(self, *arguments, **options)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = begin_as_on_gpus
if __name__ == "__main__":
    code = main()
    assert AcceleratorState().distributed_type is DistributedType.FSDP
    sys.exit(code)
"""
TRAIN = ["train", "--preset", "tiny", "--backend", "eager", "--device", "cpu", "--quiet"]
SETTINGS = ["--set", "training.batch_size=4", "--set", "training.checkpoint_every=1"]


class Run(Protocol):
    """Runs a command in a new process, on one thread; returns its exit code."""

    def __call__(self, *arguments: str, kill: int = 0) -> int: ...


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", DRIVER], env=environment({}), **pipes) as driver:
        assert driver.stdin and driver.stdout
        stdin, stdout = driver.stdin, driver.stdout

        def run(*arguments: str, kill: int = 0) -> int:
            stdin.write(json.dumps([kill, arguments]) + "\n")
            stdin.flush()
            code = int(stdout.readline())
            assert code in (0, KILLED)
            return code

        yield run
        stdin.close()


@pytest.fixture(scope="module")
def autoencoder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A trained autoencoder, so that not every run trains one."""
    folder = tmp_path_factory.mktemp("autoencoder")
    assert run(*TRAIN, "--steps", "1", "--set", "training.autoencoder_steps=2", "--out", str(folder / "run")) == 0
    return ["--set", f"autoencoder_weights={folder / 'run' / 'autoencoder.safetensors'}"]


def environment(options: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **options}


def launch(
    *arguments: str, options: dict[str, str] | None = None, program: Sequence[str] = ("-m", "ca2vdm_cli")
) -> subprocess.CompletedProcess[str]:
    """Run a command, or another program, in two new processes, with more environment variables."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, *program, *arguments]
    done = subprocess.run(command, env=environment(options or {}), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_a_run_that_is_killed_repeatedly_ends_like_an_uninterrupted_one(
    run: Run, tmp_path: Path, autoencoder: list[str]
) -> None:
    settings = [*TRAIN, *SETTINGS, *autoencoder, "--steps", "4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*settings, "--out", str(whole)) == 0
    again = ["train", "--backend", "eager", "--device", "cpu", "--quiet", "--resume"]
    begun, kills, steps = False, 0, []
    for kill in (13, 2, 5, 9, 11, 12, 0):  # in either file, in the manifest, around the renames, before publishing
        code = run(*(again if begun else settings), "--out", str(parts), kill=kill)
        kills += code == KILLED
        last, problems = RunFolder(parts).newest()
        begun = last is not None
        steps.append(last.step if last is not None else 0)
        assert not problems, problems  # an incomplete checkpoint has a name that is never read
    run(*again, "--out", str(parts), kill=4)  # a finished run has been saved, and stays intact
    assert kills == 6 and steps == sorted(steps) and steps[-1] == 4, steps
    for file in (WEIGHTS_FILE, STATE_FILE):
        ours, theirs = (load_tensors(run / "checkpoints" / "step-00000004" / file)[0] for run in (parts, whole))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert losses(parts) == losses(whole)


def test_two_processes_train_as_one_does(run: Run, tmp_path: Path, autoencoder: list[str]) -> None:
    settings = [*TRAIN, *SETTINGS, *autoencoder, "--steps", "3"]
    assert run(*settings, "--out", str(tmp_path / "one")) == 0
    report = json.loads(launch(*settings, "--json", "--out", str(tmp_path / "two")).stdout)
    assert report["processes"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    ours, theirs = (load_tensors(tmp_path / run / WEIGHTS_FILE)[0] for run in ("two", "one"))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)
    sample = ["sample", "--preset", str(tmp_path / "two"), "--backend", "eager", "--device", "cpu", "--frames", "6"]
    output = ["--num-videos", "3", "--json", "-o"]
    assert run(*sample, *output[:2], "--quiet", "-o", str(tmp_path / "alone" / "video.npz")) == 0
    report = json.loads(launch(*sample, *output, str(tmp_path / "shared" / "video.npz")).stdout)
    names = [f"video-{k:02d}.npz" for k in range(3)]
    assert (report["processes"], report["num_videos"]) == (2, 3)
    assert [Path(path).name for path in report["output"]] == names
    assert report["frames_per_second"] * report["seconds"] == pytest.approx(6 * 3)
    for name in ("alone", "shared"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == names
    for k in range(3):
        ours, theirs = (np.load(tmp_path / name / f"video-{k:02d}.npz")["frames"] for name in ("shared", "alone"))
        assert np.array_equal(ours, theirs)


def test_two_processes_share_weights_by_fsdp(run: Run, tmp_path: Path, autoencoder: list[str]) -> None:
    """With text and rollouts, which use weights outside ``forward``; the run continues that of one process."""
    driver = tmp_path / "driver.py"
    driver.write_text(FSDP_DRIVER)
    options = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    settings = ["model.text_channels=16", "model.text_tokens=6", "training.parallel_chunks=true"]
    settings += ["training.prefix_lengths=[0]", "training.rollout_share=0.7", "training.rollout_steps=2"]
    settings += ["training.learning_rate=3e-3"]  # so that branches that start at zero soon are not zero
    command = [*TRAIN, *SETTINGS, *autoencoder, *(part for setting in settings for part in ("--set", setting))]
    keep = ["--set", "training.keep_checkpoints=4"]
    assert run(*command, *keep, "--steps", "4", "--out", str(tmp_path / "one")) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / f"step-{step:08d}")
    resume = ["train", "--resume", "--backend", "eager", "--device", "cpu", "--quiet", "--steps", "4"]
    launch(*resume, "--out", str(tmp_path / "two"), options=options, program=[str(driver)])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for file in (WEIGHTS_FILE, STATE_FILE):
        ours, theirs = (
            load_tensors(tmp_path / name / "checkpoints" / "step-00000004" / file)[0] for name in ("two", "one")
        )
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            apart = (ours[key] - value).abs()
            if key.endswith("exp_avg"):
                assert float(apart.max()) <= 1e-3 * float(value.abs().max()), key
            else:  # AdamW magnifies the differences between the smallest gradients
                assert float(apart.mean()) <= 1e-5, key


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_processes_share_moments_by_deepspeed(run: Run, tmp_path: Path, autoencoder: list[str]) -> None:
    """Losses equal those of one process, resuming is exact, and runs with and without DeepSpeed can resume each
    other."""
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}))
    options = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}
    options |= {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
    lengths = ["training.prefix_lengths=[0, 9]", "training.prefix_weights=[0, 1]", "training.accumulation=2"]
    settings = [*TRAIN, *SETTINGS, *autoencoder, *(part for length in lengths for part in ("--set", length))]
    resume = ["train", "--resume", "--backend", "eager", "--device", "cpu", "--quiet", "--steps", "4"]

    def train(name: str, *arguments: str, by_deepspeed: bool) -> None:
        if by_deepspeed:
            launch(*arguments, "--out", str(tmp_path / name), options=options)
        else:
            assert run(*arguments, "--out", str(tmp_path / name)) == 0

    train("one", *settings, "--steps", "4", by_deepspeed=False)
    train("whole", *settings, "--steps", "4", by_deepspeed=True)
    for name, first, then in (("parts", True, True), ("from", True, False), ("to", False, True)):
        train(name, *settings, "--steps", "2", by_deepspeed=first)
        train(name, *resume, by_deepspeed=then)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for file in (WEIGHTS_FILE, STATE_FILE):
        weights = {
            name: load_tensors(tmp_path / name / "checkpoints" / "step-00000004" / file)[0]
            for name in ("one", "whole", "parts", "from", "to")
        }
        assert all(torch.equal(value, weights["whole"][key]) for key, value in weights["parts"].items())
        for tensors in weights.values():
            assert tensors.keys() == weights["one"].keys()
            assert all(torch.allclose(value, weights["one"][key], atol=1e-5) for key, value in tensors.items())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"zero_optimization": {"stage": 3}}, "DeepSpeed: ZeRO stage 3 is not supported"),
        ({"zero_optimization": {}}, "DeepSpeed: ZeRO stage None is not supported"),
        ({"optimizer": {"type": "Adam"}}, "DeepSpeed: the preset sets the optimizer"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "DeepSpeed: offload_optimizer"),
        ({}, "DeepSpeed: it does not support the optimizer muon; set training.optimizer=adamw"),
    ],
)
def test_unsupported_settings_of_deepspeed(settings: dict[str, Any], expected: str) -> None:
    optimizer = Optimizer.ADAMW if settings else Optimizer.MUON
    settings = {"zero_optimization": {"stage": 2}, **settings}
    accelerator: Any = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
    with pytest.raises(UsageError, match=expected):
        DeepSpeedSharding(accelerator).configure(TrainingConfig(optimizer=optimizer), share=1)


@pytest.mark.parametrize(
    ("version", "units", "expected"),
    [(1, None, "FSDP: version 1 is not supported"), (2, 100, "FSDP: a block must stay whole")],
)
def test_unsupported_settings_of_fsdp(version: int, units: int | None, expected: str) -> None:
    accelerator: Any = SimpleNamespace(
        distributed_type=SimpleNamespace(value="FSDP"),
        is_fsdp2=version == 2,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(min_num_params=units)),
    )
    with pytest.raises(UsageError, match=expected):
        make_sharding(accelerator)


def test_a_process_that_has_no_video(run: Run, tmp_path: Path, autoencoder: list[str]) -> None:
    assert run(*TRAIN, *autoencoder, "--steps", "1", "--out", str(tmp_path / "run")) == 0
    sample = ["sample", "--preset", str(tmp_path / "run"), "--backend", "eager", "--device", "cpu", "--steps", "1"]
    report = json.loads(launch(*sample, "-o", str(tmp_path / "1.npz"), "--frames", "5", "--json").stdout)
    assert (report["processes"], report["num_videos"], report["output"]) == (2, 1, str(tmp_path / "1.npz"))
    assert np.load(report["output"])["frames"].shape == (5, 32, 32, 3)


def test_a_process_does_not_wait_for_others_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "JOIN_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    advice = "start all with torchrun, or unset RANK and WORLD_SIZE"
    for rank, expected in (
        (1, r"none of 3 processes can be reached \(Connection refused\); "),
        (0, r"1 of 3 processes can be reached \(after 0.3 s\); "),
    ):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(UsageError, match=f"WORLD_SIZE: {expected}{advice}"):
            processes.Group()


def test_variables_of_a_launcher_are_ignored_if_some_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processes.LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    assert processes.launched() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.launched() == (0, 1)
    assert len(processes.Group().gather({"frames": 1})) == 1
    make_accelerator("cpu", Precision.FLOAT32)  # accelerate would look for the address
    assert "WORLD_SIZE" not in os.environ
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert processes.launched() == (1, 2)
