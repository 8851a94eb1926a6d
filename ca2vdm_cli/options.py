"""Choices that the command line and the library share. Imports nothing, so that ``--help`` is instant."""

from __future__ import annotations

from enum import Enum


class Dtype(str, Enum):
    """Data type of the model's weights, activations and cache."""

    AUTO = "auto"
    """bfloat16 if the device has native bfloat16 arithmetic, else float32."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Aspect(str, Enum):
    """How frames are fitted to a model with another aspect ratio."""

    CROP = "crop"
    """Keep the largest centred region that has the model's aspect ratio. The output shows only that region, in old and
    new frames alike."""
    PAD = "pad"
    """Add black bars for the model, and cut them off again in the output."""
    STRETCH = "stretch"
    """Stretch frames to the model's size, and back."""
