"""The cache queue: keys and values of finished frames, computed once and read by every later denoising step.

Ca2-VDM, section 3.3 (arXiv 2411.16375). The temporal queue is a ring of ``context_frames + chunk_frames`` slots. A
chunk takes the slots of the frames that have just left the window: while it is denoised, they hold its noisy keys; the
clean write replaces these afterwards. Nothing is ever moved.

Shape letters: B batch, T frames of this forward, S tokens per frame, H heads, E head size, R slots of the temporal
ring, K frames of the spatial prefix (0 without prefix-enhanced attention), M text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ca2vdm_cli.config import ModelConfig, SpatialPrefix
from ca2vdm_cli.errors import UsageError

from .frame_plan import CachePlan, rope_angles, rotate, rotation, within_chunk_mask
from .temporal_window import TemporalWindow


class LayerCache(NamedTuple):
    """One block's buffers."""

    temporal_k: Tensor  # (B*S, H, R, E)
    temporal_v: Tensor  # (B*S, H, R, E)
    spatial_k: Tensor  # (B, H, K, S, E)
    spatial_v: Tensor  # (B, H, K, S, E)


def write_slots(ring: Tensor, slots: Tensor, frames: Tensor) -> None:
    """Write frames (B*S, H, T, E) to the slots (T,) of a ring (B*S, H, R, E).

    On a CPU, PyTorch's ``index_copy_`` takes more than twice as long as slice copies. Slots are contiguous except at
    the wrap-around, so a few slice copies suffice.
    """
    traced = torch.compiler.is_compiling() or type(slots) is not Tensor  # a fake tensor has no values
    if traced or slots.device.type != "cpu":
        ring.index_copy_(2, slots, frames)
        return
    indices = slots.tolist()
    breaks = [t for t in range(1, len(indices)) if indices[t] != indices[t - 1] + 1]
    for start, stop in pairwise([0, *breaks, len(indices)]):
        ring[:, :, indices[start] : indices[stop - 1] + 1] = frames[:, :, start:stop]


class TextKeysValues(NamedTuple):
    """One block's keys and values of the caption, shared by all steps of all chunks."""

    k: Tensor  # (B, H, M, E)
    v: Tensor  # (B, H, M, E)
    mask: Tensor  # (B, 1, 1, M), True at real tokens


class KVCache:
    """Keys and values of finished frames, for all blocks: temporal ring, spatial prefix and text.

    All buffers are allocated here and written in place. Guidance doubles the batch; both halves are cached.

    Args:
        config: the model's sizes.
        batch_size: videos B generated together, including the unconditional half under guidance.
        context_frames: window in frames (P_max); the model's own by default.
        sink_frames: first frames that are never evicted; the model's own by default.
        dtype: dtype of the buffers.
        device: device of the buffers.
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
        """rope sinks' keys as first written, one entry per block; empty until the window slides."""
        self.text: list[TextKeysValues] = []
        """Keys and values of the caption, one entry per block; empty without text."""

        tokens, heads, size = config.tokens_per_frame, config.num_heads, config.head_size
        temporal = (batch_size * tokens, heads, self.window.slots, size)
        spatial = (batch_size, heads, config.spatial_slots, tokens, size)
        self.layers = [
            LayerCache(*(torch.zeros(s, dtype=dtype, device=device) for s in (temporal, temporal, spatial, spatial)))
            for _ in range(config.depth)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, text included, as allocated."""
        buffers = [t for layer in self.layers for t in layer] + self.sink_keys
        return self.text_nbytes + sum(t.nbytes for t in buffers)

    @property
    def text_nbytes(self) -> int:
        """Bytes of the caption's keys and values, and of its mask, which all blocks share."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.text) + sum(t.mask.nbytes for t in self.text[:1])

    def plan(self, frames: int, *, clean: bool) -> CachePlan:
        """The plan of a forward over the next ``frames`` frames: a noisy chunk, or a clean write.

        Raises:
            UsageError: the ring does not have that many free slots.
        """
        window, start = self.window, self.frames
        context = window.context(start)
        if len(context) + frames > window.slots:
            raise UsageError(f"{frames} frames do not fit a cache of {window.slots} slots that holds {len(context)}")
        numbers = list(range(start, start + frames))
        mask = torch.zeros(frames, window.slots, dtype=torch.bool)
        mask[:, [window.slot(f) for f in context]] = True
        slots = torch.tensor([window.slot(f) for f in numbers])
        mask[:, slots] = within_chunk_mask(frames, frames if clean else 0, self.config.causality)

        if self.config.spatial_prefix is SpatialPrefix.FIRST_FRAME:
            source = torch.tensor([0])  # later writes put back what is already there, see PrefixAttention.write
            spatial_slots = torch.tensor([0])
            seen = torch.tensor([True])
        else:
            count = self.config.spatial_slots
            prefix = numbers[-count:] if count else []
            source = torch.tensor([f - start for f in prefix], dtype=torch.int64)
            spatial_slots = torch.tensor([f % count for f in prefix], dtype=torch.int64)
            seen = torch.arange(count) < max(start, 1)
        positions = torch.tensor([window.position(f, start) for f in numbers])
        return CachePlan(
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
        """Count ``frames`` clean frames as written, and shift rope sinks to stay directly before the window.

        Sinks are rotated from their keys as first written, by the whole shift each time: rotating keys that were
        rotated before would accumulate rounding errors.
        """
        self.frames += frames
        sinks, shift = self.window.sink_frames, self.window.sink_shift(self.frames)
        if not (sinks and shift):
            return
        if not self.sink_keys:
            self.sink_keys = [layer.temporal_k[:, :, :sinks].clone() for layer in self.layers]
        angles = rope_angles(torch.tensor([shift]), self.config.head_size, self.device)
        for layer, keys in zip(self.layers, self.sink_keys, strict=True):
            layer.temporal_k[:, :, :sinks] = rotate(keys, *angles)

    def state(self) -> dict[str, Tensor]:
        """All that later frames depend on, except the caption: the buffers themselves, not copies."""
        layers = [dict(zip(LayerCache._fields, layer, strict=True)) for layer in self.layers]
        buffers = {f"{i}.{name}": buffer for i, layer in enumerate(layers) for name, buffer in layer.items()}
        buffers |= {f"{i}.sink_keys": keys for i, keys in enumerate(self.sink_keys)}
        return {**buffers, "frames": torch.tensor(self.frames)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that a cache of the same sizes returned.

        Raises:
            KeyError, RuntimeError: the state is that of another cache.
        """
        for i, layer in enumerate(self.layers):
            for name, buffer in zip(LayerCache._fields, layer, strict=True):
                if buffer.shape != state[f"{i}.{name}"].shape:
                    raise RuntimeError(f"a buffer of shape {tuple(state[f'{i}.{name}'].shape)}")
                buffer.copy_(state[f"{i}.{name}"])
        names = [f"{i}.sink_keys" for i in range(len(self.layers))]
        self.sink_keys = [state[name].to(self.device, copy=True) for name in names if name in state]
        self.frames = int(state["frames"])
