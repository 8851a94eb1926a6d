"""The cache queue: keys and values of finished frames, computed once and read by every later denoising step.

Ca2-VDM, section 3.3 (arXiv 2411.16375). The temporal queue is a ring of ``context_frames + chunk_frames`` slots: the
slots a chunk takes are those of the frames that have just left the window. A noisy chunk puts its keys there while it
is denoised, the clean write goes to the same place afterwards, and nothing is ever moved.

Shape letters: B batch, T frames of this forward, S tokens a frame, H heads, E head size, R slots of the temporal ring,
K frames of the spatial prefix, M text tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ca2vdm_cli.config import ModelConfig, SpatialPrefix
from ca2vdm_cli.errors import UsageError

from .frame_plan import FramePlan, rotate, rotation, within_chunk_mask
from .temporal_window import TemporalWindow


class LayerCache(NamedTuple):
    """One block's share of the cache. The spatial pair is None where the model has no prefix-enhanced attention."""

    temporal_k: Tensor  # (B*S, H, R, E)
    temporal_v: Tensor  # (B*S, H, R, E)
    spatial_k: Tensor | None  # (B, H, K, S, E)
    spatial_v: Tensor | None  # (B, H, K, S, E)


def write_slots(ring: Tensor, slots: Tensor, frames: Tensor) -> None:
    """Put frames (B*S, H, T, E) into those slots (T,) of a ring (B*S, H, R, E).

    PyTorch's ``index_copy_`` takes more than twice as long as slices on a CPU; slots follow one another but where the
    ring wraps, so there are few.
    """
    traced = torch.compiler.is_compiling() or type(slots) is not Tensor  # or simulated: slots have no numbers
    if traced or slots.device.type != "cpu":
        ring.index_copy_(2, slots, frames)
        return
    numbers = slots.tolist()
    breaks = [t for t in range(1, len(numbers)) if numbers[t] != numbers[t - 1] + 1]
    for start, stop in pairwise([0, *breaks, len(numbers)]):
        ring[:, :, numbers[start] : numbers[stop - 1] + 1] = frames[:, :, start:stop]


class TextKeysValues(NamedTuple):
    """One block's keys and values of the caption, the same for every step of every chunk."""

    k: Tensor  # (B, H, M, E)
    v: Tensor  # (B, H, M, E)
    mask: Tensor  # (B, 1, 1, M), True at real tokens


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
        self.window = TemporalWindow(config, context_frames, sink_frames)
        self.dtype, self.device = dtype, torch.device(device)
        self.frames = 0
        """Clean frames written since the video began: the number of the next frame."""
        self.sink_keys: list[Tensor] = []
        """rope sinks' keys as first written, one entry a block; empty until the window slides."""
        self.text: list[TextKeysValues] = []
        """Keys and values of the caption, one entry a block; empty without text."""

        tokens, heads, size = config.tokens_per_frame, config.num_heads, config.head_size
        temporal = (batch_size * tokens, heads, self.window.slots, size)
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
        buffers = [t for layer in self.layers for t in layer if t is not None] + self.sink_keys
        return self.text_nbytes + sum(t.nbytes for t in buffers)

    @property
    def text_nbytes(self) -> int:
        """Bytes of the caption's keys, values and mask, which all blocks share."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.text) + sum(t.mask.nbytes for t in self.text[:1])

    def plan(self, frames: int, *, clean: bool) -> FramePlan:
        """The plan of a forward over the next ``frames`` frames: a noisy chunk, or a clean write.

        Raises:
            UsageError: more frames at once than the ring has free slots for.
        """
        clock, start = self.window, self.frames
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
            seen = torch.tensor([True])
        else:
            kept = numbers[-self.spatial_frames :] if self.spatial_frames else []
            source = torch.tensor([f - start for f in kept], dtype=torch.int64)
            spatial_slots = torch.tensor([f % self.spatial_frames for f in kept], dtype=torch.int64)
            seen = torch.arange(self.spatial_frames) < max(start, 1)
        positions = torch.tensor([clock.position(f, start) for f in numbers])
        return FramePlan(
            clean_frames=frames if clean else 0,
            static_shape=frames == self.config.chunk_frames,
            positions=positions.to(self.device),
            temporal_mask=mask.to(self.device),
            rotation=rotation(self.config, positions, self.device),
            slots=slots.to(self.device),
            spatial_source=source.to(self.device),
            spatial_slots=spatial_slots.to(self.device),
            spatial_mask=seen.repeat_interleave(self.config.tokens_per_frame)[None].to(self.device),
            has_prefix=torch.tensor(start > 0).to(self.device),
        )

    def commit(self, frames: int) -> None:
        """Count ``frames`` clean frames as written; rope sinks move along, so as to stay right before the window.

        Their keys as first written are kept and turned by the whole way each time: turning what was turned before
        would add up rounding errors.
        """
        self.frames += frames
        sinks, shift = self.window.sink_frames, self.window.sink_shift(self.frames)
        if not (sinks and shift):
            return
        if not self.sink_keys:
            self.sink_keys = [layer.temporal_k[:, :, :sinks].clone() for layer in self.layers]
        turn = rotation(self.config, torch.tensor([shift]), self.device)
        assert turn is not None
        for layer, keys in zip(self.layers, self.sink_keys, strict=True):
            layer.temporal_k[:, :, :sinks] = rotate(keys, *turn)
