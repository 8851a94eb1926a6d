"""The causal video diffusion transformer: sizes, context, positions and options."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .base import STRICT, Count


class TemporalPositions(str, Enum):
    """How a frame's place in time enters temporal attention."""

    CYCLIC = "cyclic"
    """A table that wraps: frame f uses entry f modulo the table's length (the paper's choice)."""
    ROPE = "rope"
    """Rotary embedding of queries and keys at the frame number."""
    ABSOLUTE = "absolute"
    """A table that does not wrap; the video cannot outgrow it."""


class SpatialPrefix(str, Enum):
    """What a noisy frame sees of the clean frames in prefix-enhanced spatial attention."""

    PREV_FRAMES = "prev_frames_k"
    """The tokens of the last ``spatial_prefix_frames`` clean frames; a clean frame sees its own tokens."""
    FIRST_FRAME = "first_frame"
    """Every frame, clean or noisy, sees the first frame."""
    NONE = "none"
    """The layer is absent."""


class Causality(str, Enum):
    """Who sees whom in temporal attention."""

    CAUSAL = "causal"
    """A frame sees itself and earlier frames."""
    PARTIAL = "partial"
    """Clean frames are causal; the noisy frames of one chunk also see each other."""


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The causal video diffusion transformer: sizes, context, positions and options."""

    depth: Count
    """Number of transformer blocks."""
    hidden_size: Count
    """Width D of a token."""
    num_heads: Count
    """Attention heads; they divide ``hidden_size``."""
    latent_height: Count
    """Height of a latent frame."""
    latent_width: Count
    """Width of a latent frame."""
    in_channels: Count = 4
    """Channels C of a latent frame."""
    patch_size: Count = 2
    """Side of the square of latent pixels that becomes one token."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Width of the MLP's hidden layer, as a multiple of ``hidden_size``."""
    context_frames: Count = 25
    """P_max: how many clean frames a chunk sees at most (the window, the capacity of the cache)."""
    chunk_frames: Count = 8
    """l: how many frames are denoised together."""
    sink_frames: Annotated[int, Field(ge=0)] = 0
    """How many of the video's first frames are never evicted from the cache; they count against ``context_frames``."""
    temporal_positions: TemporalPositions = TemporalPositions.CYCLIC
    """How frames are told apart in time."""
    position_table: Annotated[int, Field(ge=0)] = 0
    """Entries of the temporal position table; 0 means ``context_frames + chunk_frames``."""
    spatial_prefix: SpatialPrefix = SpatialPrefix.PREV_FRAMES
    """What prefix-enhanced spatial attention looks at."""
    spatial_prefix_frames: Count = 3
    """k: clean frames that prefix-enhanced spatial attention looks at (``prev_frames_k`` only)."""
    causality: Causality = Causality.CAUSAL
    """Whether the noisy frames of a chunk see each other."""
    mask_channel: bool = False
    """Tell the first temporal attention which frames are clean through an extra input channel."""
    text_channels: Annotated[int, Field(ge=0)] = 0
    """Width of the text encoder's embeddings; 0 leaves out text cross-attention."""
    text_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of a caption, padding included."""
    learn_variance: bool = True
    """Predict C further channels that interpolate the variance of the ancestral sampler."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        need(
            self.hidden_size % self.num_heads == 0,
            f"num_heads: {self.num_heads} must divide hidden_size {self.hidden_size}",
        )
        need(
            self.hidden_size % 4 == 0,
            f"hidden_size: {self.hidden_size} must be a multiple of 4 (2-D sin-cos positions)",
        )
        for side in ("latent_height", "latent_width"):
            size = getattr(self, side)
            need(size % self.patch_size == 0, f"{side}: {size} must be a multiple of patch_size {self.patch_size}")
        need(
            self.chunk_frames <= self.context_frames,
            f"chunk_frames: {self.chunk_frames} must be at most context_frames {self.context_frames}",
        )
        need(
            self.sink_frames <= self.context_frames - self.chunk_frames,
            f"sink_frames: {self.sink_frames} must be at most context_frames - chunk_frames = "
            f"{self.context_frames - self.chunk_frames}",
        )
        need(
            self.spatial_prefix is not SpatialPrefix.PREV_FRAMES
            or self.spatial_prefix_frames <= self.context_frames - self.sink_frames,
            f"spatial_prefix_frames: {self.spatial_prefix_frames} must be at most context_frames - sink_frames = "
            f"{self.context_frames - self.sink_frames}",
        )
        need(
            self.table_length >= self.context_frames + self.chunk_frames
            or self.temporal_positions is TemporalPositions.ROPE,
            f"position_table: {self.table_length} must hold context_frames + chunk_frames = "
            f"{self.context_frames + self.chunk_frames} frames with {self.temporal_positions.value} positions",
        )
        need(
            self.temporal_positions is not TemporalPositions.ROPE or self.head_size % 2 == 0,
            f"num_heads: rope positions need an even head size, not {self.head_size}",
        )
        need(
            (self.text_channels > 0) == (self.text_tokens > 0),
            f"text_tokens: {self.text_tokens} must be positive exactly when text_channels ({self.text_channels}) is",
        )
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def tokens_per_frame(self) -> int:
        """S: tokens of one latent frame."""
        return (self.latent_height // self.patch_size) * (self.latent_width // self.patch_size)

    @property
    def chunk_shape(self) -> tuple[int, int, int, int]:
        """Shape (C, l, h, w) of one chunk of latent frames."""
        return self.in_channels, self.chunk_frames, self.latent_height, self.latent_width

    @property
    def spatial_slots(self) -> int:
        """K: clean frames that prefix-enhanced spatial attention looks at, at most; 0 if the layer is absent."""
        return {
            SpatialPrefix.PREV_FRAMES: self.spatial_prefix_frames,
            SpatialPrefix.FIRST_FRAME: 1,
            SpatialPrefix.NONE: 0,
        }[self.spatial_prefix]

    @property
    def window_frames(self) -> int:
        """Frames of a full window and a chunk: P_max + l."""
        return self.context_frames + self.chunk_frames

    @property
    def table_length(self) -> int:
        """Entries of the temporal position table (33 in the paper)."""
        return self.position_table or self.window_frames

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: the prediction and, with ``learn_variance``, the variance."""
        return self.in_channels * (2 if self.learn_variance else 1)
