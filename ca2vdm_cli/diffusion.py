"""The noise process and the training objective: clean prefix at timestep 0, loss on the noisy chunk (section 3.2).

Shape letters: B batch, C channels, T frames, h, w latent size.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import BetaSchedule, DiffusionConfig, Prediction, TemporalPositions
from .frame_plan import FrameClock
from .model import CausalVideoTransformer


def _cumulative_products(config: DiffusionConfig) -> Tensor:
    """(train_timesteps,) float64: how much of the latent's variance is left at each timestep."""
    n = config.train_timesteps
    if config.beta_schedule is BetaSchedule.LINEAR:
        return torch.cumprod(1 - torch.linspace(1e-4, 2e-2, n, dtype=torch.float64), dim=0)
    edges = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod(1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999), dim=0)


class NoiseProcess:
    """Variance-preserving diffusion: x_t = alpha_t · latent + sigma_t · noise, alpha² + sigma² = 1."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.cumulative = _cumulative_products(config)
        """(train_timesteps,) float64: alpha²."""
        self.half_log_snr = 0.5 * (self.cumulative.log() - (1 - self.cumulative).log())
        """(train_timesteps,) float64: log(alpha / sigma)."""

    def alpha_sigma(self, timestep: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """alpha and sigma (B, 1, 1, 1, 1) float32 of integer timesteps (B,).

        Timesteps are best kept on the CPU, where the table is: looking them up then never waits for a GPU.
        """
        kept = self.cumulative[timestep.cpu()][:, None, None, None, None]
        return kept.sqrt().float().to(device), (1 - kept).sqrt().float().to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents (B, C, T, h, w) as they look at timesteps (B,)."""
        alpha, sigma = self.alpha_sigma(timestep, latents.device)
        return alpha * latents + sigma * noise

    def draw_timesteps(self, count: int, shift: float, generator: torch.Generator | None) -> Tensor:
        """Random timesteps (count,) on the CPU: uniform u, moved towards noise as shift · u / (1 + (shift - 1) · u)."""
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        u = shift * u / (1 + (shift - 1) * u)
        return (u * self.config.train_timesteps).long().clamp(max=self.config.train_timesteps - 1)

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the network should predict."""
        if self.config.prediction is Prediction.EPSILON:
            return noise
        alpha, sigma = self.alpha_sigma(timestep, latents.device)
        return alpha * noise - sigma * latents

    def split(self, prediction: Tensor, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The (latent, noise) that a prediction at x stands for, all (B, C, T, h, w) float32."""
        alpha, sigma = self.alpha_sigma(timestep, x.device)
        if self.config.prediction is Prediction.EPSILON:
            return (x - sigma * prediction) / alpha, prediction
        return alpha * x - sigma * prediction, sigma * x + alpha * prediction

    def perturb_prefix(self, latents: Tensor, chunk: int, generator: torch.Generator | None = None) -> Tensor:
        """Clean frames (B, C, T, h, w) with a little noise, as the weights expect them, where they were trained so.

        The level is drawn once for every ``chunk`` frames, counted from the end: as frames are written to the cache.
        """
        if self.config.prefix_noise is None or not latents.shape[2]:
            return latents
        low, high = self.config.prefix_noise
        sizes = [latents.shape[2] % chunk, *[chunk] * (latents.shape[2] // chunk)]
        parts = []
        for part in latents.split(sizes, dim=2):
            level = torch.randint(low, high + 1, (latents.shape[0],), generator=generator)
            noise = torch.randn(part.shape, generator=generator).to(latents)
            parts.append(self.add_noise(part, noise, level).to(latents.dtype))
        return torch.cat(parts, dim=2)


def training_loss(
    model: CausalVideoTransformer,
    process: NoiseProcess,
    clip: Tensor,
    prefix: int,
    *,
    chunks: int = 1,
    timestep_shift: float = 1.0,
    variance_weight: float = 1e-3,
    generator: torch.Generator | None = None,
    text: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clean-prefix objective on one batch.

    Args:
        model: the network.
        process: its noise process.
        clip: latents (B, C, T, h, w), T at least prefix + chunks · l; what is beyond is left out.
        prefix: clean frames P before the first chunk; clean frames carry timestep 0.
        chunks: J; the loss is on the J chunks of l frames after the prefix, each conditioned on the clean frames before
            it and noised to a timestep of its own. They share one pass over the clean frames.
        timestep_shift: above 1, noisier timesteps are drawn more often.
        variance_weight: weight of the variational bound (0.001 in Nichol & Dhariwal 2021).
        generator: CPU generator of timesteps, noise and position offsets.
        text: embedding (B, M, text_channels) and mask (B, M) for models with text.

    Returns:
        The loss, mean over the chunks, and its terms by name for the log.
    """
    config = model.config
    batch, chunk = clip.shape[0], config.chunk_frames
    frames = prefix + chunks * chunk
    clean = clip[:, :, : frames - chunk]
    latents = _by_chunk(clip[:, :, prefix:frames], chunks)  # (B*J, C, l, h, w)
    timestep = process.draw_timesteps(batch * chunks, timestep_shift, generator)
    noise = torch.randn(latents.shape, generator=generator).to(clip.device)
    x = process.add_noise(latents, noise, timestep)

    clock = FrameClock(config, sink_frames=None if chunks > 1 else 0)
    plan = model.context_plan(chunk, prefix, clock) if chunks == 1 else model.parallel_plan(prefix, chunks, clock)
    if frames >= clock.slots and config.temporal_positions is not TemporalPositions.ROPE:
        # full clips start anywhere: in a table that wraps at every entry, in one that does not where they still fit
        cyclic = config.temporal_positions is TemporalPositions.CYCLIC
        starts = clock.table if cyclic else clock.table - frames + 1
        offset = torch.randint(starts, (batch, 1), generator=generator).to(clip.device)
        plan = replace(plan, positions=(plan.positions + offset) % clock.table)
    keys_values = model.text_keys_values(*text) if text is not None else []

    noisy = x.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)  # (B, C, J*l, h, w)
    inputs = torch.cat([process.perturb_prefix(clean, chunk, generator), noisy], dim=2)
    steps = timestep.view(batch, chunks).to(clip.device)
    out = _by_chunk(model(inputs, steps, plan, text=keys_values).float(), chunks)
    prediction, variance = out[:, : config.in_channels], out[:, config.in_channels :]
    mse = F.mse_loss(prediction, process.target(latents, noise, timestep))
    terms = {"mse": mse.item()}
    loss = mse
    if config.learn_variance:
        bound = variational_bound(process, latents, x, timestep, prediction.detach(), variance)
        loss = mse + variance_weight * process.config.train_timesteps * bound
        terms["bound"] = bound.item()
    return loss, terms


def _by_chunk(x: Tensor, chunks: int) -> Tensor:
    """(B, C, J*l, h, w) -> (B*J, C, l, h, w): every chunk is noised and judged on its own."""
    return x.unflatten(2, (chunks, -1)).transpose(1, 2).flatten(0, 1)


def posterior(beta: Tensor, previous: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q(x_s | x_t, latent) of DDPM, by the cumulative products at s (previous) and t (current), and beta between them.

    Returns:
        Factors of latent and x_t in the mean, the log of its variance, and the log of beta (its upper bound).
    """
    variance = beta * (1 - previous) / (1 - current)
    latent_factor = beta * previous.sqrt() / (1 - current)
    x_factor = (1 - previous) * (1 - beta).sqrt() / (1 - current)
    return latent_factor, x_factor, variance.clamp(min=1e-20).log(), beta.log()


def variational_bound(
    process: NoiseProcess, latents: Tensor, x: Tensor, timestep: Tensor, prediction: Tensor, variance: Tensor
) -> Tensor:
    """One step's term of the variational bound in bits per dimension (Nichol & Dhariwal 2021), mean over the batch.

    KL divergence of the model's step from the true posterior; at timestep 0 the Gaussian negative log-likelihood of the
    latents. Only the variance channels get a gradient: pass the prediction detached.
    """
    kept = process.cumulative
    index = timestep.cpu()
    previous = torch.where(index > 0, kept[(index - 1).clamp(min=0)], torch.ones_like(kept[0]))
    view = (-1, 1, 1, 1, 1)
    latent_factor, x_factor, log_min, log_max = (
        table.view(view).to(x) for table in posterior(1 - kept[index] / previous, previous, kept[index])
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
    return torch.where(first, nll, kl).mean() / math.log(2)


def _first_log_variance(process: NoiseProcess) -> float:
    """The posterior's variance is 0 at timestep 0; the published code uses that of timestep 1 there."""
    previous, current = process.cumulative[:2]
    return float(posterior(1 - current / previous, previous, current)[2])


def interpolate_variance(variance: Tensor, log_min: Tensor, log_max: Tensor) -> Tensor:
    """Log variance between the posterior's and beta's, by the network's channels in [-1, 1]."""
    share = (variance + 1) / 2
    return share * log_max + (1 - share) * log_min
