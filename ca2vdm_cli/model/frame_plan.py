"""Frames in time: where frame f sits, what a chunk sees, and how the frames of one forward relate to each other.

Shape letters: B batch, T frames of this forward, J noisy chunks among them, S tokens a frame, E head size, R slots of
the temporal ring, K frames of the spatial prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ca2vdm_cli.config import Causality, ModelConfig, SpatialPrefix, TemporalPositions

from .temporal_window import TemporalWindow


@dataclass(frozen=True)
class FramePlan:
    """How the T frames of one forward relate to time, to each other and to the cache. The same for all blocks."""

    clean_frames: int
    """The first so many frames are clean; the others are noisy."""
    static_shape: bool
    """Whether this shape comes again and again, so that compiling it pays: a whole chunk, or a full window."""
    positions: Tensor
    """(T,) or (B, T) int64: entries of the position table, or frame numbers for rope."""
    temporal_mask: Tensor | None
    """(T, K) bool: which frames a frame sees; K is T (and the moved copies) without a cache and R with one. None where
    all see all."""
    rotation: tuple[Tensor, Tensor] | None = None
    """rope: cosines and sines (T, E) of the frames' rotation."""
    shifted_sinks: tuple[Tensor, Tensor, Tensor] | None = None
    """rope sinks of a clip that outgrows the window: which of the T frames the copies of keys (N,) int64 are of, and
    the cosines and sines (N, E) of how far each has moved along. A chunk sees its own copies."""
    prefix_frames: Tensor | None = None
    """(J, K) int64, without a cache: which clean frames the frames of each noisy chunk look at."""
    prefix_seen: Tensor | None = None
    """(J, K) bool: which of these exist, where chunks differ in that; None where all do. A chunk without any adds
    nothing in prefix-enhanced attention."""
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


def within_chunk_mask(frames: int, clean_frames: int, causality: Causality) -> Tensor:
    """(frames, frames) bool: who sees whom among the frames of one forward, the first ``clean_frames`` being clean."""
    mask = torch.ones(frames, frames, dtype=torch.bool).tril()
    if causality is Causality.PARTIAL:
        mask[clean_frames:, clean_frames:] = True
    return mask


def sequence_plan(
    config: ModelConfig,
    clean_frames: int,
    noisy_frames: int,
    positions: Tensor,
    device: torch.device,
    *,
    static_shape: bool = False,
) -> FramePlan:
    """The plan of a forward without a cache (training, recompute): clean context first, then the noisy chunk."""
    frames = clean_frames + noisy_frames
    mask = within_chunk_mask(frames, clean_frames, config.causality)
    turns = rotation(config, positions, device)
    looked_at = torch.tensor([_spatial_prefix(config, clean_frames)], dtype=torch.int64).to(device)
    return FramePlan(
        clean_frames, static_shape, positions.to(device), mask.to(device), rotation=turns, prefix_frames=looked_at
    )


def _spatial_prefix(config: ModelConfig, clean_frames: int) -> list[int]:
    """The clean frames that prefix-enhanced attention looks at, of so many before the chunk."""
    if config.spatial_prefix is SpatialPrefix.FIRST_FRAME:
        return [0][:clean_frames]
    return list(range(max(0, clean_frames - config.spatial_prefix_frames), clean_frames))


def parallel_plan(
    config: ModelConfig, clock: TemporalWindow, first: int, chunks: int, device: torch.device
) -> FramePlan:
    """The plan of one forward that trains all chunks of a clip: its clean frames once, then noisy copies of the chunks.

    Noisy chunk j sees the clean frames that the cache queue would hold when it is generated, and itself. A clean frame
    sees what it would have seen when it was written to the queue. So a clip longer than the window is learned under
    the very eviction that a long video is generated with.

    Rope sinks move along with the window, so each chunk after it has slid has copies of their keys, turned as the queue
    would have turned them.

    Args:
        first: clean frames before the first noisy chunk.
        chunks: J; the clip has first + J·l frames, of which the last chunk's are not needed clean.
    """
    length, frames = config.chunk_frames, first + chunks * config.chunk_frames
    clean = frames - length
    starts, sinks = range(first, frames, length), clock.sink_frames
    shifts = [clock.sink_shift(start) for start in starts if sinks and clock.sink_shift(start)]
    rows = clean + chunks * length
    mask = torch.zeros(rows, rows + sinks * len(shifts), dtype=torch.bool)
    mask[:first, :first] = within_chunk_mask(first, first, config.causality)
    looked_at = torch.zeros(chunks, max(1, config.spatial_prefix_frames), dtype=torch.int64)
    seen = torch.zeros_like(looked_at, dtype=torch.bool)
    for j, start in enumerate(starts):
        noisy = slice(clean + j * length, clean + (j + 1) * length)
        written = slice(start, min(start + length, clean))
        mask[noisy, noisy] = within_chunk_mask(length, 0, config.causality)
        mask[written, written] = within_chunk_mask(written.stop - start, written.stop - start, config.causality)
        copies = rows + sinks * (j - chunks + len(shifts))  # where this chunk's begin, if it has any
        for part in (noisy, written):
            mask[part, clock.context(start)] = True
            if copies >= rows:
                mask[part, :sinks], mask[part, copies : copies + sinks] = False, True
        prefix = _spatial_prefix(config, start)
        looked_at[j, : len(prefix)] = torch.tensor(prefix)
        seen[j, : len(prefix)] = True
    numbers = [*range(clean), *range(first, frames)]
    positions = torch.tensor([clock.position(f, start=0) for f in numbers])
    turns, shifted_sinks = rotation(config, positions, device), None
    if shifts:
        turn = rotation(config, torch.tensor(shifts).repeat_interleave(sinks), device)
        assert turn is not None
        shifted_sinks = (torch.arange(sinks).repeat(len(shifts)).to(device), *turn)
    return FramePlan(
        clean_frames=clean,
        static_shape=True,
        positions=positions.to(device),
        temporal_mask=mask.to(device),
        rotation=turns,
        shifted_sinks=shifted_sinks,
        prefix_frames=looked_at.to(device),
        prefix_seen=seen.to(device),
    )


def rope_angles(positions: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, E) of rotary embedding, in pairs of neighbours, base 10000 (Su et al. 2021).

    Angles are computed in float64: at frame 10⁵ a float32 angle is off by more than a hundredth.
    """
    frequency = 10_000.0 ** -(torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size)
    angle = (positions.cpu().to(torch.float64)[..., None] * frequency).repeat_interleave(2, dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotation(config: ModelConfig, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The ``FramePlan.rotation`` of frames at these positions; None but for rope. Made once a chunk, not a layer."""
    if config.temporal_positions is not TemporalPositions.ROPE:
        return None
    cos, sin = rope_angles(positions, config.head_size)
    return cos.to(device), sin.to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension: x (..., T, E) by angles (T, E)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
