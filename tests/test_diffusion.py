"""The noise process and the objective: predictions that can be read back, a loss on the right frames, a correct bound.

Chunks of 2, window of 6 (see conftest.py). Shapes: latents (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ca2vdm_cli.config import BetaSchedule, DiffusionConfig, ModelConfig, Prediction
from ca2vdm_cli.diffusion import NoiseProcess, training_loss, variational_bound
from ca2vdm_cli.frame_plan import FrameClock, FramePlan
from ca2vdm_cli.model import CausalVideoTransformer
from ca2vdm_cli.plugins import backends

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., CausalVideoTransformer]

SHAPE = (3, 4, 2, 4, 4)
TIMESTEPS = torch.tensor([1, 400, 999])


class Answering(nn.Module):
    """Stands in for the network: remembers what it was asked, and answers with a parameter of the output's shape."""

    def __init__(self, config: ModelConfig, videos: int) -> None:
        super().__init__()
        self.config = config
        self.answer = nn.Parameter(torch.zeros(videos, config.out_channels, config.chunk_frames, 4, 4))
        self.inputs: Tensor
        self.plan: FramePlan
        self.timestep: Tensor

    def context_plan(self, noisy: int, start: int, clock: FrameClock) -> FramePlan:
        clean, frames = len(clock.context(start)), start + noisy
        positions = torch.tensor([clock.position(f, start) for f in range(frames)])
        return FramePlan(clean, False, positions, torch.ones(frames, frames, dtype=torch.bool))

    def forward(self, inputs: Tensor, timestep: Tensor, plan: FramePlan, text: object = None) -> Tensor:
        self.inputs, self.timestep, self.plan = inputs, timestep.flatten(), plan
        return self.answer


def ask(
    network: Answering, process: NoiseProcess, clip: Tensor, prefix: int, seed: int = 0, **options: float
) -> Tensor:
    """The training loss with the stand-in."""
    generator = torch.Generator().manual_seed(seed)
    return training_loss(network, process, clip, prefix, generator=generator, **options)[0]  # type: ignore[arg-type]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ noise process
@pytest.mark.parametrize("schedule", BetaSchedule)
@pytest.mark.parametrize("prediction", Prediction)
def test_the_target_reads_back_as_latents_and_noise(schedule: BetaSchedule, prediction: Prediction) -> None:
    process = NoiseProcess(DiffusionConfig(beta_schedule=schedule, prediction=prediction))
    latents, noise = random(*SHAPE), random(*SHAPE, seed=1)
    x = process.add_noise(latents, noise, TIMESTEPS)
    found_latents, found_noise = process.split(process.target(latents, noise, TIMESTEPS), x, TIMESTEPS)
    known = (
        slice(None) if prediction is Prediction.V else slice(2)
    )  # at the last timestep x says nothing of the latents
    assert torch.allclose(found_latents[known], latents[known], atol=1e-4)
    assert torch.allclose(found_noise, noise, atol=1e-5)


@pytest.mark.parametrize("schedule", BetaSchedule)
def test_noise_grows_from_nearly_none_to_nearly_all(schedule: BetaSchedule) -> None:
    alpha, sigma = NoiseProcess(DiffusionConfig(beta_schedule=schedule)).alpha_sigma(torch.arange(1000))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1), atol=1e-6)
    assert (sigma.diff(dim=0) > -1e-7).all() and (alpha.diff(dim=0) < 0).all()
    assert sigma[0] < 0.02 and alpha[-1] < 0.01


def test_linear_schedule_is_the_published_one() -> None:
    process = NoiseProcess(DiffusionConfig())
    beta = 1 - process.cumulative / torch.cat([torch.ones(1), process.cumulative[:-1]])
    assert torch.allclose(beta[[0, 999]], torch.tensor([1e-4, 2e-2], dtype=torch.float64))
    assert torch.allclose(beta.diff(), beta.diff().mean())


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_timesteps_cover_the_range_and_lean_towards_noise(shift: float) -> None:
    timesteps = NoiseProcess(DiffusionConfig()).draw_timesteps(20_000, shift, torch.Generator().manual_seed(0))
    assert timesteps.dtype == torch.int64 and timesteps.min() == 0 and timesteps.max() == 999
    median = 1000 * shift / (1 + shift)
    assert abs(timesteps.double().median() - median) < 15


# ------------------------------------------------------------------------------------------------------ the objective
@pytest.mark.parametrize("prefix", [0, 1, 3, 6])
@pytest.mark.parametrize("prediction", Prediction)
def test_the_prefix_goes_in_clean_and_the_loss_is_on_the_chunk(
    prefix: int, prediction: Prediction, make_config: MakeConfig
) -> None:
    process = NoiseProcess(DiffusionConfig(prediction=prediction))
    network = Answering(make_config(learn_variance=False), 3)
    clip = random(3, 4, 8, 4, 4)
    loss = ask(network, process, clip, prefix)
    assert network.plan.clean_frames == prefix and network.inputs.shape[2] == prefix + 2
    assert torch.equal(network.inputs[:, :, :prefix], clip[:, :, :prefix])
    target = clip[:, :, prefix : prefix + 2]
    alpha, sigma = process.alpha_sigma(network.timestep)
    noise = (network.inputs[:, :, prefix:] - alpha * target) / sigma
    assert abs(noise.std() - 1) < 0.2
    assert torch.allclose(loss, process.target(target, noise, network.timestep).square().mean(), rtol=1e-3)
    beyond = clip.clone()
    beyond[:, :, prefix + 2 :] += 1
    assert torch.equal(ask(network, process, beyond, prefix), loss)


def test_a_perturbed_prefix_has_a_little_noise_and_still_timestep_0(make_config: MakeConfig) -> None:
    process = NoiseProcess(DiffusionConfig(prefix_noise=(50, 100)))
    network = Answering(make_config(), 64)
    clip = torch.zeros(64, 4, 8, 4, 4)
    ask(network, process, clip, 6)
    assert network.plan.clean_frames == 6
    _, sigma = process.alpha_sigma(torch.tensor([50, 100]))
    spread = network.inputs[:, :, :6].flatten(1).std(dim=1)  # each video has a level of its own
    assert spread.min() > 0.85 * sigma[0] and spread.max() < 1.15 * sigma[1] and spread.max() > 1.3 * spread.min()


def test_full_clips_start_at_any_position_and_shorter_ones_at_0(make_config: MakeConfig) -> None:
    process, starts = NoiseProcess(DiffusionConfig()), set()
    network = Answering(make_config(), 16)
    for seed in range(4):
        ask(network, process, random(16, 4, 8, 4, 4), 6, seed)
        positions = network.plan.positions
        assert torch.equal((positions - positions[:, :1]) % 8, torch.arange(8).expand(16, -1))
        starts |= set(positions[:, 0].tolist())
    assert starts == set(range(8))
    ask(network, process, random(16, 4, 8, 4, 4), 4)
    assert network.plan.positions.tolist() == list(range(6))
    network = Answering(make_config(temporal_positions="rope"), 16)
    ask(network, process, random(16, 4, 8, 4, 4), 6)
    assert network.plan.positions.tolist() == list(range(8))


def test_full_clips_start_wherever_they_fit_into_a_longer_table(make_config: MakeConfig) -> None:
    network = Answering(make_config(temporal_positions="absolute", position_table=11), 16)
    starts = set()
    for seed in range(4):
        ask(network, NoiseProcess(DiffusionConfig()), random(16, 4, 8, 4, 4), 6, seed)
        assert torch.equal(network.plan.positions - network.plan.positions[:, :1], torch.arange(8).expand(16, -1))
        starts |= set(network.plan.positions[:, 0].tolist())
    assert starts == {0, 1, 2, 3}


def test_the_same_generator_gives_the_same_loss(make_model: MakeModel) -> None:
    process, clip = NoiseProcess(DiffusionConfig(prefix_noise=(50, 100))), random(3, 4, 8, 4, 4)
    losses = [
        training_loss(make_model(), process, clip, 6, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


# ------------------------------------------------------------------------------------------------ variational bound
@pytest.mark.parametrize("prediction", Prediction)
def test_the_bound_is_zero_for_the_truth_and_positive_otherwise(prediction: Prediction) -> None:
    process = NoiseProcess(DiffusionConfig(prediction=prediction))
    latents, noise = random(*SHAPE), random(*SHAPE, seed=1)
    x, truth = process.add_noise(latents, noise, TIMESTEPS), process.target(latents, noise, TIMESTEPS)
    smallest = -torch.ones(SHAPE)  # the posterior's variance
    assert variational_bound(process, latents, x, TIMESTEPS, truth, smallest).abs() < 1e-4
    assert variational_bound(process, latents, x, TIMESTEPS, truth + 0.3, smallest) > 1e-3
    assert variational_bound(process, latents, x, TIMESTEPS, truth, torch.ones(SHAPE)) > 1e-3


def test_the_bound_is_the_divergence_of_two_gaussians() -> None:
    """Against torch.distributions, with the posterior written as Bayes' rule and not as DDPM's formula."""
    process, t = NoiseProcess(DiffusionConfig()), 300
    latents, noise, guess, variance = (random(1, 4, 2, 4, 4, seed=seed).double() for seed in range(4))
    kept = process.cumulative
    step, before = (
        kept[t] / kept[t - 1],
        kept[t - 1],
    )  # x_t = sqrt(step) · x_s + ..., x_s = sqrt(before) · latents + ...
    x = kept[t].sqrt() * latents + (1 - kept[t]).sqrt() * noise

    def posterior(of: Tensor) -> torch.distributions.Normal:
        precision = 1 / (1 - before) + step / (1 - step)
        mean = (before.sqrt() * of / (1 - before) + step.sqrt() * x / (1 - step)) / precision
        return torch.distributions.Normal(mean, precision**-0.5)

    true = posterior(latents)
    share = (variance + 1) / 2
    log_variance = share * (1 - step).log() + (1 - share) * (true.scale**2).log()
    guessed = posterior((x - (1 - kept[t]).sqrt() * guess) / kept[t].sqrt())
    ours = torch.distributions.Normal(guessed.loc, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(true, ours).mean() / torch.log(torch.tensor(2.0))
    arguments = (latents.float(), x.float(), torch.tensor([t]), guess.float(), variance.float())
    assert torch.allclose(variational_bound(process, *arguments).double(), expected, rtol=1e-3)


def test_at_timestep_0_the_bound_is_the_likelihood_of_the_latents() -> None:
    process, zero = NoiseProcess(DiffusionConfig()), torch.zeros(1, dtype=torch.int64)
    latents, noise, largest = random(1, 4, 2, 4, 4), random(1, 4, 2, 4, 4, seed=1), torch.ones(1, 4, 2, 4, 4)
    x = process.add_noise(latents, noise, zero)
    guess = noise + 0.5
    mean, scale = process.split(guess, x, zero)[0], 1e-4**0.5  # the variance at its upper end is beta
    expected = -torch.distributions.Normal(mean, scale).log_prob(latents).mean() / torch.log(torch.tensor(2.0))
    assert torch.allclose(variational_bound(process, latents, x, zero, guess, largest), expected, rtol=1e-3)


def test_the_bound_trains_the_variance_channels_only(make_config: MakeConfig) -> None:
    network, process, clip = Answering(make_config(), 3), NoiseProcess(DiffusionConfig()), random(3, 4, 8, 4, 4)
    gradients = []
    for weight in (0.0, 1e-3):
        network.zero_grad()
        ask(network, process, clip, 3, variance_weight=weight).backward()
        assert network.answer.grad is not None
        gradients.append(network.answer.grad.clone())
    assert torch.equal(gradients[0][:, :4], gradients[1][:, :4])
    assert not gradients[0][:, 4:].any() and (gradients[1][:, 4:] != 0).all()


# -------------------------------------------------------------------------------------------------------- it can learn
@pytest.mark.parametrize("prediction", Prediction)
def test_a_new_model_learns_one_batch(prediction: Prediction, make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    model = CausalVideoTransformer(make_config(), backends()["sdpa"])
    process, clip = NoiseProcess(DiffusionConfig(prediction=prediction)), random(4, 4, 8, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss, terms = training_loss(model, process, clip, 3, generator=torch.Generator().manual_seed(0))
        assert set(terms) == {"mse", "bound"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(terms["mse"])
    assert losses[-1] < 0.1 * losses[0], losses
