"""Rollouts in training: the context that generation would produce.

Chunks of 2, window of 6 (see conftest.py). Shapes: latents (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ca2vdm_cli.autoencoder import load_autoencoder
from ca2vdm_cli.config import DiffusionConfig, ModelConfig
from ca2vdm_cli.data import MovingDigits
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import generate
from ca2vdm_cli.generate.samplers import make_sampler
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import backends
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.processes import make_accelerator
from ca2vdm_cli.training.batches import TrainingData
from ca2vdm_cli.training.rollout import self_forcing_rollout
from ca2vdm_cli.training.trainer import Trainer

MakeModel = Callable[..., CausalVideoTransformer]
CHUNK = (4, 2, 4, 4)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(video) for video in range(2)]


def clip(frames: int) -> Tensor:
    return torch.randn(2, 4, frames, 4, 4, generator=torch.Generator().manual_seed(9))


class SameNoise:
    """The noise that a rollout draws, in the same order."""

    def __init__(self) -> None:
        self.generators = generators()

    def chunk(self, index: int) -> None:
        pass

    def initial(self, process: NoiseProcess) -> Tensor:
        return torch.stack([process.draw_noise(CHUNK, generator) for generator in self.generators])

    def step(self, index: int) -> Tensor:
        return torch.stack([torch.randn(CHUNK, generator=generator) for generator in self.generators])

    def perturb(self, process: NoiseProcess, latents: Tensor) -> Tensor:
        rows = zip(latents.split(1), self.generators, strict=True)
        return torch.cat([process.perturb_prefix(row, CHUNK[1], generator) for row, generator in rows])


@pytest.mark.parametrize("perturbed", [None, (50, 100)])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm++"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_at_full_strength_a_rollout_equals_generation(
    prefix: int, sampler: str, perturbed: tuple[int, int] | None, make_model: MakeModel
) -> None:
    model, process = make_model(), NoiseProcess(DiffusionConfig(prefix_noise=perturbed))
    chunks = 6  # five are generated, more than fit the window
    rollout = self_forcing_rollout(
        model, make_sampler(sampler, process, 3), clip(prefix + 10), prefix, chunks, 1.0, generators()
    )
    assert rollout.shape[2] == prefix + 10 and torch.equal(rollout[:, :, :prefix], clip(prefix + 10)[:, :, :prefix])
    context = make_context(model, "cached", 2)
    given = clip(prefix + 10)[:, :, :prefix] if prefix else None
    expected = generate(context, process, make_sampler(sampler, process, 3), SameNoise(), 5, given=given)
    whole = torch.cat([chunk.latents for chunk in expected], dim=2)
    assert torch.allclose(rollout[:, :, prefix:], whole, atol=1e-4 * float(whole.abs().max()))


def test_a_weaker_rollout_keeps_more_of_the_true_chunk(make_config: Callable[..., ModelConfig]) -> None:
    torch.manual_seed(0)
    model = CausalVideoTransformer(make_config(), backends["eager"])  # new: it predicts no noise at all
    process, true = NoiseProcess(DiffusionConfig()), clip(9)
    errors = []
    for strength in (0.05, 0.3, 0.6):
        rollout = self_forcing_rollout(model, make_sampler("ddim", process, 20), true, 1, 4, strength, generators())
        errors.append(float((rollout - true[:, :, :7]).square().mean()))
    assert errors == sorted(errors) and errors[0] < 0.1


def trainer_with(share: float, *overrides: str) -> Trainer:
    """A trainer with this share of rollouts."""
    settings = ["training.parallel_chunks=true", "training.clip_frames=17", f"training.rollout_share={share}"]
    settings += ["training.rollout_steps=2", "training.prefix_lengths=[0]", "training.steps=5"]
    preset = load_preset("tiny", [*settings, *overrides]).config
    assert preset.synthetic_data is not None and preset.video is not None
    torch.manual_seed(0)
    autoencoder = load_autoencoder(preset.autoencoder, preset.video, preset.model.in_channels)
    source = MovingDigits(preset.synthetic_data, preset.video, seed=0)
    accelerator = make_accelerator("cpu", preset.training.precision)
    return Trainer(preset, TrainingData(source, autoencoder), backends["sdpa"], accelerator)


def test_training_on_rollouts_is_reproducible_and_changes_the_weights() -> None:
    def weights(share: float) -> tuple[dict[str, Tensor], float]:
        trainer = trainer_with(share)
        losses = [trainer.train_step().loss for _ in range(5)]  # a new model's branches are zero at first
        return trainer.state.averaged_weights(), losses[-1]

    (first, loss), (again, same), (true, other) = weights(1.0), weights(1.0), weights(0.0)
    assert loss == same != other
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], true[key]) for key in first)


def test_a_sampler_that_rollouts_cannot_use_is_refused_before_the_first_step() -> None:
    with pytest.raises(UsageError, match="sampler: 'none' is not one of"):
        trainer_with(0.1, "sampling.sampler=none")
    assert trainer_with(0.0, "sampling.sampler=none").step == 0  # no rollouts, no sampler
