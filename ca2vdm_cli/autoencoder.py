"""Autoencoders between frames and latents: two small convolutional ones, and ``AutoencoderKL`` of diffusers.

Shapes: N frames, C channels, H and W pixels; c latent channels, h = H / downsample, w = W / downsample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import check_finite_weights, load_tensors, load_weights, save_tensors
from .config import AutoencoderConfig, VideoConfig
from .errors import UsageError, UserError
from .plugins import Registry
from .plugins import autoencoders as _autoencoders

ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3
"""Residual blocks at each of the two resolutions."""


class Autoencoder(nn.Module):
    """Encodes frames to latents of about unit standard deviation, and decodes them; both are deterministic.

    Subclass it and register the class (hook ``ca2vdm_register_autoencoders``).

    Args:
        config: the preset's ``autoencoder`` section.
        video: the preset's ``video`` section.
        in_channels: c, channels of a latent (``model.in_channels``).
    """

    name: ClassVar[str]
    """The value of ``autoencoder.kind`` in a preset."""
    description: ClassVar[str]
    """One line."""
    trained_here: ClassVar[bool] = False
    """Whether ``ca2vdm train`` trains it; true only for the package's small autoencoders."""

    def __init__(self, config: AutoencoderConfig, video: VideoConfig, in_channels: int) -> None:
        super().__init__()

    def encode(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, c, h, w)."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, C, H, W) in [-1, 1]."""
        raise NotImplementedError


class ConvAutoencoder(Autoencoder):
    """A small autoencoder without full-resolution convolutions: pixels are folded into channels first.

    It is local: normalization is over the channels of one position, and padding repeats the border. When an object
    moves by one latent pixel, its latents move along and nothing else changes (except at borders), which is easy for a
    diffusion model to learn; and crops suffice for training. Latents have mean 0 and standard deviation 1 per channel.
    """

    name = "conv"
    description = "the small convolutional autoencoder of this package"
    trained_here = True

    def __init__(self, config: AutoencoderConfig, video: VideoConfig, in_channels: int) -> None:
        super().__init__(config, video, in_channels)
        self.downsample, self.latent_noise = config.downsample, config.latent_noise
        fold = config.downsample // 2
        width, wide, pixels = config.base_channels, 2 * config.base_channels, video.channels * fold**2
        self.encoder = self._make_encoder(config, pixels, in_channels)
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

    @staticmethod
    def _make_encoder(config: AutoencoderConfig, pixels: int, in_channels: int) -> nn.Module:
        width, wide = config.base_channels, 2 * config.base_channels
        return nn.Sequential(  # (N, C, H, W)
            nn.PixelUnshuffle(config.downsample // 2),
            _conv(pixels, width),  # (N, width, 2h, 2w)
            *(ResidualBlock(width) for _ in range(ENCODER_BLOCKS)),
            nn.Conv2d(width, wide, kernel_size=2, stride=2),  # (N, wide, h, w)
            *(ResidualBlock(wide) for _ in range(ENCODER_BLOCKS)),
            ChannelNorm(wide),
            nn.SiLU(),
            _conv(wide, in_channels),  # (N, c, h, w)
        )

    def encode(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, c, h, w)."""
        return self.normalize(self.encoder(frames.contiguous(memory_format=torch.channels_last)))

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, C, H, W) in [-1, 1]."""
        return _clamp(self.reconstruct(latents))

    def reconstruct(self, latents: Tensor) -> Tensor:
        """``decode`` without the clamp, which has no gradient: for training."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))


class LowPassAutoencoder(ConvAutoencoder):
    """A fixed encoder that smooths and downsamples the frames, and a trained decoder that sharpens them.

    Such latents change slowly as objects move, which is even easier for a diffusion model to learn.
    """

    name = "lowpass"
    description = "latents are smoothed frames, which a small network sharpens"

    @staticmethod
    def _make_encoder(config: AutoencoderConfig, pixels: int, in_channels: int) -> nn.Module:
        return LowPass(config.downsample)


class LowPass(nn.Module):
    """Smooths every channel with a quadratic B-spline three latent pixels wide, and samples it at the latent pixels."""

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
    """Two convolutions of the normalized input, added to it. A new block is the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv1 = _conv(width, width)
        self.conv2 = _conv(width, width)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, padding_mode="replicate")


def _clamp(frames: Tensor) -> Tensor:
    """Clamp to [-1, 1]. Infinity becomes NaN, so that a broken decoder is noticed."""
    return (frames * 0 + frames).clamp(-1, 1)


class DiffusersAutoencoder(Autoencoder):
    """An ``AutoencoderKL`` of diffusers, such as Stable Diffusion's; latents are its distribution's mode."""

    name = "diffusers"
    description = "an AutoencoderKL of the diffusers library (extra latent)"

    def __init__(self, config: AutoencoderConfig, video: VideoConfig, in_channels: int) -> None:
        super().__init__(config, video, in_channels)
        assert config.path is not None
        self.model = _load_autoencoder_kl(config.path)
        for setting, theirs, ours in (
            ("model.in_channels", self.model.config.latent_channels, in_channels),
            ("autoencoder.downsample", 2 ** (len(self.model.config.block_out_channels) - 1), config.downsample),
        ):
            if theirs != ours:
                raise UserError(f"{setting}: {ours} does not fit the autoencoder {config.path}; set it to {theirs}")
        self.channels, self.scale_factor = video.channels, config.scale_factor

    def encode(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, c, h, w), times the scale factor."""
        rgb = frames.expand(-1, 3, -1, -1)
        return self.model.encode(rgb).latent_dist.mode() * self.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, C, H, W) in [-1, 1]; gray is the mean of red, green and blue."""
        rgb = self.model.decode(latents / self.scale_factor).sample
        return _clamp(rgb if self.channels == 3 else rgb.mean(1, keepdim=True))


def _load_autoencoder_kl(path: str) -> Any:
    """An ``AutoencoderKL`` from a folder or a hub name, with all of its weights."""
    try:
        from diffusers import AutoencoderKL
        from diffusers.utils import logging
    except ImportError as error:
        raise UserError(
            "autoencoder: this preset needs diffusers, which is not installed; pip install 'ca2vdm[latent]'"
        ) from error
    _check_folder(Path(path))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the errors below say what is wrong
    try:
        model, info = AutoencoderKL.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged folder can make the library raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"autoencoder.path: no AutoencoderKL can be loaded from {path} ({reason}); give a folder with config.json "
            "and safetensors, or a name on the hub"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    own = [name for name, _ in model.named_children()]
    extra = [key for key in info["unexpected_keys"] if key.partition(".")[0] in own or "quant_conv" in key]
    for problem, keys in (("are missing", info["missing_keys"]), ("are of no layer in its config.json", extra)):
        if keys:
            raise UserError(
                f"autoencoder.path: {path} is damaged: {len(keys)} of its weights {problem}, the first is {min(keys)}; "
                "get it again"
            )
    for key, value in model.state_dict().items():
        check_finite_weights(key, value, f"autoencoder.path: {path}")
    return model


def _check_folder(folder: Path) -> None:
    """Name the damaged file of a local folder, which diffusers does not; nothing for a hub name.

    Raises:
        UserError: a file can't be read, or there are no safetensors.
    """
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        names = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "nothing"
        raise UserError(
            f"autoencoder.path: {folder} has no weights as safetensors, but {names}; save the autoencoder again with "
            "safe_serialization=True"
        )
    for file in files:
        load_tensors(file)


autoencoders: Registry[type[Autoencoder]] = _autoencoders
"""All autoencoders, by name."""


def load_autoencoder(
    config: AutoencoderConfig, video: VideoConfig, in_channels: int, weights_path: Path | None = None
) -> Autoencoder:
    """A preset's autoencoder, in evaluation mode and frozen.

    Args:
        config: the preset's ``autoencoder`` section.
        video: the preset's ``video`` section.
        in_channels: channels of a latent, ``model.in_channels``.
        weights_path: a safetensors file with its weights; without it, conv and lowpass get random weights.

    Raises:
        UserError: the preset has no autoencoder, its weights can't be read or do not fit, or diffusers is missing.
    """
    if config.kind == "none":
        raise UsageError("autoencoder: this preset has none; it works on latents only")
    autoencoders.check(config.kind, "autoencoder.kind")
    autoencoder = autoencoders[config.kind](config, video, in_channels)
    if weights_path is not None:
        load_weights(autoencoder, load_tensors(weights_path)[0], f"autoencoder weights: {weights_path}")
    return autoencoder.eval().requires_grad_(False)


def save_autoencoder(autoencoder: Autoencoder, path: Path, steps: int | None = None) -> None:
    """Write the weights as safetensors, in half precision except for the latents' mean and variance.

    ``steps`` says for how many steps they were trained, if that is known.
    """
    state = {
        key: value if key.startswith("normalize.") else value.half() for key, value in autoencoder.state_dict().items()
    }
    save_tensors(path, state, {"format": "pt"} | ({} if steps is None else {"steps": str(steps)}))
