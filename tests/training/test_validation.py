"""Validation: a held-out loss that depends on the weights only, metrics, and videos."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from command_kit import clip, save

from ca2vdm_cli.autoencoder import load_autoencoder
from ca2vdm_cli.config import Split
from ca2vdm_cli.data import MovingDigits
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import backends, metrics
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.processes import make_accelerator
from ca2vdm_cli.training.batches import TrainingData
from ca2vdm_cli.training.held_out import held_out_clips
from ca2vdm_cli.training.inputs import Inputs, open_source
from ca2vdm_cli.training.log import VALIDATION_FILE
from ca2vdm_cli.training.loop import training_loop
from ca2vdm_cli.training.run_folder import RunFolder
from ca2vdm_cli.training.sheets import EMPTY, GIVEN
from ca2vdm_cli.training.trainer import Trainer
from ca2vdm_cli.training.validation import LEVELS, Validator
from ca2vdm_cli.video_io import Frame, open_reader
from ca2vdm_cli.video_metrics import Metric


def validator(folder: Path, *overrides: str) -> Validator:
    preset = load_preset("tiny", ["training.validation_clips=3", *overrides]).config
    assert preset.synthetic_data is not None and preset.video is not None
    torch.manual_seed(0)
    autoencoder = load_autoencoder(preset.autoencoder, preset.video, preset.model.in_channels)
    source = MovingDigits(preset.synthetic_data, preset.video, seed=9)
    data = TrainingData(source, autoencoder)
    return Validator(preset, data, backends["eager"], torch.device("cpu"), folder)


@pytest.mark.parametrize("start", [True, False])
def test_a_validation_leaves_a_video_and_a_sheet(start: bool, tmp_path: Path) -> None:
    prefixes = [0, 1, 5] if start else [1, 5]
    settings = [f"diffusion.unconditional_start={str(start).lower()}", f"training.prefix_lengths={prefixes}"]
    validate = validator(tmp_path, *settings)
    report = validate(validate.model.state_dict(), 40)
    assert report.step == 40 and report.by_prefix.keys() == set(prefixes) and report.by_level.keys() == set(LEVELS)
    mean = sum(report.by_level.values()) / len(LEVELS)
    assert report.loss == pytest.approx(mean) == pytest.approx(sum(report.by_prefix.values()) / len(prefixes))
    sheet = cv2.imread(str(report.sheet))
    config = validate.preset.video
    assert sheet is not None and config is not None
    rows = 2 * 2 + 2 * (1 if start else 2)  # truth and model, or the model alone
    assert sheet.shape[0] > rows * config.height and sheet.shape[1] > 14 * config.width
    assert (sheet == np.array(GIVEN)[::-1]).all(-1).any()
    with open_reader(report.video) as reader:
        frames = list(reader)
    window, chunk = validate.preset.model.context_frames, validate.preset.model.chunk_frames
    assert len(frames) == window + (2 * window // chunk + 1) * chunk


def test_a_video_of_absolute_positions_ends_where_they_do(tmp_path: Path) -> None:
    validate = validator(tmp_path, "model.temporal_positions=absolute")
    with open_reader(validate(validate.model.state_dict(), 1).video) as reader:
        assert len(list(reader)) == 12  # of 13 positions, in chunks of 4; 13 after a given window of 9


def test_an_unsuitable_sampler_is_refused_before_the_first_validation(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ancestral needs a variance-preserving process"):
        validator(
            tmp_path,
            "sampling.sampler=ancestral",
            "diffusion.beta_schedule=flow",
            "diffusion.prediction=flow",
            "model.learn_variance=false",
        )


def test_the_held_out_loss_depends_on_the_weights_only(tmp_path: Path) -> None:
    first, second = validator(tmp_path), validator(tmp_path)
    weights = first.model.state_dict()
    torch.manual_seed(7)
    assert first(weights, 1).by_prefix == second(weights, 2).by_prefix
    others = {key: value + 0.1 for key, value in weights.items()}
    assert first(weights, 1).loss != first(others, 1).loss


class Brightness(Metric):
    name = "brightness"
    description = "mean of the generated frames, for tests"

    def measure(self, generated: Frame, true: Frame) -> float:
        assert generated.shape == true.shape and generated.shape[1:] == (32, 32, 1)
        assert generated.dtype == true.dtype == np.uint8
        measured_lengths.append(len(generated))
        return float(generated.mean())


measured_lengths: list[int] = []


@pytest.fixture
def brightness() -> Iterator[str]:
    measured_lengths.clear()
    metrics.register(Brightness())
    yield Brightness.name
    metrics.unregister(Brightness.name)


def test_metrics_of_held_out_clips(brightness: str, tmp_path: Path) -> None:
    validate = validator(tmp_path, f"training.validation_metrics=[psnr, {brightness}]")
    report = validate(validate.model.state_dict(), 1)
    pixels = torch.stack([validate.data.source.clip(index, 13).frames for index in range(3)])
    frames = np.rint((pixels.numpy() + 1) * 127.5)
    assert report.repeat_last_frame[brightness] == pytest.approx(frames[:, 8].mean(), abs=1e-3)
    latents = validate.data.autoencoder.encode(pixels.flatten(0, 1))
    decoded = ((validate.data.autoencoder.decode(latents).numpy() + 1) * 127.5).round().clip(0, 255)
    assert report.reconstruction[brightness] == pytest.approx(decoded.mean(), abs=1e-2)
    errors = np.square(decoded.reshape(3, 13, -1) - frames.reshape(3, 13, -1)).mean(-1)
    assert report.reconstruction["psnr"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), abs=1e-2)
    assert report.continuation.keys() == {"psnr", brightness}
    assert sorted(measured_lengths) == [4] * 6 + [13] * 3  # a chunk, or a window and a chunk


def test_metrics_of_clips_shorter_than_the_window(brightness: str, tmp_path: Path) -> None:
    """The frames before the last chunk are the context; a clip of one chunk has none."""
    parallel = ["training.parallel_chunks=true", "training.prefix_lengths=[0]"]
    for frames, lengths in ((8, [4] * 6 + [8] * 3), (4, [4] * 3)):
        measured_lengths.clear()
        metric = f"training.validation_metrics=[{brightness}]"
        validate = validator(tmp_path, *parallel, f"training.clip_frames={frames}", metric)
        report = validate(validate.model.state_dict(), 1)
        assert sorted(measured_lengths) == lengths and report.reconstruction.keys() == {brightness}
        assert bool(report.continuation) == bool(report.repeat_last_frame) == (frames == 8)


def videos(folder: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        save(folder / name, clip(20 + 8 * index))
    return folder


@pytest.mark.parametrize(
    ("names", "validation", "seen"),
    [
        (["a.mp4", "b.mp4"], None, "all of them"),
        (["train/a.mp4", "test/b.mp4"], None, ""),
        (["a.mp4", "b.mp4"], "same", "2 of its 2 videos"),
        (["a.mp4", "held-out/b.mp4"], "held-out", "1 of its 1 videos"),
        (["a.mp4", "b.mp4"], "elsewhere", ""),
    ],
)
def test_clips_that_training_sees_too_are_reported(
    names: list[str], validation: str | None, seen: str, tmp_path: Path
) -> None:
    data, config = videos(tmp_path / "videos", *names), load_preset("tiny").config
    places = {None: None, "same": data, "held-out": data / "held-out", "elsewhere": tmp_path / "elsewhere"}
    videos(tmp_path / "elsewhere", "c.mp4")
    inputs = Inputs(data, places[validation], None, None, 0)
    held_out = held_out_clips(inputs, open_source(data, config, 0, "data"), config)
    assert held_out.seen == seen
    assert (held_out.config.data.split is Split.TEST) == (names[0] == "train/a.mp4")


def test_shown_clips_are_as_long_as_the_videos_allow(tmp_path: Path) -> None:
    config = load_preset("tiny").config
    lengths = []
    for frames in (13, 20, 40):
        save(tmp_path / str(frames) / "clip.mp4", clip(frames))
        inputs = Inputs(tmp_path / str(frames), None, None, None, 0)
        held_out = held_out_clips(inputs, open_source(tmp_path / str(frames), config, 0, "data"), config)
        lengths += [len(shown.frames) for shown in held_out.clips(1, 25)]
    assert lengths == [13, 19, 25]


def test_the_truth_is_above_the_model_for_as_long_as_it_lasts(tmp_path: Path) -> None:
    validate = validator(tmp_path, "training.validation_clips=1", "training.prefix_lengths=[0, 9]")
    report = validate(validate.model.state_dict(), 1)
    sheet = cv2.imread(str(report.sheet))
    assert sheet is not None
    source = validate.data.source
    true = (source.clip(0, 13).frames[0, 0].numpy() + 1) * 127.5
    assert np.abs(sheet[44:108:2, 76:140:2, 0] - true).max() < 1  # the first picture of the first row, twice as large
    assert (sheet[44:108, 960:1024] == EMPTY).all()  # frame 28 of a clip of 13
    assert report.gain is not None and report.gain == report.continuation["psnr"] - report.repeat_last_frame["psnr"]
    assert report.decoder_share is not None and 0 < report.decoder_share <= 1


def test_training_validates_as_often_as_requested_and_logs_it(tmp_path: Path) -> None:
    preset = load_preset("tiny", ["training.validate_every=2", "training.steps=3"]).config
    validate = validator(tmp_path / "validation")
    accelerator = make_accelerator("cpu", preset.training.precision)
    trainer = Trainer(preset, validate.data, backends["eager"], accelerator)
    training_loop(trainer, RunFolder(tmp_path), lambda report: None, validate)
    lines = [json.loads(line) for line in (tmp_path / VALIDATION_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert isinstance(validate.model, CausalVideoTransformer)
    for line in lines:
        assert all(line[key].keys() == {"psnr"} for key in ("reconstruction", "continuation", "repeat_last_frame"))
        assert (tmp_path / "validation" / line["sheet"]).is_file() and (
            tmp_path / "validation" / line["video"]
        ).is_file()
    assert any((tmp_path / "tensorboard").iterdir())
