"""Pixels, latents, captions and data sets."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .base import STRICT, Count


class Split(str, Enum):
    """Which part of a data set is read."""

    TRAIN = "train"
    """What is meant for training; everything where the data set has no parts."""
    TEST = "test"
    """What is meant for testing."""
    ALL = "all"
    """Everything."""


class Crop(str, Enum):
    """How a training frame of another shape is brought to the model's."""

    STRETCH = "stretch"
    """The whole frame, distorted."""
    CROP = "crop"
    """The largest centred region of the model's shape."""
    PAD = "pad"
    """The whole frame between black bars."""
    RANDOM = "random"
    """As ``crop``, at a random place that is the same for all frames of a clip."""


@dataclass(frozen=True, config=STRICT)
class VideoConfig:
    """The pixels that go in and come out."""

    height: Count
    """Height of a frame in pixels."""
    width: Count
    """Width of a frame in pixels."""
    channels: Literal[1, 3] = 3
    """1 for gray, 3 for RGB."""
    fps: Annotated[float, Field(gt=0)] = 8.0
    """Frames per second of generated video."""


@dataclass(frozen=True, config=STRICT)
class AutoencoderConfig:
    """What turns frames into latents and back."""

    kind: str = "none"
    """Which autoencoder: none (the preset works on latents only), conv, lowpass, diffusers, or one of a plug-in."""
    path: str | None = None
    """diffusers: a local folder or a hub name."""
    scale_factor: Annotated[float, Field(gt=0)] = 1.0
    """Latents are multiplied by this so that their standard deviation is near 1 (0.18215 for the SD autoencoder)."""
    downsample: Annotated[int, Field(ge=2)] = 8
    """Pixels per latent pixel along each side (conv, lowpass: an even number)."""
    base_channels: Count = 48
    """conv, lowpass: width of the feature maps at twice the latents' size; at the latents' size they are twice as
    wide."""
    latent_noise: Annotated[float, Field(ge=0)] = 0.15
    """conv, lowpass: standard deviation of the noise on latents (whose own is 1) in training, so that the decoder
    learns to forgive a diffusion model's errors."""

    @model_validator(mode="after")
    def _check(self) -> AutoencoderConfig:
        if self.kind in ("conv", "lowpass") and self.downsample % 2:
            raise ValueError(f"downsample: {self.downsample} must be even for the {self.kind} autoencoder")
        if self.kind == "diffusers" and self.path is None:
            raise ValueError("path: the diffusers autoencoder needs a local folder or a hub name")
        return self


@dataclass(frozen=True, config=STRICT)
class TextConfig:
    """The T5 encoder that turns captions and prompts into embeddings (extra ``latent``)."""

    path: str
    """A local folder or a hub name; its weights are safetensors."""
    encoder_folder: str = ""
    """Folder of the encoder in it (``text_encoder`` in a pipeline of diffusers)."""
    tokenizer_folder: str = ""
    """Folder of the tokenizer in it (``tokenizer`` in a pipeline of diffusers)."""


@dataclass(frozen=True, config=STRICT)
class SyntheticDataConfig:
    """The moving-digits generator: handwritten digits that drift and bounce off the borders."""

    digits: Count = 1
    """Digits in a frame."""
    images_per_class: Count = 10
    """How many handwritten images of each class are used, of those shipped with the package."""
    digit_size: Count = 28
    """Side of a digit's image in pixels; the strokes' width grows with it."""
    min_speed: Annotated[float, Field(gt=0)] = 1.5
    """Slowest speed in pixels per frame."""
    max_speed: Annotated[float, Field(gt=0)] = 4.0
    """Fastest speed in pixels per frame."""
    directions: Annotated[int, Field(ge=0)] = 0
    """How many directions digits move in, evenly spread, none along a border (4 are the diagonals); 0 for any."""

    @model_validator(mode="after")
    def _check(self) -> SyntheticDataConfig:
        if self.max_speed < self.min_speed:
            raise ValueError(f"max_speed: {self.max_speed} must be at least min_speed {self.min_speed}")
        return self


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """How clips are drawn from a data set."""

    format: str = "auto"
    """How the data set lies on disk: auto (guessed from the files), videos, frames, ucf101, bair, moving-mnist, jsonl,
    moving-digits (made by ``synthetic_data``), or the format of a plug-in's reader."""
    split: Split = Split.TRAIN
    """Which part of the data set is read."""
    split_list: Literal[1, 2, 3] = 1
    """UCF-101: which of the three official train/test lists."""
    stride: Count = 1
    """Frames of the video from one frame of a clip to the next."""
    crop: Crop = Crop.STRETCH
    """How a frame of another shape is brought to the model's; ``train --aspect`` overrides it."""
    flip: bool = False
    """Mirror half of the clips, left to right."""
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """Processes that make batches ahead, 0 for none; by default 2 where frames are decoded, else none."""
