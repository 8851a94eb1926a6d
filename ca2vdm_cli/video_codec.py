"""Videos to latents and back, through an autoencoder, a few frames at a time.

Shapes: B videos, T frames, C channels, H and W pixels; c latent channels, h and w latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autoencoder import Autoencoder

FRAMES_AT_ONCE = 64
"""Frames that are encoded or decoded together; a large autoencoder has large feature maps."""


def to_floats(frames: Tensor) -> Tensor:
    """uint8 pixels (..., H, W, C) -> float32 (..., C, H, W) in [-1, 1]."""
    return frames.movedim(-1, -3).float() / 127.5 - 1


def to_uint8(frames: Tensor) -> Tensor:
    """Floats (..., C, H, W) in [-1, 1] -> uint8 pixels (..., H, W, C)."""
    return ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def encode_video(autoencoder: Autoencoder, frames: Tensor) -> Tensor:
    """Frames (B, T, C, H, W) in [-1, 1] -> latents (B, c, T, h, w) float32."""
    parts = frames.flatten(0, 1).split(FRAMES_AT_ONCE)
    latents = torch.cat([autoencoder.encode(part) for part in parts])
    return latents.unflatten(0, frames.shape[:2]).float().transpose(1, 2)


def decode_video(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Latents (B, c, T, h, w) -> uint8 pixels (B, T, H, W, C), on the latents' device."""
    frames = latents.transpose(1, 2)
    parts = frames.flatten(0, 1).split(FRAMES_AT_ONCE)
    return torch.cat([to_uint8(autoencoder.decode(part)) for part in parts]).unflatten(0, frames.shape[:2])
