"""Checks of what the network computes: values that are not finite, and latents that have exploded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ca2vdm_cli.errors import UserError
from ca2vdm_cli.runtime import dtype_name

LARGEST_LATENT = 1e5
"""Latents above this have exploded.

An autoencoder's latents have a standard deviation of about 1, as has the noise. The default weights reach 4.1 in 600
frames; a model after 300 steps of training, which still generates noise, 1,070: at the noisiest timestep a prediction
that is wrong by 1 moves the latents by sigma / alpha, which is 158.
"""


def check_finite(output: Tensor, frame: int, dtype: torch.dtype) -> None:
    """Raise if the model's output contains NaN or infinity, which would be written as black frames or compare as equal.

    Args:
        output: output of the model.
        frame: number of its first frame.
        dtype: the model's dtype.

    Raises:
        UserError: it contains one.
    """
    if not output.isfinite().all():
        raise UserError(f"frame {frame}: the model's output is not finite in {dtype_name(dtype)}; {_advice(dtype)}")


def check_latents(latents: Tensor, first_frame: int, videos: Sequence[int], dtype: torch.dtype) -> None:
    """Raise if finished latents are NaN or infinite, or above ``LARGEST_LATENT``.

    Args:
        latents: (B, C, T, h, w).
        first_frame: number of their first frame.
        videos: the B videos' numbers.
        dtype: the model's dtype.

    Raises:
        UserError: some are; the first such frame is named.
    """
    peaks = latents.abs().amax(dim=(1, 3, 4)).tolist()  # (B, T); NaN stays NaN
    for t in range(latents.shape[2]):
        for video, peak in zip(videos, (row[t] for row in peaks), strict=True):
            if not peak <= LARGEST_LATENT:
                place = f"frame {first_frame + t}" + (f" of video {video}" if len(videos) > 1 else "")
                fault = f"has exploded to {peak:.1e}" if math.isfinite(peak) else "is not finite"
                raise UserError(f"{place}: the model's output {fault} in {dtype_name(dtype)}; {_advice(dtype)}")


def _advice(dtype: torch.dtype) -> str:
    return "use other weights" if dtype is torch.float32 else "try dtype float32, or other weights"
