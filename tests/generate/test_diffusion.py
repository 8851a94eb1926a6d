"""The noise process: targets that can be inverted, noise with the right statistics, a correct bound.

Shapes: latents (B, C, T, h, w).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ca2vdm_cli.config import BetaSchedule, DiffusionConfig, Prediction
from ca2vdm_cli.generate.diffusion import NoiseProcess, variational_bound

SHAPE = (3, 4, 2, 4, 4)
TIMESTEPS = torch.tensor([1, 400, 999])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ noise process
KINDS = [(s, p) for s in BetaSchedule for p in Prediction if (s is BetaSchedule.FLOW) == (p is Prediction.FLOW)]
PRESERVING = [BetaSchedule.LINEAR, BetaSchedule.COSINE]


@pytest.mark.parametrize(("schedule", "prediction"), KINDS)
def test_the_target_can_be_split_into_latents_and_noise(schedule: BetaSchedule, prediction: Prediction) -> None:
    process = NoiseProcess(DiffusionConfig(beta_schedule=schedule, prediction=prediction))
    latents, noise = random(*SHAPE), random(*SHAPE, seed=1)
    x = process.add_noise(latents, noise, TIMESTEPS)
    split_latents, split_noise = process.split(process.target(latents, noise, TIMESTEPS), x, TIMESTEPS)
    # with epsilon, x at the last timestep contains no information about the latents
    known = slice(2) if prediction is Prediction.EPSILON else slice(None)
    assert torch.allclose(split_latents[known], latents[known], atol=1e-4)
    assert torch.allclose(split_noise, noise, atol=1e-5)


@pytest.mark.parametrize("schedule", PRESERVING)
def test_noise_grows_from_almost_none_to_almost_pure(schedule: BetaSchedule) -> None:
    alpha, sigma = NoiseProcess(DiffusionConfig(beta_schedule=schedule)).alpha_sigma(torch.arange(1000))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1), atol=1e-6)
    assert (sigma.diff(dim=0) > -1e-7).all() and (alpha.diff(dim=0) < 0).all()
    assert sigma[0] < 0.02 and alpha[-1] < 0.01


def test_flow_matching_paths_are_straight() -> None:
    process = NoiseProcess(DiffusionConfig(beta_schedule=BetaSchedule.FLOW, prediction=Prediction.FLOW))
    alpha, sigma = process.alpha_sigma(torch.arange(1000))
    assert torch.allclose(alpha + sigma, torch.ones(1), atol=1e-6)
    assert sigma[0] < 0.002 and alpha[-1] < 0.002
    assert torch.allclose(sigma.diff(dim=0), sigma.diff(dim=0).mean(), atol=1e-6)
    latents, noise = random(*SHAPE), random(*SHAPE, seed=1)
    early, late = (process.add_noise(latents, noise, torch.tensor([t] * 3)) for t in (200, 700))
    velocity = (late - early) / (sigma[700] - sigma[200])
    assert torch.allclose(velocity, process.target(latents, noise, TIMESTEPS), atol=1e-4)


def test_every_frame_may_have_its_own_timestep() -> None:
    process = NoiseProcess(DiffusionConfig())
    latents, noise, timesteps = random(*SHAPE), random(*SHAPE, seed=1), torch.tensor([[1, 5], [400, 500], [999, 0]])
    together = process.add_noise(latents, noise, timesteps)
    for frame in range(2):
        alone = process.add_noise(latents[:, :, frame : frame + 1], noise[:, :, frame : frame + 1], timesteps[:, frame])
        assert torch.equal(together[:, :, frame : frame + 1], alone)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_progressive_noise_correlates_each_frame_with_the_one_before(alpha: float) -> None:
    process = NoiseProcess(DiffusionConfig(progressive_noise=alpha))
    noise = process.draw_noise((4, 6, 64, 64), torch.Generator().manual_seed(0)).transpose(0, 1).flatten(1)
    assert torch.allclose(noise.std(dim=1), torch.ones(6), atol=0.03)
    share = alpha / (1 + alpha**2) ** 0.5
    lag = torch.arange(6)
    assert torch.allclose(torch.corrcoef(noise), share ** (lag - lag[:, None]).abs(), atol=0.03)


def test_perturbation_has_one_level_per_chunk_counted_from_the_end() -> None:
    process = NoiseProcess(DiffusionConfig(prefix_noise=(50, 100)))
    levels = process.draw_levels(7, 3, torch.Generator().manual_seed(1))
    first, *others = levels.split([1, 3, 3])
    assert all(len(set(part.tolist())) == 1 for part in others)
    assert len({part[0].item() for part in (first, *others)}) == 3
    assert levels.min() >= 50 and levels.max() <= 100
    assert not len(NoiseProcess(DiffusionConfig()).draw_levels(7, 3))


def test_linear_schedule_is_the_published_one() -> None:
    process = NoiseProcess(DiffusionConfig())
    beta = 1 - process.cumulative / torch.cat([torch.ones(1), process.cumulative[:-1]])
    assert torch.allclose(beta[[0, 999]], torch.tensor([1e-4, 2e-2], dtype=torch.float64))
    assert torch.allclose(beta.diff(), beta.diff().mean())


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_timesteps_cover_the_range_and_favour_noise(shift: float) -> None:
    timesteps = NoiseProcess(DiffusionConfig()).draw_timesteps(20_000, shift, torch.Generator().manual_seed(0))
    assert timesteps.dtype == torch.int64 and timesteps.min() == 0 and timesteps.max() == 999
    median = 1000 * shift / (1 + shift)
    assert abs(timesteps.double().median() - median) < 15


# ------------------------------------------------------------------------------------------------ variational bound
@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
def test_the_bound_is_zero_for_the_truth_and_positive_otherwise(prediction: Prediction) -> None:
    process = NoiseProcess(DiffusionConfig(prediction=prediction))
    latents, noise = random(*SHAPE), random(*SHAPE, seed=1)
    x, truth = process.add_noise(latents, noise, TIMESTEPS), process.target(latents, noise, TIMESTEPS)
    smallest = -torch.ones(SHAPE)  # the posterior's variance
    assert variational_bound(process, latents, x, TIMESTEPS, truth, smallest).abs().max() < 1e-4
    assert variational_bound(process, latents, x, TIMESTEPS, truth + 0.3, smallest).mean() > 1e-3
    assert variational_bound(process, latents, x, TIMESTEPS, truth, torch.ones(SHAPE)).mean() > 1e-3


def test_the_bound_is_the_divergence_of_two_gaussians() -> None:
    """Compared with torch.distributions, with the posterior from Bayes' rule instead of DDPM's formula."""
    process, t = NoiseProcess(DiffusionConfig()), 300
    latents, noise, guess, variance = (random(1, 4, 2, 4, 4, seed=seed).double() for seed in range(4))
    before, now = process.cumulative[t - 1 : t + 1]  # x_s = sqrt(before) · latents + ...
    step = now / before  # x_t = sqrt(step) · x_s + ...
    x = now.sqrt() * latents + (1 - now).sqrt() * noise

    def posterior(of: Tensor) -> torch.distributions.Normal:
        precision = 1 / (1 - before) + step / (1 - step)
        mean = (before.sqrt() * of / (1 - before) + step.sqrt() * x / (1 - step)) / precision
        return torch.distributions.Normal(mean, precision**-0.5)

    true = posterior(latents)
    share = (variance + 1) / 2
    log_variance = share * (1 - step).log() + (1 - share) * (true.scale**2).log()
    guessed = posterior((x - (1 - now).sqrt() * guess) / now.sqrt())
    ours = torch.distributions.Normal(guessed.loc, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(true, ours).mean() / torch.log(torch.tensor(2.0))
    arguments = (latents.float(), x.float(), torch.tensor([t]), guess.float(), variance.float())
    assert torch.allclose(variational_bound(process, *arguments).double(), expected, rtol=1e-3)


def test_at_timestep_0_the_bound_is_the_likelihood_of_the_latents() -> None:
    process, zero = NoiseProcess(DiffusionConfig()), torch.zeros(1, dtype=torch.int64)
    latents, noise, largest = random(1, 4, 2, 4, 4), random(1, 4, 2, 4, 4, seed=1), torch.ones(1, 4, 2, 4, 4)
    x = process.add_noise(latents, noise, zero)
    guess = noise + 0.5
    mean, scale = process.split(guess, x, zero)[0], 1e-4**0.5  # the largest variance is beta
    expected = -torch.distributions.Normal(mean, scale).log_prob(latents).mean() / torch.log(torch.tensor(2.0))
    assert torch.allclose(variational_bound(process, latents, x, zero, guess, largest), expected, rtol=1e-3)
