"""Training the package's small autoencoders, before the model is trained.

Shapes: N frames, C channels, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ca2vdm_cli.autoencoder import ConvAutoencoder
from ca2vdm_cli.config import TrainingConfig
from ca2vdm_cli.data import ClipSource

CROP_LATENTS = 5
"""Side of a training crop in latent pixels."""
DECODER_SHARE = 0.2
"""Share of the steps that train the decoder alone, on whole frames, with the latents as they will be."""
WARMUP_STEPS = 50
"""Steps over which the learning rate rises."""


def train_autoencoder(
    autoencoder: ConvAutoencoder,
    source: ClipSource,
    training: TrainingConfig,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train on crops of ``source``, fix the latents' mean and variance, then train the decoder alone on whole frames.

    With a fixed encoder there is the second part only.

    Args:
        training: its ``autoencoder_*`` fields say how long, how fast and how many pictures a step.
        seed: of the noise on latents; the order of the pictures is the source's own.
        progress: called after every step with the number of steps done and the loss.
    """
    side = CROP_LATENTS * autoencoder.downsample
    fixed = not list(autoencoder.encoder.parameters())
    joint_steps = 0 if fixed else round((1 - DECODER_SHARE) * training.autoencoder_steps)
    phases: tuple[tuple[int, int, nn.Module, Callable[[int], Tensor]], ...] = (
        (0, joint_steps, autoencoder.train(), lambda index: source.crop(index, side)),
        (joint_steps, training.autoencoder_steps, autoencoder.decoder, lambda index: source.clip(index, 1).frames[0]),
    )
    noise = torch.Generator().manual_seed(seed)
    for start, end, part, picture in phases:
        if part is autoencoder.decoder:
            _measure_latents(autoencoder, source)
            autoencoder.eval()
        steps = max(1, end - start)
        autoencoder.requires_grad_(False)
        part.requires_grad_(True)
        peak = training.autoencoder_learning_rate
        optimizer = torch.optim.AdamW(part.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warmup_and_cosine, steps=steps))
        for step in range(start, end):
            indices = range(step * training.autoencoder_batch_size, (step + 1) * training.autoencoder_batch_size)
            loss = _loss(autoencoder, torch.stack([picture(index) for index in indices]), noise)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress(step + 1, loss.item())
    autoencoder.requires_grad_(False)


def _warmup_and_cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2


def _loss(autoencoder: ConvAutoencoder, frames: Tensor, noise: torch.Generator) -> Tensor:
    """Squared plus a fifth of the absolute error of (N, C, H, W) frames, reconstructed from perturbed latents."""
    frames = frames.to(next(autoencoder.parameters()).device)
    latents = autoencoder.encode(frames)  # in training mode normalised with the batch's own mean and variance
    latents = latents + autoencoder.latent_noise * torch.randn(latents.shape, generator=noise).to(latents)
    error = autoencoder.reconstruct(latents) - frames
    return error.square().mean() + 0.2 * error.abs().mean()


@torch.no_grad()
def _measure_latents(autoencoder: ConvAutoencoder, source: ClipSource, batches: int = 16, size: int = 64) -> None:
    """Average the latents' mean and variance over whole frames (the batch norm has no momentum: it averages all)."""
    device = next(autoencoder.parameters()).device
    autoencoder.normalize.reset_running_stats()
    for start in range(0, batches * size, size):
        frames = torch.cat([source.clip(index, 1).frames for index in range(start, start + size)])
        autoencoder.encode(frames.to(device))
