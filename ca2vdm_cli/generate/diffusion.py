"""The noise process: how latents are noised, what the network predicts, and the variational bound of a step.

Shape letters: B batch, C channels, T frames, h, w latent size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ca2vdm_cli.config import BetaSchedule, DiffusionConfig, Prediction


def _cumulative_products(config: DiffusionConfig) -> Tensor:
    """(train_timesteps,) float64: the share of the latents' variance that is left at each timestep (alpha²)."""
    n = config.train_timesteps
    if config.beta_schedule is BetaSchedule.LINEAR:
        return torch.cumprod(1 - torch.linspace(1e-4, 2e-2, n, dtype=torch.float64), dim=0)
    edges = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod(1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999), dim=0)


class NoiseProcess:
    """x_t = alpha_t · latent + sigma_t · noise: variance-preserving diffusion, or the straight paths of flow matching.

    Variance-preserving: alpha² + sigma² = 1. Flow matching (Lipman et al. 2023, Liu et al. 2023): alpha + sigma = 1,
    and timestep t of N means sigma = (t + 1) / (N + 1), so that both are always above zero.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        if config.flow:
            n = config.train_timesteps
            self.sigma = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
            self.alpha = 1 - self.sigma
        else:
            cumulative = _cumulative_products(config)
            self.alpha, self.sigma = cumulative.sqrt(), (1 - cumulative).sqrt()
        """(train_timesteps,) float64 each."""
        self.half_log_snr = self.alpha.log() - self.sigma.log()
        """(train_timesteps,) float64: log(alpha / sigma)."""

    @property
    def cumulative(self) -> Tensor:
        """(train_timesteps,) float64: alpha² of a variance-preserving process."""
        return self.alpha**2

    def alpha_sigma(self, timestep: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """alpha and sigma (B, 1, 1 or T, 1, 1) float32 of integer timesteps (B,), or (B, T) with one per frame.

        Keep timesteps on the CPU, where the tables are; looking them up then never waits for a GPU.
        """
        index = timestep.cpu().view(timestep.shape[0], 1, -1, 1, 1)
        return self.alpha[index].float().to(device), self.sigma[index].float().to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) noised to timesteps (B,) or (B, T)."""
        alpha, sigma = self.alpha_sigma(timestep, latents.device)
        return alpha * latents + sigma * noise

    def draw_timesteps(self, count: int, shift: float, generator: torch.Generator | None) -> Tensor:
        """Random timesteps (count,) on the CPU: uniform u, shifted to shift · u / (1 + (shift - 1) · u)."""
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        u = shift * u / (1 + (shift - 1) * u)
        return (u * self.config.train_timesteps).long().clamp(max=self.config.train_timesteps - 1)

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The network's target at timesteps (B,), (B, C, T, h, w)."""
        if self.config.prediction is Prediction.EPSILON:
            return noise
        if self.config.flow:
            return noise - latents
        alpha, sigma = self.alpha_sigma(timestep, latents.device)
        return alpha * noise - sigma * latents

    def split(self, prediction: Tensor, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Convert the network's prediction at x to latents and noise, all (B, C, T, h, w) float32."""
        alpha, sigma = self.alpha_sigma(timestep, x.device)
        if self.config.prediction is Prediction.EPSILON:
            return (x - sigma * prediction) / alpha, prediction
        if self.config.flow:
            return x - sigma * prediction, x + alpha * prediction
        return alpha * x - sigma * prediction, sigma * x + alpha * prediction

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Noise (C, T, h, w) of one chunk on the CPU, standard normal in every frame.

        With progressive noise (Ge et al. 2023), a share alpha / sqrt(1 + alpha²) of each frame's noise is that of the
        frame before.
        """
        noise = torch.randn(shape, generator=generator)
        alpha = self.config.progressive_noise
        if alpha:
            frames = list(noise.unbind(1))
            for i in range(1, len(frames)):
                frames[i] = (alpha * frames[i - 1] + frames[i]) / math.sqrt(1 + alpha**2)
            noise = torch.stack(frames, dim=1)
        return noise

    def draw_levels(self, frames: int, chunk: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps (frames,) of prefix perturbation, the same for each ``chunk`` frames that are written to the cache
        together, counted from the end. Empty if the weights were trained with a clean prefix.
        """
        if self.config.prefix_noise is None:
            return torch.zeros(0, dtype=torch.int64)
        low, high = self.config.prefix_noise
        levels = torch.randint(low, high + 1, (-(-frames // chunk),), generator=generator)
        return levels.repeat_interleave(chunk)[len(levels) * chunk - frames :]

    def perturb_prefix(self, latents: Tensor, chunk: int, generator: torch.Generator | None = None) -> Tensor:
        """One video's clean frames (1, C, T, h, w), slightly noised if the weights were trained that way."""
        levels = self.draw_levels(latents.shape[2], chunk, generator)
        if not len(levels):
            return latents
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return self.add_noise(latents, noise, levels[None]).to(latents.dtype)


def posterior(beta: Tensor, previous: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DDPM's posterior q(x_s | x_t, latents), from the cumulative products at s (previous) and t (current) and beta.

    Returns:
        The factors of the latents and of x_t in the mean, the log variance, and log beta (its upper bound).
    """
    variance = beta * (1 - previous) / (1 - current)
    latent_factor = beta * previous.sqrt() / (1 - current)
    x_factor = (1 - previous) * (1 - beta).sqrt() / (1 - current)
    return latent_factor, x_factor, variance.clamp(min=1e-20).log(), beta.log()


def variational_bound(
    process: NoiseProcess, latents: Tensor, x: Tensor, timestep: Tensor, prediction: Tensor, variance: Tensor
) -> Tensor:
    """The variational bound's term of one step, in bits per dimension (Nichol & Dhariwal 2021), (B,).

    The KL divergence between the true posterior and the model's step; at timestep 0 the Gaussian negative
    log-likelihood of the latents. Only the variance channels should get a gradient: pass a detached prediction.
    """
    cumulative = process.cumulative
    index = timestep.cpu()
    previous = torch.where(index > 0, cumulative[(index - 1).clamp(min=0)], torch.ones_like(cumulative[0]))
    current, view = cumulative[index], (-1, 1, 1, 1, 1)
    latent_factor, x_factor, log_min, log_max = (
        table.view(view).to(x) for table in posterior(1 - current / previous, previous, current)
    )
    first = (index == 0).view(view).to(x.device)
    log_min = torch.where(first, _first_log_variance(process), log_min)
    predicted_latents, _ = process.split(prediction, x, timestep)
    true_mean = latent_factor * latents + x_factor * x
    mean = latent_factor * predicted_latents + x_factor * x
    log_variance = interpolate_variance(variance, log_min, log_max)
    kl = 0.5 * (
        log_variance - log_min - 1 + (log_min - log_variance).exp() + (true_mean - mean) ** 2 / log_variance.exp()
    )
    nll = 0.5 * (math.log(2 * math.pi) + log_variance + (latents - mean) ** 2 * (-log_variance).exp())
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def _first_log_variance(process: NoiseProcess) -> float:
    """Log variance at timestep 0, where the posterior's is 0: that of timestep 1, as in the published code."""
    previous, current = process.cumulative[:2]
    return float(posterior(1 - current / previous, previous, current)[2])


def interpolate_variance(variance: Tensor, log_min: Tensor, log_max: Tensor) -> Tensor:
    """Interpolate the log variance between the posterior's (-1) and beta's (1) by the network's variance channels."""
    share = (variance + 1) / 2
    return share * log_max + (1 - share) * log_min
