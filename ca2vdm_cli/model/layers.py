"""The layers of the transformer: embeddings, the four attentions, the MLP.

Parameter names are those of the published checkpoint. Shape letters: B batch, T frames (P clean, L noisy in J chunks of
l), S tokens per frame, D width, H heads, E head size, R slots of the temporal ring, K frames of the spatial prefix, M
text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca2vdm_cli.config import ModelConfig, SpatialPrefix

from .attention import Backend
from .frame_plan import CachePlan, FramePlan, SequencePlan, rotate
from .kv_cache import LayerCache, TextKeysValues, write_slots


def sincos_1d(positions: Tensor, size: int) -> Tensor:
    """Sine-cosine embedding of positions (N,) into (N, size): sines first, base 10000 (Vaswani et al. 2017)."""
    frequency = 10_000.0 ** -(torch.arange(size // 2, dtype=torch.float64) / (size / 2))
    angle = positions.to(torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_2d(height: int, width: int, size: int) -> Tensor:
    """(height*width, size): the first half of the channels encodes the column, the second the row (as in DiT)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sincos_1d(columns.flatten(), size // 2), sincos_1d(rows.flatten(), size // 2)], dim=1)


class PatchEmbed(nn.Module):
    """Latent frames to tokens, (B, C, T, h, w) -> (B, T, S, D): a convolution whose stride is its kernel (1, p, p)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        p = self.patch_size = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=(1, p, p), stride=(1, p, p))

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        p = self.patch_size
        patches = x.view(b, c, t, h // p, p, w // p, p).permute(0, 2, 3, 5, 1, 4, 6)  # (B, T, h/p, w/p, C, p, p)
        patches = patches.reshape(b, t, (h // p) * (w // p), c * p * p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) to vectors (N, D), through 256 sinusoidal features (cosines first)."""

    features = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.features // 2
        frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, device=timestep.device))
        angle = timestep.float()[:, None] * frequency
        dtype = next(self.mlp.parameters()).dtype
        out: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype))
        return out


GELU_VALUES = 2**18
"""Values that a half-precision GELU processes at a time; in float32 they fit a core's cache."""


def gelu(x: Tensor) -> Tensor:
    """tanh-GELU (Hendrycks & Gimpel 2016), x·(1 + tanh u)/2 with u = √(2/π)·(x + 0.044715·x³), which is x·σ(2u).

    On CPUs, PyTorch's tanh takes three times as long as its sigmoid. Half precision is computed in float32, part by
    part, and rounded once, as PyTorch does.
    """
    if x.device.type != "cpu" or x.requires_grad:
        return F.gelu(x, approximate="tanh")
    if x.dtype.itemsize >= 4:
        return _gelu_by_sigmoid(x)
    if torch.compiler.is_compiling():  # the compiler fuses it into one loop
        return F.gelu(x, approximate="tanh")
    out = torch.empty(x.shape, dtype=x.dtype)
    for part, out_part in zip(x.flatten().split(GELU_VALUES), out.view(-1).split(GELU_VALUES), strict=True):
        out_part.copy_(_gelu_by_sigmoid(part.float()))
    return out


def _gelu_by_sigmoid(x: Tensor) -> Tensor:
    scale = math.sqrt(8 / math.pi)
    twice_u = (x * x).mul_(0.044715 * scale).add_(scale).mul_(x)
    return twice_u.sigmoid_().mul_(x)


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(gelu(self.fc1(x)))
        return out


class CaptionEmbedder(nn.Module):
    """Text embeddings (B, M, text_channels) to width D, and the stored caption of the unconditional branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.y_proj = Mlp(config.text_channels, config.hidden_size, config.hidden_size)
        self.y_embedding: Tensor
        unconditional = torch.randn(config.text_tokens, config.text_channels) / config.text_channels**0.5
        self.register_buffer("y_embedding", unconditional)

    def forward(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.y_proj(embedding)
        return out


class SelfAttention(nn.Module):
    """The projections that all self-attentions have, around the backend's attention kernel."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.heads, self.head_size = config.num_heads, config.head_size
        self.attend = backend.attend
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor, first: int = 0, last: int = 3) -> tuple[Tensor, ...]:
        """The parts ``first`` to ``last`` of (q, k, v), each (..., S, D) -> (..., S, H, E)."""
        width = x.shape[-1]
        rows = slice(first * width, last * width)
        out = F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return out.unflatten(-1, (last - first, self.heads, self.head_size)).unbind(-3)

    def merge(self, out: Tensor) -> Tensor:
        """Concatenate the heads and apply the output projection, (..., H, E) -> (..., D)."""
        merged: Tensor = self.proj(out.flatten(-2))
        return merged


class SpatialAttention(SelfAttention):
    """Each frame's tokens attend to each other, (B, T, S, D) -> (B, T, S, D)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in self.project(x))  # (B*T, H, S, E)
        return self.merge(self.attend(q, k, v).transpose(1, 2)).view_as(x)


class PrefixAttention(SelfAttention):
    """Prefix-enhanced spatial attention: noisy frames look at tokens of clean frames (paper, section 3.4)."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(config, backend)
        self.first_frame = config.spatial_prefix is SpatialPrefix.FIRST_FRAME

    def forward(self, x: Tensor, plan: FramePlan, cache: LayerCache | None) -> Tensor:
        """(B, T, S, D) -> (B, T, S, D); a clean write also fills the spatial cache."""
        if isinstance(plan, CachePlan) and cache is not None:
            return self._with_cache(x, plan, cache)
        assert isinstance(plan, SequencePlan)
        return self._without_cache(x, plan)

    def _with_cache(self, x: Tensor, plan: CachePlan, cache: LayerCache) -> Tensor:
        """Frames that are all clean, and are written, or all noisy, and look at frames written earlier."""
        if plan.clean_frames:
            keys, values = self.project(x, 1, 3)  # (B, T, S, H, E)
            self._write([part.index_select(1, plan.spatial_source) for part in (keys, values)], plan, cache)
            if self.first_frame:
                return self._look(x, cache.spatial_k.flatten(2, 3), cache.spatial_v.flatten(2, 3))
            return self._look_at_itself(x, keys, values)
        out = self._look(x, cache.spatial_k.flatten(2, 3), cache.spatial_v.flatten(2, 3), plan.spatial_mask)
        if plan.writes_noisy_prefix:
            self._write(self.project(x.index_select(1, plan.spatial_source), 1, 3), plan, cache)
        return torch.where(plan.has_prefix, out, 0)

    def _write(self, keys_values: Iterable[Tensor], plan: CachePlan, cache: LayerCache) -> None:
        """Write the keys and values of some frames, (B, K, S, H, E) each, to the spatial cache."""
        for buffer, frames in zip((cache.spatial_k, cache.spatial_v), keys_values, strict=True):
            frames = frames.permute(0, 3, 1, 2, 4)  # (B, H, K, S, E)
            if self.first_frame:  # once written, the video's first frame stays
                frames = torch.where(plan.has_prefix, buffer, frames)
            buffer.index_copy_(2, plan.spatial_slots, frames)

    def _without_cache(self, x: Tensor, plan: SequencePlan) -> Tensor:
        """Clean frames, then noisy ones; without clean frames the layer adds nothing."""
        clean, noisy = x[:, : plan.clean_frames], x[:, plan.clean_frames :]
        if not clean.shape[1]:
            return torch.zeros_like(noisy)
        keys, values = self.project(clean, 1, 3)  # (B, P, S, H, E)
        if self.first_frame:
            out = self._look(clean, keys[:, 0].transpose(1, 2), values[:, 0].transpose(1, 2))
        else:
            out = self._look_at_itself(clean, keys, values)
        return torch.cat([out, self._look_by_chunk(noisy, keys, values, plan)], dim=1) if noisy.shape[1] else out

    def _look_at_itself(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Each clean frame of x (B, P, S, D) sees its own tokens, with keys and values (B, P, S, H, E)."""
        (q,) = self.project(x, 0, 1)  # (B, P, S, H, E)
        q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in (q, keys, values))  # (B*P, H, S, E)
        return self.merge(self.attend(q, k, v).transpose(1, 2)).view_as(x)

    def _look_by_chunk(self, noisy: Tensor, keys: Tensor, values: Tensor, plan: SequencePlan) -> Tensor:
        """Each of the J noisy chunks of (B, J*l, S, D) looks at its K frames of the keys and values (B, P, S, H, E)."""
        chunks, count = plan.prefix_frames.shape
        frames = plan.prefix_frames.flatten()
        k, v = (  # (B*J, H, K*S, E)
            part.index_select(1, frames).unflatten(1, (chunks, count)).flatten(0, 1).flatten(1, 2).transpose(1, 2)
            for part in (keys, values)
        )
        by_chunk = noisy.unflatten(1, (chunks, -1)).flatten(0, 1)  # (B*J, l, S, D)
        if plan.prefix_seen is None:
            return self._look(by_chunk, k, v).view_as(noisy)
        exists = plan.prefix_seen.any(dim=1)
        mask = plan.prefix_seen | ~exists[:, None]  # every query must see a key; its output is set to zero below
        mask = mask.repeat_interleave(noisy.shape[2], dim=1)[:, None, None].repeat(noisy.shape[0], 1, 1, 1)
        out = self._look(by_chunk, k, v, mask).view_as(noisy)
        return torch.where(exists.repeat_interleave(by_chunk.shape[1])[:, None, None], out, 0)

    def _look(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """All frames of x (B, T, S, D) look at the same keys (B, H, K*S, E): one call with T*S queries."""
        (q,) = self.project(x, 0, 1)
        q = q.flatten(1, 2).transpose(1, 2)  # (B, H, T*S, E)
        return self.merge(self.attend(q, k, v, mask).transpose(1, 2)).view_as(x)


class TemporalAttention(SelfAttention):
    """Each of the S positions attends over time, to its own frame and to earlier ones."""

    def forward(self, x: Tensor, plan: FramePlan, cache: LayerCache | None, first: int = 0) -> Tensor:
        """(B, T, S, D) -> (B, T - first, S, D). With a cache, the frames' keys and values are first put in their slots.

        Args:
            x: tokens.
            plan: how the frames relate.
            cache: this block's buffers.
            first: frames before this one have keys and values but no output.
        """
        b, _, s, _ = x.shape
        parts = (*self.project(x[:, first:], 0, 1), *self.project(x, 1, 3)) if first else self.project(x)
        q, k, v = (part.permute(0, 2, 3, 1, 4).flatten(0, 1) for part in parts)  # (B*S, H, T, E)
        mask = plan.temporal_mask if plan.temporal_mask is None else plan.temporal_mask[first:]
        if plan.rotation is not None:
            q, k = rotate(q, *(part[first:] for part in plan.rotation)), rotate(k, *plan.rotation)
        if isinstance(plan, CachePlan) and cache is not None:
            self._store(k, v, plan, cache)
            k, v = cache.temporal_k, cache.temporal_v
        elif isinstance(plan, SequencePlan) and plan.shifted_sinks is not None:
            frames, *angles = plan.shifted_sinks
            k = torch.cat([k, rotate(k.index_select(2, frames), *angles)], dim=2)
            v = torch.cat([v, v.index_select(2, frames)], dim=2)
        out = self.attend(q, k, v, mask)  # (B*S, H, T - first, E)
        return self.merge(out.unflatten(0, (b, s)).permute(0, 3, 1, 2, 4))

    def write(self, x: Tensor, plan: CachePlan, cache: LayerCache) -> None:
        """Put the frames' keys and values in their slots, and nothing else."""
        k, v = (part.permute(0, 2, 3, 1, 4).flatten(0, 1) for part in self.project(x, 1, 3))
        if plan.rotation is not None:
            k = rotate(k, *plan.rotation)
        self._store(k, v, plan, cache)

    @staticmethod
    def _store(k: Tensor, v: Tensor, plan: CachePlan, cache: LayerCache) -> None:
        write_slots(cache.temporal_k, plan.slots, k)
        write_slots(cache.temporal_v, plan.slots, v)


class CrossAttention(nn.Module):
    """Tokens attend to the caption, whose keys and values are computed once per prompt."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.heads, self.head_size = config.num_heads, config.head_size
        self.attend = backend.attend
        self.q_linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def keys_values(self, caption: Tensor, mask: Tensor) -> TextKeysValues:
        """Caption (B, M, D) and its mask (B, M), True at real tokens, to keys and values."""
        kv = self.kv_linear(caption).unflatten(-1, (2, self.heads, self.head_size))
        k, v = (part.transpose(1, 2).contiguous() for part in kv.unbind(-3))  # or the layout would depend on B
        return TextKeysValues(k, v, mask[:, None, None, :])

    def forward(self, x: Tensor, text: TextKeysValues) -> Tensor:
        q = self.q_linear(x.flatten(1, 2)).unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)  # (B, H, T*S, E)
        out = self.attend(q, text.k, text.v, text.mask)
        merged: Tensor = self.proj(out.transpose(1, 2).flatten(-2))
        return merged.view_as(x)
