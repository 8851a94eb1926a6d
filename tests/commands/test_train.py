"""``ca2vdm train``."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command_kit import (
    CHUNK,
    GENERATE,
    RUN,
    WINDOW,
    Make,
    Refused,
    Report,
    apart,
    ca2vdm,
    clip,
    load,
    save,
)

from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.config import Crop
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.training.run_folder import STATE_FILE, WEIGHTS_FILE, RunFolder
from ca2vdm_cli.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


TRAIN = ["train", "--preset", "tiny", *RUN, "--set", "training.autoencoder_steps=2"]


def test_training_on_videos(report: Report, make: Make) -> None:
    Path("videos/more").mkdir(parents=True)
    save("videos/one.mp4", clip(20, 32, 40))
    save("videos/more/two.gif", clip(16))
    Path("videos/notes.txt").write_text("not a video")
    result = report(*TRAIN, "--data", "videos", "--steps", 2, "--out", "run")
    assert (result["steps"], result["steps_this_run"], result["output"]) == (2, 2, "run")
    assert 0 < result["loss"] < 100
    for file in (WEIGHTS_FILE, "autoencoder.safetensors", "preset.yaml", "metrics.jsonl"):
        assert Path("run", file).stat().st_size > 0
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert ca2vdm("sample", "--preset", "run", *GENERATE, "--frames", 3, "-q", "-o", "out.mp4") == 0
    assert len(load("out.mp4")) == 3


def test_resumed_training_ends_where_an_uninterrupted_one_does(refused: Refused) -> None:
    assert ca2vdm(*TRAIN, "--steps", 4, "--seed", 5, "--out", "whole", "-q") == 0
    assert ca2vdm(*TRAIN, "--steps", 2, "--seed", 5, "--out", "parts", "-q") == 0
    assert "already holds a run; resume it" in refused(2, *TRAIN, "--steps", 4, "--out", "parts")
    preset = Path("parts/preset.yaml").read_text()
    resume = ["train", *RUN, "--steps", 4, "--out", "parts", "--resume"]
    assert "not the resumed run's seed, 5" in refused(2, *resume, "--seed", 0)
    assert "tensors" in refused(1, *resume, "--set", "model.depth=3")
    assert "no backend 'nope'" in refused(2, *resume, "--backend", "nope")
    assert Path("parts/preset.yaml").read_text() == preset
    assert ca2vdm(*resume, "-q") == 0
    whole, parts = (load_tensors(Path(run, WEIGHTS_FILE))[0] for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_resumed_training_uses_its_own_data(report: Report) -> None:
    save("clip.mp4", clip(20))
    for run, steps in (("whole", [4]), ("parts", [2, 4])):
        for part in steps:
            again = ["--resume"] if Path(run).exists() else ["--data", "clip.mp4"]
            command = TRAIN if "--data" in again else ["train", *RUN]
            assert ca2vdm(*command, *again, "--steps", part, "--out", run, "-q") == 0
    whole, parts = (load_tensors(Path(run, WEIGHTS_FILE))[0] for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_runs_folder_brings_its_own_preset(weights: Path, refused: Refused) -> None:
    assert ca2vdm("sample", "--checkpoint", weights, *GENERATE, "--frames", 2, "-q", "-o", "out.npz") == 0
    line = refused(2, "sample", "--checkpoint", weights, "--preset", "tiny")
    assert "has its own preset; leave out --preset" in line


@pytest.mark.parametrize("metadata", [{}, {"seed": "x"}])
def test_a_checkpoint_that_is_no_training_state(refused: Refused, metadata: dict[str, str]) -> None:
    tensors = {"a": torch.zeros(1)}
    RunFolder(Path("run")).save(1, metadata, {WEIGHTS_FILE: tensors, STATE_FILE: tensors})
    assert "not a training run's checkpoint" in refused(
        1, "train", *RUN, "--preset", "tiny", "--resume", "--out", "run"
    )


def test_resumed_training_fits_its_videos_as_before() -> None:
    save("clip.mp4", clip(20, 32, 48))
    assert ca2vdm(*TRAIN, "--data", "clip.mp4", "--aspect", "crop", "--steps", 4, "--out", "whole", "-q") == 0
    assert ca2vdm(*TRAIN, "--data", "clip.mp4", "--aspect", "crop", "--steps", 2, "--out", "parts", "-q") == 0
    assert ca2vdm("train", *RUN, "--resume", "--steps", 4, "--out", "parts", "-q") == 0
    whole, parts = (load_tensors(Path(run, WEIGHTS_FILE))[0] for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert ca2vdm("train", *RUN, "--resume", "--steps", 4, "--out", "parts", "-q", "--set", "data.crop=pad") == 0
    assert load_preset("parts").config.data.crop is Crop.PAD


def test_videos_that_were_left_out_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("videos").mkdir()
    save("videos/good.mp4", clip(20))
    save("videos/short.mp4", clip(3))
    assert ca2vdm(*TRAIN, "--data", "videos", "--steps", 1, "--out", "run") == 0
    assert "skipped 1 of 2 videos: short.mp4: 3 frames, a clip has 13" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["weights", "file", "file/below"])
def test_a_folder_that_training_may_not_use(refused: Refused, out: str) -> None:
    Path("weights").mkdir()
    Path("weights/ema.safetensors").write_text("somebody's")
    Path("file").write_text("no folder")
    assert "choose another" in refused(2, *TRAIN, "--out", out)
    assert Path("weights/ema.safetensors").read_text() == "somebody's"


def test_a_run_can_be_resumed_from_its_very_beginning() -> None:
    assert ca2vdm(*TRAIN, "--steps", 2, "--out", "whole", "-q", "--set", "training.keep_checkpoints=3") == 0
    first = Path("whole/checkpoints/step-00000000")
    assert first.is_dir()
    shutil.copytree("whole", "killed")
    shutil.rmtree("killed/checkpoints/step-00000002")
    assert ca2vdm("train", *RUN, "--resume", "--out", "killed", "-q") == 0
    whole, killed = (load_tensors(Path(run, WEIGHTS_FILE))[0] for run in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_finished_training_has_nothing_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm(*TRAIN, "--steps", 1, "--out", "run") == 0
    assert "trained to step 1" in capsys.readouterr().err
    assert ca2vdm("train", *RUN, "--out", "run", "--resume") == 0
    assert "run is already at step 1; use --steps to train longer" in capsys.readouterr().err


def test_interrupted_training_says_how_to_resume(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def interrupt(trainer: Trainer) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(trainer)

    save("clip.mp4", clip(16))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupt)
        assert ca2vdm(*TRAIN, "--steps", 3, "--out", "run", "--data", "clip.mp4", "--seed", 2) == 130
    out, text = capsys.readouterr()
    assert out == ""
    assert "stopping after this step; Ctrl-C again stops at once, without saving it\n" in text
    advice = re.search(r"^interrupted at step 1: continue with ca2vdm train (.*)\n\Z", text, re.MULTILINE)
    assert advice
    assert ca2vdm("train", *RUN, "-q", *advice[1].split()) == 0
    assert load_tensors(Path("run/ema.safetensors"))[1]["step"] == "3"


def test_training_can_begin_at_given_weights(weights: Path) -> None:
    request = ["train", *RUN, "--steps", 1, "-q", "--set", "training.learning_rate=1e-9"]
    assert ca2vdm(*request, "--checkpoint", weights, "--out", "fine") == 0
    before, after = (load_tensors(run / WEIGHTS_FILE)[0] for run in (weights, Path("fine")))
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


@pytest.mark.parametrize("videos", [[], ["short.mp4"], ["broken.mp4"]])
def test_no_usable_data(refused: Refused, videos: list[str]) -> None:
    Path("videos").mkdir()
    if "short.mp4" in videos:
        save("videos/short.mp4", clip(WINDOW + CHUNK - 1))
    if "broken.mp4" in videos:
        Path("videos/broken.mp4").write_text("nothing")
    line = refused(1, *TRAIN, "--data", "videos", "--out", "run")
    assert "videos: no usable video" in line
    assert all(video in line for video in videos)
    assert not Path("run").exists()


def test_distilling_a_run_gives_a_preset_of_few_steps(weights: Path, refused: Refused) -> None:
    settings = ["--set", "distillation.steps=2", "--set", "distillation.teacher_steps=4"]
    request = ["train", *RUN, "--distill", weights, "--steps", 2, "--out", "student", "-q", *settings]
    assert "must be v or flow" in refused(2, *request)
    assert ca2vdm(*request, "--set", "diffusion.prediction=v") == 0
    assert ca2vdm("train", *RUN, "--resume", "--steps", 3, "--out", "student", "-q") == 0
    begun = ["--checkpoint", weights / WEIGHTS_FILE, "--set", "diffusion.prediction=v"]
    assert ca2vdm("train", *RUN, "--distill", weights, "--steps", 1, "--out", "begun", "-q", *settings, *begun) == 0
    assert load_preset("begun").config.video == load_preset(str(weights)).config.video
    preset = load_preset("student").config
    assert (preset.sampling.sampler, preset.sampling.steps) == ("trailing", 2)
    assert RunFolder(Path("student")).newest()[0].facts["teacher"] == str(weights.resolve())  # type: ignore[union-attr]
    assert ca2vdm("sample", "--preset", "student", *RUN, "--frames", 3, "-q", "-o", "out.npz") == 0
    assert "no such file" in refused(2, "train", *RUN, "--distill", "absent.safetensors", "--out", "other")


@pytest.mark.parametrize("part", ["temporal", "lora"])
def test_part_of_a_model_needs_weights_to_start_from(part: str, refused: Refused) -> None:
    line = refused(2, *TRAIN, "--set", f"training.trainable={part}", "--steps", 1, "--out", "run")
    assert f"training.trainable: {part} needs weights to start from; give them with --checkpoint" in line


def test_a_fine_tuned_model_is_sampled_as_any_other(weights: Path, make: Make) -> None:
    settings = ["--set", "training.trainable=lora", "--set", "training.lora_rank=4", "--steps", 2]
    assert ca2vdm("train", "--checkpoint", weights, *settings, "--out", "run", *RUN, "-q") == 0
    assert load_tensors(Path("run") / WEIGHTS_FILE)[0].keys() == load_tensors(weights / WEIGHTS_FILE)[0].keys()
    assert ca2vdm("sample", "--preset", "run", *GENERATE, "--frames", 8, "-q", "-o", "tuned.npz") == 0
    assert max(apart(load("tuned.npz"), make("sample", "--frames", 8))) > 0


def test_resumed_validation_uses_its_own_data() -> None:
    save("clip.mp4", clip(20))
    save("held-out/other.mp4", clip(20, 32, 40))
    often = ["--set", "training.validate_every=1", "--set", "training.validation_clips=1"]
    request = [*TRAIN, "--data", "clip.mp4", "--validation-data", "held-out", *often, "--out", "run", "-q"]
    assert ca2vdm(*request, "--steps", 1) == 0
    assert ca2vdm("train", *RUN, "--resume", "--out", "run", "--steps", 2, "-q") == 0
    last = RunFolder(Path("run")).newest()[0]
    assert last is not None and last.facts["validation"] == str(Path("held-out").resolve())
    lines = [json.loads(line) for line in Path("run/validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and set(lines[0]["by_prefix"]) == {"0", "1", "4", "5", "9"}


def test_checking_data_trains_nothing(report: Report) -> None:
    save("videos/one.mp4", clip(20))
    save("videos/short.mp4", clip(3))
    result = report("train", "--preset", "tiny", "--data", "videos", "--check-data")
    assert (result["videos"], result["usable_videos"]) == (2, 1) and "short.mp4" in str(result["rejects"])
    assert not Path("runs").exists()


def test_latents_are_cached_and_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    save("clip.mp4", clip(20))
    request = [*TRAIN, "--data", "clip.mp4", "--cache-latents", "latents", "--steps", 1]
    assert ca2vdm(*request, "--out", "first") == 0
    assert "encoded 1 videos, reused the latents of 0" in capsys.readouterr().err
    assert len(list(Path("latents").glob("*.safetensors"))) == 1
    trained = ["--set", "autoencoder_weights=" + str(Path("first/autoencoder.safetensors").resolve())]
    assert ca2vdm(*request, "--out", "second", *trained) == 0
    assert "encoded 0 videos, reused the latents of 1" in capsys.readouterr().err
    assert ca2vdm(*request, "--out", "third", "--seed", 3) == 0  # an autoencoder of its own
    text = capsys.readouterr().err
    assert "stale" in text and "encoded 1 videos, reused the latents of 0" in text
