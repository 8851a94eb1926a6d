"""The cache queue: keys and values of finished frames, computed once and read by every later denoising step.

Ca2-VDM, section 3.3 (arXiv 2411.16375). The temporal queue is a ring of ``context_frames + chunk_frames`` slots: the
slots a chunk takes are those of the frames that have just left the window. A noisy chunk puts its keys there while it is
denoised, the clean write goes to the same place afterwards, and nothing is ever moved.

Shape letters: B batch, T frames of this forward, S tokens a frame, H heads, E head size, R slots of the temporal ring,
K frames of the spatial prefix, M text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Causality, ModelConfig, SpatialPrefix, TemporalPositions
from .errors import UsageError


class LayerCache(NamedTuple):
    """One block's share of the cache. The spatial pair is None where the model has no prefix-enhanced attention."""

    temporal_k: Tensor  # (B*S, H, R, E)
    temporal_v: Tensor  # (B*S, H, R, E)
    spatial_k: Tensor | None  # (B, H, K, S, E)
    spatial_v: Tensor | None  # (B, H, K, S, E)


class TextKeysValues(NamedTuple):
    """One block's keys and values of the caption, the same for every step of every chunk."""

    k: Tensor  # (B, H, M, E)
    v: Tensor  # (B, H, M, E)
    mask: Tensor  # (B, 1, 1, M), True at real tokens


@dataclass(frozen=True)
class FramePlan:
    """How the T frames of one forward relate to time, to each other and to the cache. The same for all blocks."""

    clean_frames: int
    """The first so many frames are clean; the others are noisy."""
    positions: Tensor
    """(T,) or (B, T) int64: entries of the position table, or frame numbers for rope."""
    temporal_mask: Tensor
    """(T, K) bool: which frames a frame sees; K is T without a cache and R with one."""
    slots: Tensor | None = None
    """(T,) int64: where the frames' temporal keys go in the ring; None without a cache."""
    spatial_source: Tensor | None = None
    """int64: which of the T frames are written to the spatial cache..."""
    spatial_slots: Tensor | None = None
    """...and into which of its K slots."""
    spatial_mask: Tensor | None = None
    """(1, K*S) bool: which cached tokens a noisy frame sees."""
    has_prefix: Tensor | None = None
    """() bool: whether any clean frame exists; without one, prefix-enhanced attention adds nothing."""


class FrameClock:
    """Where frame f of a video sits: its slot in the ring, its temporal position, and what a chunk can see.

    Args:
        config: the model.
        context_frames: window in frames, at most what the position table allows; the model's own by default.
        sink_frames: first frames that always stay in the window; the model's own by default.

    Raises:
        UsageError: a window that the model's positions can't express.
    """

    def __init__(self, config: ModelConfig, context_frames: int | None = None, sink_frames: int | None = None) -> None:
        self.kind = config.temporal_positions
        self.context_frames = config.context_frames if context_frames is None else context_frames
        self.sink_frames = config.sink_frames if sink_frames is None else sink_frames
        self.slots = self.context_frames + config.chunk_frames
        self.table = config.table_length
        largest = self.table - config.chunk_frames
        if self.kind is TemporalPositions.CYCLIC and self.context_frames > largest:
            raise UsageError(
                f"context frames: {self.context_frames} is more than the {largest} of the model's position table"
            )
        if self.context_frames < 1:
            raise UsageError(f"context frames: {self.context_frames} must be at least 1")
        if self.sink_frames and self.sink_frames > self.context_frames - config.chunk_frames:
            raise UsageError(
                f"sink frames: {self.sink_frames} must leave a chunk of {config.chunk_frames} frames free "
                f"in a window of {self.context_frames}"
            )

    def _wrap(self, frame: int, length: int) -> int:
        """Frame numbers wrap at ``length``, but the sinks keep theirs."""
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (length - self.sink_frames)

    def slot(self, frame: int) -> int:
        """Slot of a frame in the temporal ring."""
        return self._wrap(frame, self.slots)

    def sink_shift(self, start: int) -> int:
        """rope: how far the sinks have moved along, so as to stay right before a window that ends at ``start``."""
        return max(0, start - self.context_frames) if self.kind is TemporalPositions.ROPE else 0

    def position(self, frame: int, start: int) -> int:
        """Temporal position of a frame as seen by the chunk that begins at frame ``start``.

        Raises:
            UsageError: the video has outgrown a table that does not wrap.
        """
        if self.kind is TemporalPositions.ROPE:
            return frame + (self.sink_shift(start) if frame < self.sink_frames else 0)
        if self.kind is TemporalPositions.CYCLIC:
            return self._wrap(frame, self.table)
        if frame >= self.table:
            raise UsageError(
                f"frames: absolute positions end at frame {self.table}; ask for fewer frames or use a model with "
                "cyclic or rope positions"
            )
        return frame

    def context(self, start: int) -> list[int]:
        """The clean frames that a chunk beginning at frame ``start`` sees, oldest first."""
        if start <= self.context_frames:
            return list(range(start))
        return [*range(self.sink_frames), *range(start - self.context_frames + self.sink_frames, start)]


def within_chunk_mask(frames: int, clean_frames: int, causality: Causality) -> Tensor:
    """(frames, frames) bool: who sees whom among the frames of one forward, the first ``clean_frames`` being clean."""
    mask = torch.ones(frames, frames, dtype=torch.bool).tril()
    if causality is Causality.PARTIAL:
        mask[clean_frames:, clean_frames:] = True
    return mask


def sequence_plan(
    config: ModelConfig, clean_frames: int, noisy_frames: int, positions: Tensor, device: torch.device
) -> FramePlan:
    """The plan of a forward without a cache (training, recompute): clean context first, then the noisy chunk."""
    frames = clean_frames + noisy_frames
    mask = within_chunk_mask(frames, clean_frames, config.causality)
    return FramePlan(clean_frames, positions.to(device), mask.to(device))


class KVCache:
    """Keys and values of finished frames, for all blocks: temporal ring, spatial prefix and text.

    All buffers are allocated here and written in place. Guidance doubles the batch; both halves are cached.

    Args:
        config: the model's sizes.
        batch_size: videos B generated together, guidance included.
        context_frames: window in frames (P_max); the model's own by default.
        sink_frames: first frames that are never evicted; the model's own by default.
        dtype: type of the stored numbers.
        device: where they live.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        *,
        context_frames: int | None = None,
        sink_frames: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.batch_size = batch_size
        self.clock = FrameClock(config, context_frames, sink_frames)
        self.dtype, self.device = dtype, torch.device(device)
        self.frames = 0
        """Clean frames written since the video began: the number of the next frame."""
        self.text: list[TextKeysValues] = []
        """Keys and values of the caption, one entry a block; empty without text."""

        tokens, heads, size = config.tokens_per_frame, config.num_heads, config.head_size
        temporal = (batch_size * tokens, heads, self.clock.slots, size)
        self.spatial_frames = {
            SpatialPrefix.PREV_FRAMES: config.spatial_prefix_frames,
            SpatialPrefix.FIRST_FRAME: 1,
            SpatialPrefix.NONE: 0,
        }[config.spatial_prefix]
        spatial = (batch_size, heads, self.spatial_frames, tokens, size)

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.layers = [
            LayerCache(
                zeros(temporal),
                zeros(temporal),
                zeros(spatial) if self.spatial_frames else None,
                zeros(spatial) if self.spatial_frames else None,
            )
            for _ in range(config.depth)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, text included, as allocated."""
        buffers = [t for layer in (*self.layers, *self.text) for t in layer if t is not None]
        return sum(t.nbytes for t in buffers)

    @property
    def window_nbytes(self) -> int:
        """Bytes of the P_max cached frames and the K prefix frames: the paper's formula, which has no slots for a chunk."""
        config = self.config
        frame = config.depth * self.batch_size * config.tokens_per_frame * 2 * config.hidden_size * self.dtype.itemsize
        return frame * (self.clock.context_frames + self.spatial_frames)

    def reset(self) -> None:
        """Forget all frames; the caption stays. Buffers are zeroed so that no stale number can be read."""
        self.frames = 0
        for layer in self.layers:
            for buffer in layer:
                if buffer is not None:
                    buffer.zero_()

    def plan(self, frames: int, *, clean: bool) -> FramePlan:
        """The plan of a forward over the next ``frames`` frames: a noisy chunk, or a clean write.

        Raises:
            UsageError: more frames at once than the ring has free slots for.
        """
        clock, start = self.clock, self.frames
        context = clock.context(start)
        if len(context) + frames > clock.slots:
            raise UsageError(f"{frames} frames do not fit a cache of {clock.slots} slots that holds {len(context)}")
        numbers = list(range(start, start + frames))
        mask = torch.zeros(frames, clock.slots, dtype=torch.bool)
        mask[:, [clock.slot(f) for f in context]] = True
        slots = torch.tensor([clock.slot(f) for f in numbers])
        mask[:, slots] = within_chunk_mask(frames, frames if clean else 0, self.config.causality)

        if self.config.spatial_prefix is SpatialPrefix.FIRST_FRAME:
            source = torch.tensor([0])  # a later write puts back what is there already, see PrefixAttention
            spatial_slots = torch.tensor([0])
            seen = torch.tensor([start > 0])
        else:
            kept = numbers[-self.spatial_frames :] if self.spatial_frames else []
            source = torch.tensor([f - start for f in kept], dtype=torch.int64)
            spatial_slots = torch.tensor([f % self.spatial_frames for f in kept], dtype=torch.int64)
            seen = torch.arange(self.spatial_frames) < start
        return FramePlan(
            clean_frames=frames if clean else 0,
            positions=torch.tensor([clock.position(f, start) for f in numbers]).to(self.device),
            temporal_mask=mask.to(self.device),
            slots=slots.to(self.device),
            spatial_source=source.to(self.device),
            spatial_slots=spatial_slots.to(self.device),
            spatial_mask=seen.repeat_interleave(self.config.tokens_per_frame)[None].to(self.device),
            has_prefix=torch.tensor(start > 0).to(self.device),
        )

    def commit(self, frames: int) -> int:
        """Count ``frames`` clean frames as written. Returns by how many positions rope sinks must be moved along."""
        before = self.clock.sink_shift(self.frames)
        self.frames += frames
        return self.clock.sink_shift(self.frames) - before if self.clock.sink_frames else 0
