"""Training from Python: ``ca2vdm_cli.train`` with the user's own presets, data, samplers and callbacks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_kit import clip, save
from torch import Tensor

import ca2vdm_cli
from ca2vdm_cli import Pipeline, Sampler, TrainingCallbacks, UsageError, samplers
from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.config import Preset
from ca2vdm_cli.data import Clip
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.samplers import DrawNoise
from ca2vdm_cli.presets import dump_preset, load_preset
from ca2vdm_cli.training.log import VALIDATION_FILE
from ca2vdm_cli.training.reports import StepReport
from ca2vdm_cli.training.run_folder import WEIGHTS_FILE

QUICK = {"training.autoencoder_steps": 2, "training.checkpoint_every": 100}


def train(*arguments: Any, **options: Any) -> ca2vdm_cli.TrainingResult:
    """``ca2vdm_cli.train`` on the CPU, with two steps unless told otherwise."""
    overrides = {**QUICK, **options.pop("overrides", {})}
    options = {"steps": 2, "backend": "eager", "device": "cpu", **options}
    return ca2vdm_cli.train(*arguments, overrides=overrides, **options)


class Stripes:
    """A clip source: stripes that move down, at a different speed in each clip."""

    def __init__(self, size: int = 32) -> None:
        self.size = size

    def clip(self, index: int, length: int) -> Clip:
        rows = torch.arange(self.size).view(1, 1, -1, 1) + torch.arange(length).view(-1, 1, 1, 1) * (1 + index % 3)
        return Clip(torch.sin(rows / 3).expand(length, 1, self.size, self.size), None)

    def crop(self, index: int, side: int) -> Tensor:
        return self.clip(index, 1).frames[0, :, :side, :side]


class Backwards(Sampler):
    """A sampler: Euler's method, whose steps it counts."""

    name = "backwards"
    description = "for tests"
    steps_taken = 0

    def __init__(self, process: NoiseProcess, steps: int, last_timestep: int = 0) -> None:
        super().__init__(process, steps)
        self.timesteps = [int(t) for t in np.linspace(process.config.train_timesteps - 1, 0, steps)]

    def step(self, index: int, x: Tensor, output: Tensor, noise: DrawNoise) -> Tensor:
        Backwards.steps_taken += 1
        latents, predicted = self._split(index, x, output)
        if index == len(self.timesteps) - 1:
            return latents
        return self.process.add_noise(latents, predicted, torch.tensor([int(self.timesteps[index + 1])]))


@pytest.fixture
def backwards() -> Iterator[str]:
    samplers.register(Backwards)
    yield Backwards.name
    samplers.unregister(Backwards.name)


class Recorder(TrainingCallbacks):
    """Remembers what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_autoencoder_step(self, step: int, steps: int, loss: float) -> None:
        self.calls.append(("autoencoder", step, steps))

    def on_start(self, step: int, steps: int) -> None:
        self.calls.append(("start", step, steps))

    def on_step(self, report: StepReport, mean_loss: float) -> None:
        self.calls.append(("step", report.step, mean_loss))


def test_synthetic_data_and_a_report_of_each_step(tmp_path: Path) -> None:
    recorder = Recorder()
    result = train("tiny", out=tmp_path / "run", callbacks=recorder)
    assert (result.folder, result.steps, result.steps_this_run, result.processes) == (tmp_path / "run", 2, 2, 1)
    assert [call[:2] for call in recorder.calls] == [
        ("autoencoder", 1),
        ("autoencoder", 2),
        ("start", 0),
        ("step", 1),
        ("step", 2),
    ]
    assert result.loss == recorder.calls[-1][2] and 0 < result.data_seconds < result.seconds and result.frames == 16
    pipeline = Pipeline.load(result.folder, device="cpu")
    assert sum(chunk.frames.shape[1] for chunk in pipeline.sample(frames=5, steps=2)) == 5
    resumed = train(out=tmp_path / "run", resume=True, steps=3)
    assert (resumed.steps, resumed.steps_this_run) == (3, 1)


def test_a_custom_clip_source(tmp_path: Path) -> None:
    source = Stripes()
    often = {"training.validate_every": 2, "training.validation_clips": 2}
    result = train("tiny", source, out=tmp_path / "run", overrides=often)
    assert result.clips is source and result.loss is not None
    (line,) = map(json.loads, (tmp_path / "run" / VALIDATION_FILE).read_text().splitlines())
    assert line["repeat_last_frame"]["psnr"] > 0
    with pytest.raises(UsageError, match="data: the run was trained on a Stripes object; pass one to resume it"):
        train(out=tmp_path / "run", resume=True, steps=3)
    parts = train(data=source, out=tmp_path / "run", resume=True, steps=3)
    whole = train("tiny", source, out=tmp_path / "whole", overrides=often, steps=3)
    ours, theirs = (load_tensors(run.folder / WEIGHTS_FILE)[0] for run in (parts, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_clips_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data: a clip of one frame has shape \(1, 1, 16, 16\); it must be \(1, 1,"):
        train("tiny", Stripes(16), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_custom_sampler(tmp_path: Path, backwards: str) -> None:
    """It is selected by name, and used in rollouts and in validation."""
    overrides: dict[str, Any] = {
        "sampling": {"sampler": backwards, "steps": 3},
        "training": {"parallel_chunks": True, "prefix_lengths": [0], "rollout_share": 1.0, "rollout_steps": 2},
        "training.validate_every": 2,
        "training.validation_clips": 1,
    }
    Backwards.steps_taken = 0
    result = train("tiny", out=tmp_path / "run", overrides=overrides)
    config = load_preset(result.folder).config
    assert config.sampling.sampler == backwards
    rollouts = 2 * 2 * (config.chunks(0) - 1)  # optimizer steps, denoising steps, chunks before the last
    window, chunk = config.model.context_frames, config.model.chunk_frames
    frames = window + (2 * window // chunk + 1) * chunk  # shown after a window, and from scratch
    validation = 3 * ((frames - window) // chunk + -(-frames // chunk) + 1)
    assert Backwards.steps_taken == rollouts + validation


def test_a_preset_object_and_a_runs_weights(tmp_path: Path) -> None:
    preset = load_preset("tiny").config
    assert isinstance(preset, Preset)
    first = train(preset, out=tmp_path / "first")
    autoencoder = str((first.folder / "autoencoder.safetensors").resolve())
    slow = {"training.learning_rate": 1e-9, "autoencoder_weights": autoencoder}
    second = train(preset, checkpoint=first.folder, out=tmp_path / "second", steps=1, overrides=slow)
    before, after = (load_tensors(run.folder / WEIGHTS_FILE)[0] for run in (first, second))
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resume": True}, "out: .*run has no checkpoints, so there is nothing to resume"),
        ({"seed": -1}, "seed: -1 must be a whole number from 0 to"),
        ({"steps": 0}, "training.steps: 0 must be greater than or equal to 1"),
        ({"teacher": "absent"}, "teacher: absent: no such file or folder"),
        ({"widen": True}, "preset tiny: it has no weights to widen; give some with `checkpoint`"),
        ({"widen": True, "teacher": "."}, "widen: this starts a new run; leave out `resume` and `teacher`"),
        ({"overrides": {"training.trainable": "lora"}}, "training.trainable: lora needs weights to start from"),
        ({"overrides": {"training": {"validation_metrics": ["pnsr"]}}}, "no metric 'pnsr'; did you mean psnr"),
        ({"overrides": {"sampling.sampler": "nope", "training.validate_every": 1}}, "sampler"),
    ],
)
def test_invalid_requests_name_the_argument(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=expected) as error:
        train("tiny" if "resume" not in options else None, out=tmp_path / "run", **options)
    assert "\n" not in str(error.value)


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).write_text("somebody's")
    with pytest.raises(UsageError, match=r"out: .* already holds a ema\.safetensors; choose another folder"):
        train("tiny", out=tmp_path)


@pytest.mark.slow
def test_a_plain_script_trains_on_videos(tmp_path: Path) -> None:
    """Worker processes don't run the script again, so it needs no guard."""
    (tmp_path / "videos").mkdir()
    save(tmp_path / "videos" / "clip.mp4", clip(20))
    (tmp_path / "script.py").write_text(
        "import ca2vdm_cli\n"
        "print('once')\n"
        "quick = {'training.steps': 1, 'training.autoencoder_steps': 1, 'data.workers': 1}\n"
        "print(ca2vdm_cli.train('tiny', 'videos', out='run', overrides=quick, device='cpu').steps)\n"
    )
    script = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert script.stdout.split() == ["once", "1"], script.stderr


def test_a_loaded_preset_and_changes_to_it(tmp_path: Path) -> None:
    loaded = load_preset("tiny", {"training": {"steps": 1, "autoencoder_steps": 1}, "model.depth": 1})
    assert (loaded.config.training.steps, loaded.config.model.depth) == (1, 1)
    assert train(loaded, out=tmp_path / "run", steps=None).steps == 1
    assert load_preset(loaded, "model.depth=2").config.model.depth == 2


def test_a_folder_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(dump_preset(load_preset("tiny").config))
    with pytest.raises(UsageError, match=f"checkpoint: {tmp_path} has no weights"):
        train(checkpoint=tmp_path, out=tmp_path / "run")
