"""The causal video diffusion transformer: sizes, context, positions and options."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .base import STRICT, Depth, Size, require


class TemporalPositions(str, Enum):
    """How temporal attention tells frames apart in time."""

    CYCLIC = "cyclic"
    """A table that wraps: frame f uses entry f modulo the table's length (the paper's choice)."""
    ROPE = "rope"
    """Rotary embedding of queries and keys at the frame number."""
    ABSOLUTE = "absolute"
    """A table that does not wrap; it limits the video's length."""


class SpatialPrefix(str, Enum):
    """Which clean frames a noisy frame attends to in prefix-enhanced spatial attention."""

    PREV_FRAMES = "prev_frames_k"
    """The last ``spatial_prefix_frames`` clean frames; a clean frame attends to itself only."""
    FIRST_FRAME = "first_frame"
    """Every frame, clean or noisy, attends to the first frame."""
    NONE = "none"
    """The layer is absent."""


class Causality(str, Enum):
    """Which frames a frame attends to in temporal attention."""

    CAUSAL = "causal"
    """A frame attends to itself and earlier frames."""
    PARTIAL = "partial"
    """Clean frames are causal; the noisy frames of a chunk also attend to each other."""


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The causal video diffusion transformer: sizes, context, positions and options."""

    depth: Depth
    """Number of transformer blocks."""
    hidden_size: Size
    """Width D of a token."""
    num_heads: Size
    """Number of attention heads; must divide ``hidden_size``."""
    latent_height: Size
    """Height of a latent frame."""
    latent_width: Size
    """Width of a latent frame."""
    in_channels: Size = 4
    """Channels C of a latent frame."""
    patch_size: Size = 2
    """Side of the square of latent pixels that forms one token."""
    mlp_ratio: Annotated[float, Field(gt=0, le=1024)] = 4.0
    """Width of the MLP's hidden layer, as a multiple of ``hidden_size``."""
    context_frames: Size = 25
    """P_max: the largest number of clean frames that a chunk attends to (the window, and the cache's capacity)."""
    chunk_frames: Size = 8
    """l: number of frames that are denoised together."""
    sink_frames: Annotated[int, Field(ge=0, le=2**16)] = 0
    """The first frames of a video that are never evicted from the cache; they count against ``context_frames``."""
    temporal_positions: TemporalPositions = TemporalPositions.CYCLIC
    """How temporal attention tells frames apart in time."""
    position_table: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Entries of the temporal position table; 0 means ``context_frames + chunk_frames``."""
    spatial_prefix: SpatialPrefix = SpatialPrefix.PREV_FRAMES
    """Which clean frames prefix-enhanced spatial attention attends to."""
    spatial_prefix_frames: Size = 3
    """k: number of clean frames that prefix-enhanced spatial attention attends to (``prev_frames_k`` only)."""
    causality: Causality = Causality.CAUSAL
    """Whether the noisy frames of a chunk attend to each other."""
    mask_channel: bool = False
    """Mark clean frames for the first temporal attention by an extra input channel."""
    text_channels: Annotated[int, Field(ge=0, le=2**16)] = 0
    """Width of the text encoder's embeddings; 0 for a model without text cross-attention."""
    text_tokens: Annotated[int, Field(ge=0, le=2**16)] = 0
    """Tokens per caption, padding included."""
    learn_variance: bool = True
    """Predict C further channels, which interpolate the ancestral sampler's variance."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        self._check_sizes()
        self._check_window()
        self._check_positions()
        require(
            (self.text_channels > 0) == (self.text_tokens > 0),
            f"text_tokens: {self.text_tokens} must be positive exactly when text_channels ({self.text_channels}) is",
        )
        return self

    def _check_sizes(self) -> None:
        require(
            self.hidden_size % self.num_heads == 0,
            f"num_heads: {self.num_heads} must divide hidden_size {self.hidden_size}",
        )
        require(
            self.hidden_size % 4 == 0,
            f"hidden_size: {self.hidden_size} must be a multiple of 4 (2-D sin-cos positions)",
        )
        require(
            int(self.hidden_size * self.mlp_ratio) >= 1,
            f"mlp_ratio: {self.mlp_ratio} must leave the MLP at least one of hidden_size {self.hidden_size} channels",
        )
        for side in ("latent_height", "latent_width"):
            size = getattr(self, side)
            require(size % self.patch_size == 0, f"{side}: {size} must be a multiple of patch_size {self.patch_size}")

    def _check_window(self) -> None:
        require(
            self.chunk_frames <= self.context_frames,
            f"chunk_frames: {self.chunk_frames} must be at most context_frames {self.context_frames}",
        )
        require(
            self.sink_frames <= self.context_frames - self.chunk_frames,
            f"sink_frames: {self.sink_frames} must be at most context_frames - chunk_frames = "
            f"{self.context_frames - self.chunk_frames}",
        )
        require(
            self.spatial_prefix is not SpatialPrefix.PREV_FRAMES
            or self.spatial_prefix_frames <= self.context_frames - self.sink_frames,
            f"spatial_prefix_frames: {self.spatial_prefix_frames} must be at most context_frames - sink_frames = "
            f"{self.context_frames - self.sink_frames}",
        )

    def _check_positions(self) -> None:
        rope = self.temporal_positions is TemporalPositions.ROPE
        require(
            rope or self.table_length >= self.window_frames,
            f"position_table: {self.table_length} must hold context_frames + chunk_frames = {self.window_frames} "
            f"frames with {self.temporal_positions.value} positions",
        )
        require(
            not rope or self.head_size % 2 == 0,
            f"num_heads: rope positions need an even head size, not {self.head_size}",
        )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def tokens_per_frame(self) -> int:
        """S: tokens per latent frame."""
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
