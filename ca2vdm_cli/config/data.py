"""Pixels, latents, captions and data sets."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .base import STRICT, Count, Depth, Size, require


class Split(str, Enum):
    """Which part of a data set to read."""

    TRAIN = "train"
    """The training split; everything if the data set has no splits."""
    TEST = "test"
    """The test split, or else the validation split."""
    ALL = "all"
    """Everything."""


class Crop(str, Enum):
    """How training frames of another shape are fitted to the model's."""

    STRETCH = "stretch"
    """The whole frame, distorted."""
    CROP = "crop"
    """The largest centred region of the model's shape."""
    PAD = "pad"
    """The whole frame between black bars."""
    RANDOM = "random"
    """Like ``crop``, at a random place that is the same for all frames of a clip."""


@dataclass(frozen=True, config=STRICT)
class VideoConfig:
    """Format of the frames."""

    height: Size
    """Height of a frame in pixels."""
    width: Size
    """Width of a frame in pixels."""
    channels: Literal[1, 3] = 3
    """1 for grayscale, 3 for RGB."""
    fps: Annotated[float, Field(gt=0, le=10_000)] = 8.0
    """Frames per second of generated video."""


@dataclass(frozen=True, config=STRICT)
class AutoencoderConfig:
    """The autoencoder that converts between frames and latents."""

    kind: str = "none"
    """The autoencoder: none (the preset works on latents only), conv, lowpass, diffusers, or a plug-in's."""
    path: str | None = None
    """diffusers: a local folder, or a name on the Hugging Face hub."""
    scale_factor: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """diffusers: factor that brings the latents' standard deviation near 1 (0.18215 for Stable Diffusion)."""
    downsample: Annotated[int, Field(ge=2, le=2**10)] = 8
    """Pixels per latent pixel along each side; must be even for conv and lowpass."""
    base_channels: Size = 48
    """conv, lowpass: channels of the feature maps at twice the latents' resolution; there are twice as many at the
    latents' own resolution."""
    latent_noise: Annotated[float, Field(ge=0, le=1e6)] = 0.15
    """conv, lowpass: standard deviation of the noise added to latents (which have standard deviation 1) when training
    the decoder, so that it tolerates a diffusion model's errors."""

    @model_validator(mode="after")
    def _check(self) -> AutoencoderConfig:
        require(
            self.kind not in ("conv", "lowpass") or self.downsample % 2 == 0,
            f"downsample: {self.downsample} must be even for the {self.kind} autoencoder",
        )
        require(
            self.kind != "diffusers" or self.path is not None,
            "path: the diffusers autoencoder needs a local folder or a hub name",
        )
        return self


@dataclass(frozen=True, config=STRICT)
class TextConfig:
    """The T5 encoder of captions and prompts (needs the extra ``latent``)."""

    path: str
    """A local folder, or a name on the Hugging Face hub; its weights must be safetensors."""
    encoder_folder: str = ""
    """Subfolder of the encoder (``text_encoder`` in a diffusers pipeline)."""
    tokenizer_folder: str = ""
    """Subfolder of the tokenizer (``tokenizer`` in a diffusers pipeline)."""


@dataclass(frozen=True, config=STRICT)
class SyntheticDataConfig:
    """The moving-digits generator: handwritten digits that move and bounce off the borders."""

    digits: Depth = 1
    """Number of digits in a frame."""
    images_per_class: Count = 10
    """How many of the shipped handwritten images of each class to use."""
    digit_size: Size = 28
    """Side of a digit's image in pixels; strokes widen in proportion."""
    min_speed: Annotated[float, Field(gt=0, le=1e6)] = 1.5
    """Slowest speed in pixels per frame."""
    max_speed: Annotated[float, Field(gt=0, le=1e6)] = 4.0
    """Fastest speed in pixels per frame."""
    directions: Annotated[int, Field(ge=0, le=2**12)] = 0
    """Number of evenly spaced directions of movement, none parallel to a border (4: the diagonals); 0 for any."""

    @model_validator(mode="after")
    def _check(self) -> SyntheticDataConfig:
        require(
            self.max_speed >= self.min_speed,
            f"max_speed: {self.max_speed} must be at least min_speed {self.min_speed}",
        )
        return self


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """How clips are drawn from a data set."""

    format: str = "auto"
    """Format of the data set: auto (detected from the files), videos, frames, ucf101, bair, moving-mnist, jsonl,
    json, csv, moving-digits (generated, see ``synthetic_data``), or the name of a plug-in's reader."""
    split: Split = Split.TRAIN
    """Which part of the data set to read."""
    split_list: Literal[1, 2, 3] = 1
    """UCF-101: which of the three official train/test lists."""
    stride: Count = 1
    """Distance between consecutive frames of a clip, in frames of the video."""
    crop: Crop = Crop.STRETCH
    """How frames of another shape are fitted to the model's; ``train --aspect`` overrides it."""
    flip: bool = False
    """Mirror half of the clips, left to right."""
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """Worker processes that prepare batches, 0 for none; by default 2 if frames have to be decoded, else 0."""
