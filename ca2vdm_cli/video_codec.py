"""Videos to latents and back, through an autoencoder, a few frames at a time.

Shapes: B videos, T frames, C channels, H and W pixels; c latent channels, h and w latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .errors import UserError

FRAMES_AT_ONCE = 64
"""Frames that are encoded or decoded together; a large autoencoder has large feature maps."""


def to_floats(frames: Tensor) -> Tensor:
    """uint8 pixels (..., H, W, C) -> float32 (..., C, H, W) in [-1, 1]."""
    return frames.movedim(-1, -3).float() / 127.5 - 1


def to_uint8(frames: Tensor) -> Tensor:
    """Floats (..., C, H, W) in [-1, 1] -> uint8 pixels (..., H, W, C)."""
    return ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def encode_video(autoencoder: Autoencoder, frames: Tensor) -> Tensor:
    """Frames (B, T, C, H, W) in [-1, 1] -> latents (B, c, T, h, w) float32.

    Raises:
        UserError: a latent is NaN or infinite.
    """
    parts = frames.flatten(0, 1).split(FRAMES_AT_ONCE)
    latents = torch.cat([autoencoder.encode(part) for part in parts]).unflatten(0, frames.shape[:2])
    _check_finite(latents, 0, "latents")
    return latents.float().transpose(1, 2)


def decode_video(autoencoder: Autoencoder, latents: Tensor, first_frame: int = 0) -> Tensor:
    """Latents (B, c, T, h, w) -> uint8 pixels (B, T, H, W, C), on the latents' device.

    Args:
        autoencoder: what decodes them.
        latents: of one or several videos.
        first_frame: number of their first frame, for errors.

    Raises:
        UserError: a pixel is NaN or infinite. As uint8 it would be black.
    """
    frames = latents.transpose(1, 2)
    decoded = [autoencoder.decode(part) for part in frames.flatten(0, 1).split(FRAMES_AT_ONCE)]
    pixels = torch.cat([to_uint8(part) for part in decoded])
    if not all(part.sum().isfinite() for part in decoded):  # a sum is the cheapest check, but may overflow
        _check_finite(torch.cat(decoded).unflatten(0, frames.shape[:2]), first_frame, "pixels")
    return pixels.unflatten(0, frames.shape[:2])


def _check_finite(values: Tensor, first_frame: int, what: str) -> None:
    """Raise if frames (B, T, ...) contain NaN or infinity."""
    finite = values.isfinite().flatten(2).all(2).all(0)  # (T,)
    if not finite.all():
        frame = first_frame + int((~finite).int().argmax())
        raise UserError(f"frame {frame}: the autoencoder's {what} are not finite; check its weights")
