"""Training the autoencoder: it survives interrupts and kills, can go on for longer, and says how well it decodes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_kit import RUN, Refused, ca2vdm
from torch import Tensor

from ca2vdm_cli.autoencoder import ConvAutoencoder, load_autoencoder
from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.config import AutoencoderConfig, TrainingConfig, VideoConfig
from ca2vdm_cli.data import Clip
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.training.autoencoder import AutoencoderTrainer, train_autoencoder
from ca2vdm_cli.training.checkpoints import Checkpoints
from ca2vdm_cli.training.run_folder import AUTOENCODER_FILE, STATE_FILE, WEIGHTS_FILE

VIDEO = VideoConfig(height=32, width=32, channels=1)


class Stripes:
    """A clip source that takes no time."""

    def clip(self, index: int, length: int) -> Clip:
        return Clip(self.crop(index, 32).expand(length, 1, 32, 32), None)

    def crop(self, index: int, side: int) -> Tensor:
        return torch.sin((torch.arange(side) + index % 7) / (2 + index % 5)).expand(1, side, side)


SOURCE = Stripes()
TRAINING = TrainingConfig(autoencoder_steps=10, autoencoder_batch_size=2, checkpoint_every=3)
TRAIN = ["train", "--preset", "tiny", *RUN, "--steps", 2, "--set", "training.autoencoder_batch_size=2"]


class Killed(Exception):
    pass


def make(kind: str) -> ConvAutoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(kind=kind, downsample=4, base_channels=4)
    autoencoder = load_autoencoder(config, VIDEO, 1)
    assert isinstance(autoencoder, ConvAutoencoder)
    return autoencoder


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, {AUTOENCODER_FILE, STATE_FILE})


def assert_equal(ours: ConvAutoencoder, theirs: ConvAutoencoder) -> None:
    state = theirs.state_dict()
    assert [key for key, value in ours.state_dict().items() if not torch.equal(value, state[key])] == []


def assert_same_file(ours: Path, theirs: Path) -> None:
    tensors, expected = load_tensors(ours), load_tensors(theirs)
    assert tensors[1] == expected[1] and tensors[0].keys() == expected[0].keys()
    assert all(torch.equal(value, expected[0][key]) for key, value in tensors[0].items())


@pytest.mark.parametrize(("kind", "steps"), [("conv", [5, 8]), ("conv", [9, 10]), ("lowpass", [5])])
def test_a_killed_training_ends_as_an_uninterrupted_one(kind: str, steps: list[int], tmp_path: Path) -> None:
    """The decoder of conv is trained alone after step 8."""
    whole = make(kind)
    train_autoencoder(whole, SOURCE, TRAINING, 5)
    starts = []
    for step in (*steps, None):

        def progress(now: int, loss: float, step: int | None = step) -> None:
            if now == step:
                raise Killed

        parts = make(kind)
        try:
            train_autoencoder(
                parts,
                SOURCE,
                TRAINING,
                5,
                progress,
                checkpoints=checkpoints(tmp_path),
                on_start=lambda step, problems: starts.append(step),
            )
        except Killed:
            continue
    assert starts == [0, *((step - 1) // 3 * 3 for step in steps)]
    assert_equal(parts, whole)


def test_an_interrupt_saves_the_step(tmp_path: Path) -> None:
    whole, parts = make("conv"), make("conv")
    train_autoencoder(whole, SOURCE, TRAINING)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(
            parts,
            SOURCE,
            TRAINING,
            progress=lambda step, loss: signal.raise_signal(signal.SIGINT) if step == 8 else None,
            checkpoints=checkpoints(tmp_path),
        )
    last, problems = checkpoints(tmp_path).newest()
    assert last is not None and (last.step, problems) == (8, [])
    again = make("conv")
    train_autoencoder(again, SOURCE, TRAINING, checkpoints=checkpoints(tmp_path))
    assert_equal(again, whole)


def test_a_damaged_checkpoint_is_reported_and_one_of_other_settings_refused(tmp_path: Path) -> None:
    trainer = AutoencoderTrainer(make("conv"), SOURCE, TRAINING, 0)
    for _ in range(2):
        trainer.train_step()
        trainer.save(checkpoints(tmp_path))
    (tmp_path / "step-00000002" / STATE_FILE).write_bytes(b"")
    found: list[tuple[int, list[str]]] = []
    autoencoder, begin = make("conv"), lambda step, problems: found.append((step, problems))
    train_autoencoder(autoencoder, SOURCE, TRAINING, checkpoints=checkpoints(tmp_path), on_start=begin)
    ((step, (problem,)),) = found
    assert step == 1 and "damaged" in problem
    longer = replace(TRAINING, autoencoder_steps=50)
    with pytest.raises(UserError, match="the autoencoder's training began with other settings; resume with those"):
        train_autoencoder(make("conv"), SOURCE, longer, checkpoints=checkpoints(tmp_path))


# ------------------------------------------------------------------------------------------------------- whole runs
@pytest.mark.usefixtures("in_an_empty_folder")
def test_an_interrupted_run_goes_on_with_its_autoencoder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--set", "training.autoencoder_steps=6", "--seed", 4]
    assert ca2vdm(*TRAIN, *settings, "--out", "whole", "-q") == 0
    step = AutoencoderTrainer.train_step

    def interrupt(trainer: AutoencoderTrainer) -> float:
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderTrainer, "train_step", interrupt)
        assert ca2vdm(*TRAIN, *settings, "--out", "run") == 130
    text = capsys.readouterr().err
    assert "stopping after this step; Ctrl-C again stops at once" in text
    advice = re.search(r"^interrupted at step 4 of the autoencoder: continue with ca2vdm train (.*)$", text, re.M)
    assert advice and not Path("run", AUTOENCODER_FILE).exists()
    assert ca2vdm("train", *RUN, *advice[1].split()) == 0
    line = r"the autoencoder reconstructs frames at [\d.]+ dB \(PSNR, 32 held-out frames\) → run/validation/autoencoder"
    assert re.search(line, capsys.readouterr().err)
    for name in (AUTOENCODER_FILE, WEIGHTS_FILE):
        assert_same_file(Path("run", name), Path("whole", name))
    assert Path("run/validation/autoencoder.png").stat().st_size > 1000
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-00000000", "step-00000002"]


@pytest.mark.usefixtures("in_an_empty_folder")
def test_a_decoder_can_be_trained_longer() -> None:
    """Its latents stay as they are, and with them what the model learns."""
    assert ca2vdm(*TRAIN, "--set", "training.autoencoder_steps=3", "--out", "run", "-q") == 0
    before, weights = load_tensors(Path("run", AUTOENCODER_FILE))[0], Path("run", WEIGHTS_FILE).read_bytes()
    longer = ["train", "--resume", *RUN, "--out", "run", "-q", "--set", "training.autoencoder_steps=5"]
    assert ca2vdm(*longer) == 0
    after, metadata = load_tensors(Path("run", AUTOENCODER_FILE))
    assert metadata["steps"] == "5" and Path("run", WEIGHTS_FILE).read_bytes() == weights
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("decoder.") for key in changed)
    content = Path("run", AUTOENCODER_FILE).read_bytes()
    assert ca2vdm(*longer) == 0
    assert Path("run", AUTOENCODER_FILE).read_bytes() == content


@pytest.mark.parametrize("name", [AUTOENCODER_FILE, WEIGHTS_FILE])
def test_a_flipped_bit_in_a_runs_weights_is_noticed(name: str, weights: Path, tmp_path: Path, refused: Refused) -> None:
    for file in ("preset.yaml", AUTOENCODER_FILE, WEIGHTS_FILE):
        content = bytearray((weights / file).read_bytes())
        if file == name:
            content[-7] ^= 1
        (tmp_path / file).write_bytes(content)
    line = refused(1, "sample", "--preset", tmp_path, *RUN, "--frames", 2, "-o", tmp_path / "out.npz")
    assert f"{tmp_path / name}: damaged" in line


@pytest.mark.usefixtures("in_an_empty_folder")
def test_resuming_with_a_damaged_autoencoder_is_refused(refused: Refused) -> None:
    assert ca2vdm(*TRAIN, "--set", "training.autoencoder_steps=1", "--out", "run", "-q") == 0
    content = bytearray(Path("run", AUTOENCODER_FILE).read_bytes())
    content[-7] ^= 1
    Path("run", AUTOENCODER_FILE).write_bytes(content)
    line = refused(1, "train", "--resume", *RUN, "--out", "run", "--steps", 4)
    assert f"run/{AUTOENCODER_FILE}: damaged" in line


@pytest.mark.slow
def test_a_run_killed_while_its_autoencoder_is_trained(tmp_path: Path) -> None:
    settings = ["--set", "training.autoencoder_steps=16", "--set", "training.checkpoint_every=3"]
    assert ca2vdm(*TRAIN, *settings, "--out", tmp_path / "whole", "-q") == 0
    command = [str(argument) for argument in (*TRAIN, *settings, "--out", tmp_path / "run", "-q")]
    code = (
        "import os, signal\n"
        "from ca2vdm_cli.__main__ import main\n"
        "from ca2vdm_cli.training.autoencoder import AutoencoderTrainer as Trainer\n"
        "step = Trainer.train_step\n"
        "Trainer.train_step = lambda t: os.kill(os.getpid(), signal.SIGKILL) if t.step == 14 else step(t)\n"
        f"main({command})\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    newest, problems = checkpoints(tmp_path / "run" / "checkpoints" / "autoencoder").newest()
    assert newest is not None and (newest.step, problems) == (12, [])
    assert ca2vdm("train", "--resume", *RUN, "--out", tmp_path / "run", "-q") == 0
    for name in (AUTOENCODER_FILE, WEIGHTS_FILE):
        assert_same_file(tmp_path / "run" / name, tmp_path / "whole" / name)
