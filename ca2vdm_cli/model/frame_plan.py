"""Frame plans: how the frames of one forward relate to time, to each other and to the cache.

Shape letters: B batch, T frames of this forward, J noisy chunks among them, S tokens per frame, E head size, R slots of
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
    """How the T frames of one forward relate to time and to each other. All blocks share one plan."""

    clean_frames: int
    """How many of the frames are clean. They come first; the rest are noisy."""
    static_shape: bool
    """Whether this shape occurs again and again (a whole chunk, or a full window), so that compiling it pays off."""
    positions: Tensor
    """(T,) or (B, T) int64: entries of the position table, or frame numbers for rope."""
    temporal_mask: Tensor | None
    """(T, number of keys) bool: which keys each frame sees; None if every frame sees every key."""
    rotation: tuple[Tensor, Tensor] | None
    """rope: cosines and sines (T, E) of the frames' rotation."""


@dataclass(frozen=True)
class SequencePlan(FramePlan):
    """The plan of a forward without a cache: clean frames and noisy chunks in one sequence.

    The keys of temporal attention are the T frames, followed by the N shifted sinks.
    """

    prefix_frames: Tensor
    """(J, K) int64: the clean frames that each noisy chunk looks at in prefix-enhanced attention."""
    prefix_seen: Tensor | None = None
    """(J, K) bool: which of them exist; None if all do. Without any, prefix-enhanced attention adds nothing."""
    shifted_sinks: tuple[Tensor, Tensor, Tensor] | None = None
    """rope sinks of a clip that is longer than the window: the frames (N,) int64 whose keys are copied, and the cosines
    and sines (N, E) of each copy's shift. Each chunk sees its own copies."""


@dataclass(frozen=True)
class CachePlan(FramePlan):
    """The plan of a forward with a cache: a noisy chunk that reads it, or a clean write.

    The keys of temporal attention are the R slots of the ring.
    """

    slots: Tensor
    """(T,) int64: the ring's slots that receive the frames' keys and values."""
    spatial_source: Tensor
    """int64: which of the T frames are written to the spatial cache..."""
    spatial_slots: Tensor
    """...and to which of its K slots."""
    spatial_mask: Tensor
    """(1, K*S) bool: the cached tokens that a noisy frame sees."""
    has_prefix: Tensor
    """() bool: whether the cache holds any frame. If not, prefix-enhanced attention adds nothing."""
    writes_noisy_prefix: bool = False
    """Whether noisy frames are written to the spatial cache too. Only the baseline ``per-step-cache`` does that."""


def within_chunk_mask(frames: int, clean_frames: int, causality: Causality) -> Tensor:
    """(frames, frames) bool: which frames of one forward see each other; the first ``clean_frames`` are clean."""
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
) -> SequencePlan:
    """The plan of a forward without a cache (training, recomputing): clean context first, then one noisy chunk."""
    mask = within_chunk_mask(clean_frames + noisy_frames, clean_frames, config.causality)
    prefix = torch.tensor([_spatial_prefix(config, clean_frames)], dtype=torch.int64)
    return SequencePlan(
        clean_frames=clean_frames,
        static_shape=static_shape,
        positions=positions.to(device),
        temporal_mask=mask.to(device),
        rotation=rotation(config, positions, device),
        prefix_frames=prefix.to(device),
    )


def _spatial_prefix(config: ModelConfig, clean_frames: int) -> list[int]:
    """The clean frames before a chunk that prefix-enhanced attention looks at."""
    if config.spatial_prefix is SpatialPrefix.FIRST_FRAME:
        return [0][:clean_frames]
    return list(range(max(0, clean_frames - config.spatial_prefix_frames), clean_frames))


def parallel_plan(
    config: ModelConfig, window: TemporalWindow, first: int, chunks: int, device: torch.device
) -> SequencePlan:
    """The plan of one forward that trains all chunks of a clip: its clean frames once, then noisy copies of the chunks.

    Noisy chunk j sees itself and the clean frames that the cache would hold when the chunk is generated. A clean frame
    sees what it saw when it was written to the cache. So a clip longer than the window is trained under the same
    eviction that applies when long videos are generated.

    Rope sinks shift along with the window, so each chunk after the window has slid gets copies of their keys, rotated
    as the cache would rotate them.

    Args:
        config: the model.
        window: the temporal window.
        first: clean frames before the first noisy chunk.
        chunks: J. The clip has first + J·l frames; the last chunk is not needed clean.
        device: device of the plan's tensors.
    """
    length, frames = config.chunk_frames, first + chunks * config.chunk_frames
    clean = frames - length
    starts, sinks = range(first, frames, length), window.sink_frames
    shifts = [window.sink_shift(start) for start in starts if sinks and window.sink_shift(start)]
    rows = clean + chunks * length
    mask = torch.zeros(rows, rows + sinks * len(shifts), dtype=torch.bool)
    mask[:first, :first] = within_chunk_mask(first, first, config.causality)
    prefix_frames = torch.zeros(chunks, max(1, config.spatial_prefix_frames), dtype=torch.int64)
    prefix_seen = torch.zeros_like(prefix_frames, dtype=torch.bool)
    for j, start in enumerate(starts):
        noisy = slice(clean + j * length, clean + (j + 1) * length)
        written = slice(start, min(start + length, clean))
        mask[noisy, noisy] = within_chunk_mask(length, 0, config.causality)
        mask[written, written] = within_chunk_mask(written.stop - start, written.stop - start, config.causality)
        copies = rows + sinks * (j - chunks + len(shifts))  # first of this chunk's copies, if it has any
        for part in (noisy, written):
            mask[part, window.context(start)] = True
            if copies >= rows:
                mask[part, :sinks], mask[part, copies : copies + sinks] = False, True
        prefix = _spatial_prefix(config, start)
        prefix_frames[j, : len(prefix)] = torch.tensor(prefix)
        prefix_seen[j, : len(prefix)] = True
    numbers = [*range(clean), *range(first, frames)]
    positions = torch.tensor([window.position(f, start=0) for f in numbers])
    shifted_sinks = None
    if shifts:
        angles = rope_angles(torch.tensor(shifts).repeat_interleave(sinks), config.head_size, device)
        shifted_sinks = (torch.arange(sinks).repeat(len(shifts)).to(device), *angles)
    return SequencePlan(
        clean_frames=clean,
        static_shape=True,
        positions=positions.to(device),
        temporal_mask=mask.to(device),
        rotation=rotation(config, positions, device),
        prefix_frames=prefix_frames.to(device),
        prefix_seen=prefix_seen.to(device),
        shifted_sinks=shifted_sinks,
    )


def rope_angles(positions: Tensor, head_size: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, E) of rotary embedding, in pairs of neighbours, base 10000 (Su et al. 2021).

    Angles are computed in float64: at frame 10⁵ a float32 angle is off by more than a hundredth.
    """
    frequency = 10_000.0 ** -(torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size)
    angle = (positions.cpu().to(torch.float64)[..., None] * frequency).repeat_interleave(2, dim=-1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotation(config: ModelConfig, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """``FramePlan.rotation`` of frames at these positions; None without rope."""
    if config.temporal_positions is not TemporalPositions.ROPE:
        return None
    return rope_angles(positions, config.head_size, device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension: x (..., T, E) by angles (T, E)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
