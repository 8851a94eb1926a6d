"""Between frames and latents: the package's small convolutional autoencoders, or an ``AutoencoderKL`` of diffusers.

Shapes: N frames, C channels, H and W pixels; c latent channels, h = H / downsample, w = W / downsample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import save_tensors
from .config import AutoencoderConfig, AutoencoderKind, TrainingConfig, VideoConfig
from .data import ClipSource
from .errors import UsageError, UserError, first_line

ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3
"""Residual blocks at each of the two resolutions."""
CROP_LATENTS = 5
"""Side of a training crop in latent pixels."""
DECODER_SHARE = 0.2
"""Share of the steps that train the decoder alone, on whole frames, with the latents as they will be."""
WARMUP_STEPS = 50
"""Steps over which the learning rate rises."""
FRAMES_AT_ONCE = 64
"""Frames that training and validation encode or decode together: a large autoencoder has large feature maps."""


class Autoencoder(Protocol):
    """What turns frames into latents of about unit standard deviation, and back; both directions are deterministic."""

    def encode(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, c, h, w)."""

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, C, H, W) in [-1, 1]."""


class ConvAutoencoder(nn.Module):
    """A small autoencoder without full-resolution convolutions: pixels are folded into channels first.

    It works locally: every normalisation is over the channels of one place, and padding repeats the border. A thing
    that moves by a latent pixel therefore moves its latents and changes nothing else (but at the borders), which is
    easy to learn for a diffusion model, and training needs crops only. Latents have mean 0 and standard deviation 1
    per channel.

    The encoder is learned (``conv``) or fixed (``lowpass``): latents that are smoothed frames change slowly as things
    move, which is easier still for a diffusion model, and the decoder alone is to be trained.
    """

    def __init__(self, config: AutoencoderConfig, channels: int, in_channels: int) -> None:
        super().__init__()
        self.downsample, self.latent_noise = config.downsample, config.latent_noise
        fold = config.downsample // 2
        width, wide, pixels = config.base_channels, 2 * config.base_channels, channels * fold**2
        self.encoder: nn.Module = LowPass(config.downsample)
        if config.kind is AutoencoderKind.CONV:
            self.encoder = nn.Sequential(  # (N, C, H, W)
                nn.PixelUnshuffle(fold),
                _conv(pixels, width),  # (N, width, 2h, 2w)
                *(ResidualBlock(width) for _ in range(ENCODER_BLOCKS)),
                nn.Conv2d(width, wide, kernel_size=2, stride=2),  # (N, wide, h, w)
                *(ResidualBlock(wide) for _ in range(ENCODER_BLOCKS)),
                ChannelNorm(wide),
                nn.SiLU(),
                _conv(wide, in_channels),  # (N, c, h, w)
            )
        self.normalize = nn.BatchNorm2d(in_channels, affine=False, momentum=None)
        self.decoder = nn.Sequential(
            _conv(in_channels, wide),
            *(ResidualBlock(wide) for _ in range(DECODER_BLOCKS)),
            nn.Conv2d(wide, 4 * width, kernel_size=1),
            nn.PixelShuffle(2),  # (N, width, 2h, 2w)
            *(ResidualBlock(width) for _ in range(DECODER_BLOCKS)),
            ChannelNorm(width),
            nn.SiLU(),
            _conv(width, pixels),
            nn.PixelShuffle(fold),  # (N, C, H, W)
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's annotations

    def encode(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, c, h, w)."""
        return self.normalize(self.encoder(frames.contiguous(memory_format=torch.channels_last)))

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, C, H, W) in [-1, 1]."""
        return self.reconstruct(latents).clamp(-1, 1)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """``decode`` without the clamp, which has no gradient: for training."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))


class LowPass(nn.Module):
    """Smoothes every channel by a quadratic B-spline three latent pixels wide, and takes one value of each."""

    def __init__(self, downsample: int) -> None:
        super().__init__()
        self.downsample = downsample
        box = torch.full((1, 1, downsample), 1 / downsample)
        spline = F.conv1d(F.conv1d(box, box, padding=downsample - 1), box, padding=downsample - 1)[0, 0]
        self.kernel: Tensor
        self.register_buffer("kernel", torch.outer(spline, spline)[None, None], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, h, w)."""
        padded = F.pad(frames, (self.downsample - 1,) * 4, mode="replicate")
        kernel = self.kernel.expand(frames.shape[1], -1, -1, -1)
        return F.conv2d(padded, kernel, stride=self.downsample, groups=frames.shape[1])


class ResidualBlock(nn.Module):
    """Two convolutions on a normalised input, added to it; the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv1 = _conv(width, width)
        self.conv2 = _conv(width, width)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, padding_mode="replicate")


class DiffusersAutoencoder(nn.Module):
    """An ``AutoencoderKL`` of diffusers, such as Stable Diffusion's; latents are the mode of its distribution."""

    def __init__(self, config: AutoencoderConfig, channels: int, in_channels: int) -> None:
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise UserError(
                "autoencoder: diffusers is not installed, and this preset needs it: pip install 'ca2vdm[latent]'"
            ) from error
        try:
            self.model = AutoencoderKL.from_pretrained(config.path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"autoencoder.path: no AutoencoderKL can be loaded from {config.path} ({first_line(error)}); name one "
                "of diffusers, by folder or by its name on the hub"
            ) from error
        for what, theirs, ours in (
            ("model.in_channels", self.model.config.latent_channels, in_channels),
            ("autoencoder.downsample", 2 ** (len(self.model.config.block_out_channels) - 1), config.downsample),
        ):
            if theirs != ours:
                raise UserError(f"{what}: {ours} does not fit the autoencoder {config.path}; set it to {theirs}")
        self.channels, self.scale_factor = channels, config.scale_factor

    def encode(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, c, h, w), times the scale factor."""
        rgb = frames.expand(-1, 3, -1, -1)
        return self.model.encode(rgb).latent_dist.mode() * self.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, C, H, W) in [-1, 1]; gray is the mean of red, green and blue."""
        rgb = self.model.decode(latents / self.scale_factor).sample
        return (rgb if self.channels == 3 else rgb.mean(1, keepdim=True)).clamp(-1, 1)


def load_autoencoder(
    config: AutoencoderConfig, video: VideoConfig, in_channels: int, weights_path: Path | None = None
) -> ConvAutoencoder | DiffusersAutoencoder:
    """The autoencoder of a preset, ready to use (evaluation mode, frozen).

    Args:
        in_channels: channels of a latent, ``model.in_channels``.
        weights_path: the safetensors file of a conv or lowpass autoencoder; without it its weights are random.

    Raises:
        UserError: the weights are missing or do not fit, or diffusers is not installed.
    """
    if config.kind is AutoencoderKind.NONE:
        raise UsageError("autoencoder: this preset has none, it works on latents only")
    autoencoder: ConvAutoencoder | DiffusersAutoencoder
    if config.kind is AutoencoderKind.DIFFUSERS:
        autoencoder = DiffusersAutoencoder(config, video.channels, in_channels)
    else:
        autoencoder = ConvAutoencoder(config, video.channels, in_channels)
        if weights_path is not None:
            _load_weights(autoencoder, weights_path)
    return autoencoder.eval().requires_grad_(False)


def _load_weights(autoencoder: ConvAutoencoder, path: Path) -> None:
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"autoencoder weights: {path} cannot be read ({first_line(error)}); name a safetensors file"
        ) from error
    ours = autoencoder.state_dict()
    for key in sorted(ours.keys() | weights.keys()):
        have, need = (tuple(state[key].shape) if key in state else "nothing" for state in (weights, ours))
        if have != need:
            raise UserError(
                f"autoencoder weights: {path} has {have} at {key}, this preset's autoencoder needs {need}; name the "
                "file it was trained with"
            )
    autoencoder.load_state_dict(weights)


def save_autoencoder(autoencoder: ConvAutoencoder, path: Path) -> None:
    """Write the weights as safetensors, in half precision but for the latents' mean and variance."""
    state = {
        key: value if key.startswith("normalize.") else value.half() for key, value in autoencoder.state_dict().items()
    }
    save_tensors(path, state, {"format": "pt"})


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
        (joint_steps, training.autoencoder_steps, autoencoder.decoder, lambda index: source.clip(index, 1)[0]),
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
        frames = torch.cat([source.clip(index, 1) for index in range(start, start + size)])
        autoencoder.encode(frames.to(device))
