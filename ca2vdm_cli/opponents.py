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
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .frame_plan import FrameClock, FramePlan
from .generation import Context, RecomputedContext, Strategy, make_context
from .kv_cache import KVCache, TextKeysValues
from .layers import PrefixAttention
from .model import CausalVideoTransformer


class Contestant(str, Enum):
    """Ways to give a denoising step the finished frames."""

    CACHED = "cached"
    """Ours: keys and values written once, shared by all denoising steps."""
    RECOMPUTE = "recompute"
    """The frames of the window are fed again in every denoising step; causal."""
    RECOMPUTE_EXTENDABLE = "recompute-extendable"
    """The same without a window: all finished frames are fed again."""
    BIDIRECTIONAL = "bidirectional"
    """Every frame sees every frame, and all finished frames are fed again: what other models do."""
    FIXED_WINDOW = "fixed-window"
    """The last few frames are fed again, and nothing else is remembered."""
    PER_STEP_CACHE = "per-step-cache"
    """A cache for every denoising step, as Live2Diff keeps (arXiv 2407.08701)."""

    @property
    def exact(self) -> bool:
        """Whether its outputs equal the cache's until the window slides."""
        return self in (Contestant.CACHED, Contestant.RECOMPUTE, Contestant.RECOMPUTE_EXTENDABLE)

    @property
    def extendable(self) -> bool:
        """Whether its context grows with the video, without a window."""
        return self in (Contestant.RECOMPUTE_EXTENDABLE, Contestant.BIDIRECTIONAL)

    @property
    def caches(self) -> bool:
        """Whether it keeps keys and values."""
        return self in (Contestant.CACHED, Contestant.PER_STEP_CACHE)


def make_contestant(
    model: CausalVideoTransformer,
    contestant: Contestant,
    timesteps: Sequence[float],
    *,
    context_frames: int | None = None,
    fixed_frames: int | None = None,
) -> Context:
    """An empty context of that kind for one video.

    Args:
        timesteps: of the denoising steps, for those that keep something for each.
        context_frames: window of those that have one; the model's own by default.
        fixed_frames: window of ``fixed-window``; see ``fixed_window``.

    Raises:
        UsageError: a window that the model's positions can't express.
    """
    if contestant.extendable:
        return ExtendableContext(model, causal=contestant is Contestant.RECOMPUTE_EXTENDABLE)
    if contestant is Contestant.FIXED_WINDOW:
        frames = fixed_window(model, context_frames) if fixed_frames is None else fixed_frames
        return RecomputedContext(model, FrameClock(model.config, frames, sink_frames=0))
    if contestant is Contestant.PER_STEP_CACHE:
        return PerStepCachedContext(model, timesteps, context_frames)
    return make_context(model, Strategy(contestant.value), 1, context_frames=context_frames)


def fixed_window(model: CausalVideoTransformer, context_frames: int | None = None) -> int:
    """What ``fixed-window`` sees unless told otherwise: one chunk, or the spatial prefix where that is longer."""
    config = model.config
    short = max(config.chunk_frames, config.spatial_prefix_frames)
    return min(short, context_frames or config.context_frames)


class ExtendableClock(FrameClock):
    """No window: a chunk sees every frame before it.

    Positions wrap as the model's own do. Beyond the window that is nothing the weights have learned, at the same cost.
    """

    def context(self, start: int) -> list[int]:
        return list(range(start))

    def sink_shift(self, start: int) -> int:
        return 0


class ExtendableContext(RecomputedContext):
    """All finished frames, fed again with every step.

    Its shapes are new in every chunk, so a backend that compiles has nothing to reuse, and blocks run as they are.

    Args:
        model: the network.
        causal: whether frames see earlier frames only; otherwise every frame sees every frame, without any mask.
    """

    def __init__(self, model: CausalVideoTransformer, *, causal: bool) -> None:
        super().__init__(model, ExtendableClock(model.config))
        self.causal = causal

    def open_chunk(self) -> None:
        super().open_chunk()
        mask = self._plan.temporal_mask if self.causal else None
        self._plan = replace(self._plan, recurs=False, temporal_mask=mask)


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
        context_frames: window in frames; the model's own by default.
    """

    def __init__(
        self, model: CausalVideoTransformer, timesteps: Sequence[float], context_frames: int | None = None
    ) -> None:
        self.model, self.clock = model, FrameClock(model.config, context_frames)
        self.caches = {
            _key(torch.tensor([t])): KVCache(
                model.config, 1, context_frames=context_frames, dtype=model.dtype, device=model.device
            )
            for t in timesteps
        }
        self._any = next(iter(self.caches.values()))  # all hold the same frames
        self._begun = False
        self._prefix_attentions = [part for part in model.modules() if isinstance(part, PrefixAttention)]

    def set_text(self, text: list[TextKeysValues]) -> None:
        for cache in self.caches.values():
            cache.text = text

    @property
    def frames(self) -> int:
        return self._any.frames

    @property
    def nbytes(self) -> int:
        text = self._any.text_nbytes  # all have the same
        return text + sum(cache.nbytes - text for cache in self.caches.values())

    def append(self, latents: Tensor) -> None:
        for cache in self.caches.values():
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
            out: Tensor = self.model(x, timestep, self._plan, self.caches[_key(timestep)])
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
