"""The causal video diffusion transformer of Ca2-VDM (arXiv 2411.16375, section 3), from the top down.

One forward serves training, recomputing and cached denoising. Frames attend only to earlier frames, and clean frames
always have timestep 0, so a clean frame's keys and values never depend on noisy frames. Whether they are computed again
or read from a cache that is passed in, the result is the same.

Parameter names are those of the published checkpoint. Shape letters: B batch, C channels, T frames (P clean, then L
noisy), h, w latent height and width, S tokens per frame, D width, M text tokens.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ca2vdm_cli.config import ModelConfig, SpatialPrefix, TemporalPositions

from .attention import Backend
from .frame_plan import CachePlan, FramePlan, SequencePlan, parallel_plan, sequence_plan
from .kv_cache import KVCache, LayerCache, TextKeysValues
from .layers import (
    CaptionEmbedder,
    CrossAttention,
    Mlp,
    PatchEmbed,
    PrefixAttention,
    SpatialAttention,
    TemporalAttention,
    TimestepEmbedder,
    sincos_1d,
    sincos_2d,
)
from .temporal_window import TemporalWindow


class CausalVideoTransformer(nn.Module):
    """The network: latent frames and a timestep in, predicted noise (or v) and variance out.

    Args:
        config: sizes and options.
        backend: how attention is computed and blocks are compiled.
    """

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.gradient_checkpointing = False
        """In training, recompute a block's activations in the backward pass instead of storing them."""
        width = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config) if config.text_channels else None
        self.blocks = nn.ModuleList(Block(config, backend, first=i == 0) for i in range(config.depth))
        self.final_layer = FinalLayer(config)
        rows, columns = config.latent_height // config.patch_size, config.latent_width // config.patch_size
        self.pos_embed: Tensor
        self.pos_embed_temporal: Tensor | None
        self.register_buffer("pos_embed", sincos_2d(rows, columns, width)[None])  # (1, S, D)
        table = None
        if config.temporal_positions is not TemporalPositions.ROPE:
            table = sincos_1d(torch.arange(config.table_length), width)[None]  # (1, F, D)
        self.register_buffer("pos_embed_temporal", table)
        self._initialize()
        for block in self.blocks:
            backend.prepare(block)

    @property
    def _blocks(self) -> list[Block]:
        return cast("list[Block]", self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.x_embedder.proj.weight.device

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        plan: FramePlan,
        cache: KVCache | None = None,
        text: list[TextKeysValues] | None = None,
    ) -> Tensor:
        """Predict noise and variance for the noisy frames.

        Args:
            latents: (B, C, T, h, w), clean frames first. With a cache, all frames are noisy (they read it) or all are
                clean (they are written to it and counted, see ``KVCache.commit``).
            timestep: (B,) of the noisy frames, or (B, J) of J noisy chunks. Clean frames always have timestep 0.
            plan: ``KVCache.plan`` with a cache; ``context_plan`` or ``parallel_plan`` without one.
            cache: finished frames of this video, updated in place.
            text: from ``text_keys_values``; the cache's by default.

        Returns:
            (B, out_channels, L, h, w): prediction and, if learned, variance. L is 0 for a clean write.
        """
        frames, clean = latents.shape[2], plan.clean_frames
        assert cache is None or clean in (0, frames), "with a cache, frames must be all noisy or all clean"
        writes_only = cache is not None and clean == frames
        text = text if text is not None else cache.text if cache is not None else []
        assert bool(text) == (self.y_embedder is not None), "a model with text needs a caption, at least the stored one"

        x = self.x_embedder(latents.to(self.dtype)) + self.pos_embed.to(self.dtype)  # (B, T, S, D)
        t = self._embed_timesteps(timestep, clean, frames)  # (B, T, D)
        modulation = self.t_block(t).unflatten(-1, (6, -1))  # (B, T, 6, D)
        time = None
        if self.pos_embed_temporal is not None:
            time = self.pos_embed_temporal[0, plan.positions].unsqueeze(-2).to(self.dtype)  # ([B,] T, 1, D)
        for i, block in enumerate(self._blocks):
            layer = cache.layers[i] if cache is not None else None
            last = clean > 0 and i == len(self.blocks) - 1  # without clean frames all blocks share one compilation
            run = block if plan.static_shape or self.training else block.forward  # .forward is never compiled
            arguments = (x, modulation, plan, layer, text[i] if text else None, time if i == 0 else None, last)
            if self.gradient_checkpointing and self.training:
                x = checkpoint(run, *arguments, use_reentrant=False)
            else:
                x = run(*arguments)
        if writes_only:
            assert cache is not None
            cache.commit(frames)
            return latents.new_zeros(latents.shape[0], self.config.out_channels, 0, *latents.shape[3:])
        return self._unpatchify(self.final_layer(x, t[:, clean:]))

    def write(self, clean: Tensor, cache: KVCache, text: list[TextKeysValues] | None = None) -> None:
        """Write finished frames (B, C, P, h, w) to the cache: one forward at timestep 0."""
        self(clean, clean.new_zeros(1), cache.plan(clean.shape[2], clean=True), cache, text)

    def context_plan(self, noisy_frames: int, start: int, window: TemporalWindow) -> SequencePlan:
        """The plan of a forward without a cache: the window before frame ``start``, then noisy frames from ``start``
        on."""
        context = window.context(start)
        positions = torch.tensor([window.position(f, start) for f in [*context, *range(start, start + noisy_frames)]])
        full = len(context) == window.context_frames
        return sequence_plan(self.config, len(context), noisy_frames, positions, self.device, static_shape=full)

    def parallel_plan(self, first: int, chunks: int, window: TemporalWindow) -> SequencePlan:
        """The plan that trains ``chunks`` chunks in one forward, the first of them after ``first`` clean frames."""
        return parallel_plan(self.config, window, first, chunks, self.device)

    def text_keys_values(self, embedding: Tensor, mask: Tensor) -> list[TextKeysValues]:
        """Every block's keys and values of a caption, computed once per prompt.

        Args:
            embedding: (B, M, text_channels) from the text encoder.
            mask: (B, M), nonzero at real tokens; each caption has at least one.
        """
        if self.y_embedder is None:
            return []
        caption = self.y_embedder(embedding.to(self.device, self.dtype))
        mask = mask.to(self.device).bool()
        return [block.text_keys_values(caption, mask) for block in self._blocks]

    def unconditional_caption(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """The stored unconditional caption (B, M, text_channels) and its mask (B, M); None for a model without text."""
        if self.y_embedder is None:
            return None
        embedding = self.y_embedder.y_embedding.expand(batch, -1, -1)
        return embedding, torch.ones(embedding.shape[:2], dtype=torch.bool, device=embedding.device)

    def _embed_timesteps(self, timestep: Tensor, clean: int, frames: int) -> Tensor:
        """(B,) or (B, J) -> (B, T, D): 0 for clean frames, ``timestep`` for noisy ones; one vector per frame.

        On a CPU, a timestep that all videos share is embedded once, (1, T, D): a product of a few rows rounds
        differently for another number of rows, and a video's numbers would depend on B.
        """
        if not self.training and _all_equal(timestep):
            timestep = timestep[:1]
        batch = timestep.shape[0]
        parts = []
        if clean:
            parts.append(self.t_embedder(timestep.new_zeros(1))[None].expand(batch, clean, -1))
        if frames > clean:
            chunks = self.t_embedder(timestep.flatten()).unflatten(0, (batch, -1))  # (B, J, D)
            parts.append(chunks.repeat_interleave((frames - clean) // chunks.shape[1], dim=1))
        return torch.cat(parts, dim=1)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B, T, S, p*p*C) -> (B, C, T, h, w)."""
        config, p = self.config, self.config.patch_size
        rows, columns = config.latent_height // p, config.latent_width // p
        x = x.unflatten(-1, (p, p, config.out_channels)).unflatten(2, (rows, columns))  # (B, T, h/p, w/p, p, p, C)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _initialize(self) -> None:
        """All initialization in one place. Branches that are added to a pretrained image model start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        for layer in (*self.t_embedder.mlp, *self.t_block):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for block in self._blocks:
            block.zero_added_branches()
        nn.init.zeros_(self.final_layer.linear.weight)


class Block(nn.Module):
    """Spatial, prefix-enhanced and temporal attention, text, MLP; modulated by the timestep (adaLN-single)."""

    def __init__(self, config: ModelConfig, backend: Backend, first: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SpatialAttention(config, backend)
        self.attn_cf = PrefixAttention(config, backend) if config.spatial_prefix is not SpatialPrefix.NONE else None
        self.attn_temp_pre_merge = nn.Linear(width + 1, width) if first and config.mask_channel else None
        self.attn_temp = TemporalAttention(config, backend)
        self.cross_attn = CrossAttention(config, backend) if config.text_channels else None
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        plan: FramePlan,
        cache: LayerCache | None,
        text: TextKeysValues | None,
        time: Tensor | None,
        last: bool,
    ) -> Tensor:
        """(B, T, S, D) -> (B, T, S, D); the last block returns the noisy frames only, (B, L, S, D).

        Args:
            x: tokens.
            modulation: (B, T, 6, D), six vectors per frame.
            plan: how the frames relate.
            cache: this block's buffers.
            text: this block's keys and values of the caption.
            time: ([B,] T, 1, D), temporal position embedding; first block only.
            last: whether this is the last block, which needs only the keys and values of clean frames.
        """
        table = (self.scale_shift_table + modulation).unsqueeze(3)  # (B, T, 6, 1, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.unbind(2)
        x = x + gate_msa * self.attn(modulate(x, shift_msa, scale_msa))
        if self.attn_cf is not None:
            x = x + gate_msa * self.attn_cf(x, plan, cache)
        h = x if time is None else x + time
        if self.attn_temp_pre_merge is not None:
            h = self._merge_mask(h, plan.clean_frames)
        clean = plan.clean_frames
        if last and clean == x.shape[1]:
            if isinstance(plan, CachePlan) and cache is not None:
                self.attn_temp.write(h, plan, cache)
            return x[:, clean:]
        first = clean if last else 0
        if first:
            x, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
                part[:, first:] for part in (x, gate_msa, shift_mlp, scale_mlp, gate_mlp)
            )
        x = x + gate_msa * self.attn_temp(h, plan, cache, first)
        if self.cross_attn is not None and text is not None:
            x = x + self.cross_attn(x, text)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))

    def text_keys_values(self, caption: Tensor, mask: Tensor) -> TextKeysValues:
        """Keys and values of a projected caption (B, M, D) with its mask (B, M)."""
        assert self.cross_attn is not None
        return self.cross_attn.keys_values(caption, mask)

    def _merge_mask(self, x: Tensor, clean: int) -> Tensor:
        """Mark clean frames (1) and noisy frames (0) in an extra input channel."""
        mask = x.new_zeros(*x.shape[:3], 1)
        mask[:, :clean] = 1
        assert self.attn_temp_pre_merge is not None
        out: Tensor = self.attn_temp_pre_merge(torch.cat([x, mask], dim=-1))
        return out

    @torch.no_grad()
    def zero_added_branches(self) -> None:
        """Start as a block of an image model: the branches added for video and text contribute nothing yet."""
        for attention in (self.attn_cf, self.attn_temp, self.cross_attn):
            if attention is not None:
                attention.proj.weight.zero_()
        if self.attn_temp_pre_merge is not None:
            weight = self.attn_temp_pre_merge.weight
            weight.copy_(torch.eye(*weight.shape))


class FinalLayer(nn.Module):
    """Norm, modulation by the timestep's own embedding, and a Linear to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.hidden_size) / config.hidden_size**0.5)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Tokens (B, T, S, D) and timestep embeddings (B, T, D) -> (B, T, S, p*p*C)."""
        shift, scale = (self.scale_shift_table + t[:, :, None]).unsqueeze(3).unbind(2)
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out


def _all_equal(timestep: Tensor) -> bool:
    """Whether (B,) timesteps on a CPU are the same; on a GPU, looking at them would wait for it."""
    has_values = timestep.device.type == "cpu" and type(timestep) is Tensor  # a fake tensor has none
    if not has_values or timestep.ndim > 1:
        return False
    return bool((timestep == timestep[0]).all())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift: tokens (B, T, S, D) by vectors (B, T, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
