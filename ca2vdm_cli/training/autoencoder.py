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
"""Side of a training crop, in latent pixels."""
DECODER_SHARE = 0.2
"""Share of the steps, the last ones, that train only the decoder, on whole frames and with the final latents."""
WARMUP_STEPS = 50
"""Steps over which the learning rate rises to its peak."""


def train_autoencoder(
    autoencoder: ConvAutoencoder,
    source: ClipSource,
    training: TrainingConfig,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train on crops of ``source``, fix the latents' mean and variance, then train only the decoder on whole frames.

    If the encoder has no weights, only the second part takes place.

    Args:
        autoencoder: trained in place.
        source: where the frames come from.
        training: its ``autoencoder_*`` fields set steps, learning rate and batch size.
        seed: seed of the noise on latents; the order of the frames is the source's own.
        progress: called after every step with the number of steps done and the loss.
    """
    side = CROP_LATENTS * autoencoder.downsample
    fixed_encoder = not list(autoencoder.encoder.parameters())
    joint_steps = 0 if fixed_encoder else round((1 - DECODER_SHARE) * training.autoencoder_steps)
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
    """Learning rate at a step, as a share of the peak."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2


def _loss(autoencoder: ConvAutoencoder, frames: Tensor, noise: torch.Generator) -> Tensor:
    """Squared error plus 0.2 times the absolute error of (N, C, H, W) frames reconstructed from noisy latents."""
    frames = frames.to(next(autoencoder.parameters()).device)
    latents = autoencoder.encode(frames)  # in training mode, normalized with the batch's mean and variance
    latents = latents + autoencoder.latent_noise * torch.randn(latents.shape, generator=noise).to(latents)
    error = autoencoder.reconstruct(latents) - frames
    return error.square().mean() + 0.2 * error.abs().mean()


@torch.no_grad()
def _measure_latents(autoencoder: ConvAutoencoder, source: ClipSource, batches: int = 16, size: int = 64) -> None:
    """Average the latents' mean and variance over whole frames (a batch norm without momentum averages all batches)."""
    device = next(autoencoder.parameters()).device
    autoencoder.normalize.reset_running_stats()
    for start in range(0, batches * size, size):
        frames = torch.cat([source.clip(index, 1).frames for index in range(start, start + size)])
        autoencoder.encode(frames.to(device))
