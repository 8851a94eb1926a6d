"""What the benchmark compares the cache with. Nothing here is part of the method.

All contestants share the model's forward, the backend and the precision, and whatever makes the method faster that is
not its cache: modulation once a frame, captions projected once, the last block's clean frames left out but for keys
and values. Weights are the causal model's. ``bidirectional``, ``fixed-window`` and ``per-step-cache`` therefore make
another video than ``cached`` does, and only their costs are compared.

Shape letters: B videos, C channels, L frames of a chunk, h, w latent size, S tokens a frame, D width, K frames of the
spatial prefix, E head size, N denoising steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ca2vdm_cli.generate.context import Context, ContextOptions, RecomputedContext
from ca2vdm_cli.model.frame_plan import FramePlan
from ca2vdm_cli.model.kv_cache import KVCache, TextKeysValues
from ca2vdm_cli.model.layers import PrefixAttention
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer


def fixed_window(model: CausalVideoTransformer, context_frames: int | None = None) -> int:
    """What ``fixed-window`` sees unless told otherwise: one chunk, or the spatial prefix where that is longer."""
    config = model.config
    short = max(config.chunk_frames, config.spatial_prefix_frames)
    return min(short, context_frames or config.context_frames)


class ExtendableWindow(TemporalWindow):
    """No window: a chunk sees every frame before it.

    Positions wrap as the model's own do. Beyond the window that is nothing the weights have learned, at the same cost.
    """

    def context(self, start: int) -> list[int]:
        return list(range(start))

    def sink_shift(self, start: int) -> int:
        return 0


class ExtendableContext(RecomputedContext):
    """All finished frames, fed again with every step; causal.

    Its shapes are new in every chunk, so a backend that compiles has nothing to reuse, and blocks run as they are.
    """

    name = "recompute-extendable"
    description = "all finished frames, fed again in every denoising step; causal"
    exact = extendable = True
    causal: ClassVar[bool] = True
    """Whether frames see earlier frames only; otherwise every frame sees every frame, without any mask."""

    @classmethod
    def create(cls, model: CausalVideoTransformer, batch_size: int, options: ContextOptions) -> ExtendableContext:
        return cls(model, ExtendableWindow(model.config))

    def open_chunk(self) -> None:
        super().open_chunk()
        mask = self._plan.temporal_mask if self.causal else None
        self._plan = replace(self._plan, static_shape=False, temporal_mask=mask)


class BidirectionalContext(ExtendableContext):
    """Every frame sees every frame, and all finished frames are fed again: what other models do."""

    name = "bidirectional"
    description = "all finished frames, and no mask: every frame sees every frame, as in other models"
    exact = causal = False


class FixedWindowContext(RecomputedContext):
    """The last few frames are fed again, and nothing else is remembered."""

    name = "fixed-window"
    description = "the last few frames, fed again in every denoising step"
    exact = False

    @classmethod
    def create(cls, model: CausalVideoTransformer, batch_size: int, options: ContextOptions) -> FixedWindowContext:
        frames = options.fixed_frames
        if frames is None:
            frames = fixed_window(model, options.context_frames)
        return cls(model, TemporalWindow(model.config, frames, sink_frames=0))


@dataclass(frozen=True)
class _KeepingPlan(FramePlan):
    """A noisy chunk whose keys and values stay: temporal ones are in the ring already, spatial ones are kept too."""


class PerStepCachedContext(Context):
    """N caches: denoising step i reads the keys and values that step i of earlier chunks has computed.

    They are by-products of denoising, so there is no forward that only writes. The temporal ones lie in the ring after
    the step anyway; those of the spatial prefix are not needed by the noisy frames themselves and are projected beside
    them, for the last K frames of the chunk. Frames that the video is given are written clean to all N caches.

    Args:
        model: the network.
        timesteps: of the N denoising steps, the same in every chunk.
        caches: one for each of them.
    """

    name = "per-step-cache"
    description = "keys and values from a separate cache for every step, as Live2Diff keeps (arXiv 2407.08701)"
    caches = True

    @classmethod
    def create(cls, model: CausalVideoTransformer, batch_size: int, options: ContextOptions) -> PerStepCachedContext:
        window = options.context_frames
        caches = [
            KVCache(model.config, batch_size, context_frames=window, dtype=model.dtype, device=model.device)
            for _ in options.timesteps
        ]
        return cls(model, options.timesteps, caches)

    def __init__(self, model: CausalVideoTransformer, timesteps: Sequence[float], caches: Sequence[KVCache]) -> None:
        self.model, self.window = model, caches[0].window
        self.by_step = {_key(torch.tensor([t])): cache for t, cache in zip(timesteps, caches, strict=True)}
        self._any = next(iter(self.by_step.values()))  # all hold the same frames
        self._begun = False
        self._prefix_attentions = [part for part in model.modules() if isinstance(part, PrefixAttention)]

    def set_text(self, text: list[TextKeysValues]) -> None:
        for cache in self.by_step.values():
            cache.text = text

    @property
    def frames(self) -> int:
        return self._any.frames

    @property
    def nbytes(self) -> int:
        text = self._any.text_nbytes  # all have the same
        return text + sum(cache.nbytes - text for cache in self.by_step.values())

    def append(self, latents: Tensor) -> None:
        for cache in self.by_step.values():
            if self._begun:
                cache.commit(latents.shape[2])
            else:
                self.model.write(latents, cache)

    def open_chunk(self) -> None:
        plan = self._any.plan(self.model.config.chunk_frames, clean=False)
        self._plan = _KeepingPlan(**{field.name: getattr(plan, field.name) for field in fields(plan)})
        self._begun = True

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        with _kept_prefix(self._prefix_attentions):
            out: Tensor = self.model(x, timestep, self._plan, self.by_step[_key(timestep)])
        return out


def _key(timestep: Tensor) -> float:
    """What identifies a denoising step: its timestep, in the precision in which the network is told."""
    return float(timestep[0].item())


@contextmanager
def _kept_prefix(attentions: list[PrefixAttention]) -> Iterator[None]:
    """Within, prefix-enhanced attention also writes the spatial keys and values of a noisy chunk to the cache."""
    hooks = [attention.register_forward_hook(_keep_prefix) for attention in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keep_prefix(attention: torch.nn.Module, arguments: Any, output: Tensor) -> None:
    x, plan, cache = arguments
    if not isinstance(plan, _KeepingPlan):
        return
    assert isinstance(attention, PrefixAttention) and plan.has_prefix is not None
    keys_values = attention.project(x.index_select(1, plan.spatial_source), 1, 3)  # (B, K, S, H, E) each
    for buffer, new in zip((cache.spatial_k, cache.spatial_v), keys_values, strict=True):
        frames = new.permute(0, 3, 1, 2, 4)  # (B, H, K, S, E)
        if attention.first_frame:  # the video's first frame, once kept, stays
            frames = torch.where(plan.has_prefix, buffer, frames)
        buffer.index_copy_(2, plan.spatial_slots, frames)
