"""Training: a resumed run equals an uninterrupted one, and failures are reported in one line."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ca2vdm_cli.autoencoder import Autoencoder, load_autoencoder
from ca2vdm_cli.checkpoint import load_tensors, load_weights
from ca2vdm_cli.config import Preset
from ca2vdm_cli.data import Clip, ClipSource, MovingDigits
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import backends
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.processes import make_accelerator
from ca2vdm_cli.training.batches import TrainingData
from ca2vdm_cli.training.checkpoints import Checkpoint
from ca2vdm_cli.training.loop import training_loop
from ca2vdm_cli.training.reports import StepReport
from ca2vdm_cli.training.run_folder import METRICS_FILE, STATE_FILE, WEIGHTS_FILE, RunFolder
from ca2vdm_cli.training.trainer import Trainer, write_preset


@pytest.fixture(scope="module")
def source() -> ClipSource:
    preset = load_preset("tiny").config
    assert preset.synthetic_data is not None and preset.video is not None
    return MovingDigits(preset.synthetic_data, preset.video, seed=0)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    preset = load_preset("tiny").config
    assert preset.video is not None
    torch.manual_seed(0)
    return load_autoencoder(preset.autoencoder, preset.video, preset.model.in_channels)


class Runs:
    """Makes trainers of the tiny preset."""

    def __init__(self, source: ClipSource, autoencoder: Autoencoder) -> None:
        self.source, self.autoencoder = source, autoencoder

    def __call__(self, *overrides: str, steps: int = 6, seed: int = 0, source: ClipSource | None = None) -> Trainer:
        preset: Preset = load_preset("tiny", [f"training.steps={steps}", *overrides]).config
        accelerator = make_accelerator("cpu", preset.training.precision)
        data = TrainingData(source or self.source, self.autoencoder)
        return Trainer(preset, data, backends["sdpa"], accelerator, seed)


@pytest.fixture
def run(source: ClipSource, autoencoder: Autoencoder) -> Runs:
    return Runs(source, autoencoder)


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that the next step depends on, and the average."""
    tensors = {f"model.{key}": value.clone() for key, value in trainer.model.state_dict().items()}
    tensors |= {f"average.{key}": value.clone() for key, value in trainer.state.average.tensors.items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for optimizer, inner in trainer.optimizers.items():
        for parameter, moments in inner.state.items():
            tensors |= {f"{optimizer}.{names[parameter]}.{key}": value.clone() for key, value in moments.items()}
    return tensors


def newest(folder: Path) -> Checkpoint:
    """The newest checkpoint; none may be damaged."""
    checkpoint, problems = RunFolder(folder).newest()
    assert checkpoint is not None and not problems
    return checkpoint


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [key for key, value in ours.items() if not torch.equal(value, theirs[key])] == []


def without_times(report: StepReport) -> tuple[object, ...]:
    return (report.step, report.loss, report.terms, report.learning_rate, report.gradient_norm, report.prefix)


# --------------------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize(
    "setting",
    [
        "training.prefix_lengths=[0]",  # with empty prefixes only, a branch has no moments
        "training.prefix_lengths=[0, 1, 4, 5, 9]",
        "training.optimizer=muon",
        "training.trainable=temporal",
        "training.trainable=lora",
        "training.parallel_chunks=true",
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(setting: str, run: Runs, tmp_path: Path) -> None:
    settings = (setting, "training.schedule=cosine", "training.warmup_steps=2")
    whole = run(*settings)
    expected = [without_times(whole.train_step()) for _ in range(6)]
    first = run(*settings)
    reports = [without_times(first.train_step()) for _ in range(3)]
    first.save(RunFolder(tmp_path))
    torch.manual_seed(99)  # global random state does not matter
    second = run(*settings)
    second.state.load(newest(tmp_path))
    assert second.step == 3
    assert_equal(state(second), state(first))
    reports += [without_times(second.train_step()) for _ in range(3)]
    assert reports == expected
    assert_equal(state(second), state(whole))


def test_the_loop_saves_as_it_goes_at_the_end_and_when_interrupted(run: Runs, tmp_path: Path) -> None:
    expected = run("training.checkpoint_every=2", steps=5)
    steps_on_disk = []

    def interrupt(report: StepReport) -> None:
        last, _ = RunFolder(tmp_path).newest()
        steps_on_disk.append(last.step if last is not None else 0)
        if report.step == 4:
            signal.raise_signal(signal.SIGINT)  # takes effect after the step

    with pytest.raises(KeyboardInterrupt):
        training_loop(run("training.checkpoint_every=2", steps=5), RunFolder(tmp_path), interrupt)
    assert steps_on_disk == [0, 0, 2, 2] and newest(tmp_path).step == 4
    trainer = run(steps=5)
    trainer.state.load(newest(tmp_path))
    training_loop(trainer, RunFolder(tmp_path), lambda report: None)
    for _ in range(5):
        expected.train_step()
    assert_equal(state(trainer), state(expected))
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(line["loss"]) and line["frames"] == 8 for line in lines)


def test_a_run_saves_a_preset_and_the_averaged_weights(run: Runs, tmp_path: Path) -> None:
    trainer = run()
    trainer.train_step()
    trainer.save(RunFolder(tmp_path))
    write_preset(trainer.preset, tmp_path)
    weights, metadata = load_tensors(tmp_path / WEIGHTS_FILE)
    assert metadata["step"] == "1"
    assert_equal(weights, trainer.state.average.tensors)
    model = CausalVideoTransformer(load_preset(tmp_path).config.model, backends["eager"])
    assert load_weights(model, weights, "weights").left_over == ()


def test_the_seed_determines_everything(run: Runs) -> None:
    def losses(seed: int) -> list[float]:
        trainer = run(seed=seed)
        return [trainer.train_step().loss for _ in range(2)]

    assert losses(0) == losses(0) != losses(1)


def test_fine_tuning_starts_from_given_weights(run: Runs) -> None:
    given = {key: value + 0.01 for key, value in run().model.state_dict().items()}
    trainer = run(seed=3)
    trainer.state.start_from(given, "mine")
    assert_equal(dict(trainer.model.state_dict()), given)
    assert_equal(trainer.state.average.tensors, given)
    trainer.train_step()
    assert not torch.equal(trainer.state.average.tensors["blocks.0.mlp.fc1.weight"], given["blocks.0.mlp.fc1.weight"])


# ------------------------------------------------------------------------------------------------------------ adapters
LORA = ("training.trainable=lora", "training.lora_rank=3", "training.lora_alpha=6", "training.ema_decay=0")


@pytest.fixture
def base(run: Runs) -> dict[str, Tensor]:
    """Weights to fine-tune, none of which are zero."""
    generator = torch.Generator().manual_seed(5)
    weights = run().model.state_dict()
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator).to(v) for k, v in weights.items()}


def test_only_adapters_are_trained_and_they_are_merged_into_saved_weights(
    run: Runs, base: dict[str, Tensor], tmp_path: Path
) -> None:
    trainer = run(*LORA, "training.prefix_lengths=[0, 9]", "training.prefix_weights=[0, 1]")
    trainer.state.start_from(base, "mine")
    assert_equal(trainer.state.averaged_weights(), base)  # adapters do nothing yet
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.endswith((".0.up", ".0.down")) for name in trained)
    for _ in range(3):
        trainer.train_step()
    with_gradient = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trained
    trainer.save(RunFolder(tmp_path))
    weights, _ = load_tensors(tmp_path / WEIGHTS_FILE)
    linear = {f"{name}.weight" for name, layer in run().model.named_modules() if isinstance(layer, nn.Linear)}
    linear = {name for name in linear if name.startswith("blocks.")}
    assert {key for key in base if not torch.equal(weights[key], base[key])} == linear
    for key in linear:
        assert 1 <= torch.linalg.matrix_rank((weights[key] - base[key]).double(), rtol=1e-4) <= 3
    model = CausalVideoTransformer(trainer.preset.model, backends["eager"])
    load_weights(model, weights, "merged")
    latents, timestep = torch.randn(1, 4, 13, 8, 8), torch.tensor([500])
    outs = []
    for each in (model, trainer.model):
        plan = each.context_plan(4, 9, TemporalWindow(trainer.preset.model))
        outs.append(each.eval()(latents, timestep, plan))
    assert torch.allclose(outs[0], outs[1], atol=1e-5)


def test_adapters_learn(run: Runs, base: dict[str, Tensor]) -> None:
    """The loss on the same clips and noise falls when they are trained on repeatedly."""

    def loss(trainer: Trainer) -> float:
        trainer.state.step = 0
        trainer.close()
        return trainer.train_step().loss

    trainer = run(*LORA, "training.prefix_lengths=[0]", "training.learning_rate=0.01", "training.batch_size=4")
    trainer.state.start_from(base, "mine")
    losses = [loss(trainer) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("training.lora_rank=49", "training.lora_rank: 49 must be at most model.hidden_size 48"),
        ("training.optimizer=muon", "muon does not go with training.trainable lora"),
    ],
)
def test_impossible_adapters_are_refused(setting: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        load_preset("tiny", ["training.trainable=lora", setting])


# ------------------------------------------------------------------------------------------------ rates and averages
def test_learning_rate_warms_up_and_falls_along_a_cosine(run: Runs) -> None:
    trainer = run("training.schedule=cosine", "training.warmup_steps=2", "training.learning_rate=1e-3", steps=6)
    rates = [trainer.train_step().learning_rate for _ in range(6)]
    cosine = [0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert rates == pytest.approx([0.5e-3, 1e-3, *(1e-3 * each for each in cosine)])
    trainer = run("training.schedule=constant", "training.warmup_steps=0", steps=3)
    assert [trainer.train_step().learning_rate for _ in range(3)] == [1e-3] * 3


def test_the_average_follows_the_weights(run: Runs) -> None:
    trainer = run("training.ema_decay=0.3")
    expected = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    for step in range(5):
        trainer.train_step()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {k: decay * v + (1 - decay) * trainer.model.state_dict()[k] for k, v in expected.items()}
    for key, value in expected.items():
        assert torch.allclose(trainer.state.average.tensors[key], value, atol=1e-6), key


def test_prefix_lengths(run: Runs) -> None:
    published = ["training.prefix_lengths=", "diffusion.unconditional_start=false"]
    assert run(*published).preset.prefixes == (1, 5, 9)  # 1 plus multiples of the chunk's length
    assert run(published[0]).preset.prefixes == (0, 1, 4, 5, 8, 9)  # and multiples of it, which follow an empty context
    parallel = run("training.parallel_chunks=true", "training.clip_frames=21", published[0])
    assert parallel.preset.prefixes == (0,) and parallel.preset.trained_prefixes == (0, 4, 8, 9)
    trainer = run("training.prefix_lengths=[0, 9]")
    assert {trainer.train_step().prefix for _ in range(8)} == {0, 9}


def test_a_share_of_the_steps_trains_only_first_chunks(run: Runs) -> None:
    settings = ["training.parallel_chunks=true", "training.clip_frames=12", "training.prefix_lengths=[0]"]
    clips = {4: 2 * 4, 12: 2 * 12}  # frames per clip: trained frames per step

    def trained(share: float) -> list[int]:
        trainer = run(*settings, f"training.first_chunk_share={share}")
        return [trainer.train_step().frames for _ in range(12)]

    assert set(trained(0)) == {clips[12]} and set(trained(1)) == {clips[4]}
    half = trained(0.5)
    assert set(half) == set(clips.values()) and half == trained(0.5)
    with pytest.raises(UsageError, match=r"first_chunk_share: 0\.5 needs training\.parallel_chunks"):
        load_preset("tiny", ["training.first_chunk_share=0.5"])


def test_clips_are_read_in_order_and_only_as_long_as_needed(run: Runs, source: ClipSource) -> None:
    asked: list[tuple[int, int]] = []

    class Counting:
        def clip(self, index: int, length: int) -> Clip:
            asked.append((index, length))
            return source.clip(index, length)

        def crop(self, index: int, side: int) -> Tensor:
            raise AssertionError("no crops are needed")

    trainer = run(source=Counting())
    prefixes = [trainer.train_step().prefix for _ in range(3)]
    assert asked == [(2 * step + video, prefix + 4) for step, prefix in enumerate(prefixes) for video in range(2)]


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_in_one_line(poison: float, run: Runs, tmp_path: Path) -> None:
    trainer = run()
    trainer.train_step()
    with torch.no_grad():
        trainer.model.final_layer.linear.bias[0] = poison
    before = state(trainer)
    with pytest.raises(UserError) as error:
        training_loop(trainer, RunFolder(tmp_path), lambda report: None)
    message = str(error.value)
    assert message.startswith("step 2: the gradient is ") and "\n" not in message
    assert "lower training.learning_rate (now 0.001)" in message
    assert error.value.exit_code == 1 and trainer.step == 1
    assert {
        key for key, value in state(trainer).items() if not torch.allclose(value, before[key], equal_nan=True)
    } == set()


def test_a_run_that_blew_up_leaves_the_last_good_checkpoint(run: Runs, tmp_path: Path) -> None:
    """The error message tells the user to resume from that checkpoint."""
    trainer = run("training.checkpoint_every=2")

    def blow_up(report: StepReport) -> None:
        if report.step == 3:
            with torch.no_grad():
                trainer.model.final_layer.linear.bias[0] = math.nan

    with pytest.raises(UserError, match="the gradient is nan"):
        training_loop(trainer, RunFolder(tmp_path), blow_up)
    tensors = newest(tmp_path).tensors(STATE_FILE)
    assert newest(tmp_path).step == 2 and all(value.isfinite().all() for value in tensors.values())


def test_a_checkpoint_that_is_no_training_state_is_refused(run: Runs, tmp_path: Path) -> None:
    trainer, folder = run(), RunFolder(tmp_path)
    average = trainer.state.average.tensors
    folder.save(1, {}, {WEIGHTS_FILE: average, STATE_FILE: average})
    with pytest.raises(UserError, match=r"unknown tensor .*; it is from a run with other settings; resume with"):
        trainer.state.load(newest(tmp_path))
    for _ in range(2):
        trainer.train_step()
    trainer.save(folder)
    with pytest.raises(UserError, match=r"unknown tensor adamw\..*; it is from a run with other settings"):
        run("training.optimizer=muon", "training.trainable=temporal").state.load(newest(tmp_path))


def test_a_training_state_of_another_model_is_refused(run: Runs, tmp_path: Path) -> None:
    run().save(RunFolder(tmp_path))
    with pytest.raises(UserError, match=r"has shape \(.*\), the model needs \(.*\)"):
        run("model.hidden_size=32").state.load(newest(tmp_path))
