"""Baselines that the benchmark compares the cache with. None of them is part of the method.

All share the model's forward, the backend and the dtype, and every optimization of the method except the cache:
modulation once per frame, captions projected once, only keys and values of clean frames in the last block. All run with
the causal model's weights, so ``bidirectional``, ``fixed-window`` and ``per-step-cache`` generate videos that differ
from those of ``cached``, and only their costs are compared.

Shape letters: B videos, C channels, L frames of a chunk, h, w latent size, K frames of the spatial prefix, N denoising
steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ca2vdm_cli.generate.context import Context, ContextOptions, RecomputedContext
from ca2vdm_cli.model.kv_cache import KVCache, TextKeysValues
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer


def fixed_window(model: CausalVideoTransformer, context_frames: int | None = None) -> int:
    """Default window of ``fixed-window``: one chunk, or the spatial prefix if that is longer."""
    config = model.config
    short = max(config.chunk_frames, config.spatial_prefix_frames)
    return min(short, context_frames or config.context_frames)


class ExtendableWindow(TemporalWindow):
    """No limit: a chunk sees every frame before it.

    Positions wrap as the model's do. The weights were not trained for that beyond the window, but the cost is the same.
    """

    def context(self, start: int) -> list[int]:
        return list(range(start))

    def sink_shift(self, start: int) -> int:
        return 0


class ExtendableContext(RecomputedContext):
    """All finished frames, recomputed in every denoising step; causal.

    Every chunk has a new shape, so compiling would not pay off, and blocks run uncompiled.
    """

    name = "recompute-extendable"
    description = "all finished frames, recomputed in every denoising step; causal"
    exact = extendable = True
    causal: ClassVar[bool] = True
    """Whether frames see only earlier frames; otherwise there is no mask, and every frame sees every frame."""

    @classmethod
    def create(cls, model: CausalVideoTransformer, batch_size: int, options: ContextOptions) -> ExtendableContext:
        return cls(model, ExtendableWindow(model.config))

    def open_chunk(self) -> None:
        super().open_chunk()
        mask = self._plan.temporal_mask if self.causal else None
        self._plan = replace(self._plan, static_shape=False, temporal_mask=mask)


class BidirectionalContext(ExtendableContext):
    """All finished frames, recomputed in every denoising step; every frame sees every frame, as in other models."""

    name = "bidirectional"
    description = "all finished frames, recomputed without a mask: every frame sees every frame, as in other models"
    exact = causal = False


class FixedWindowContext(RecomputedContext):
    """The last few frames, recomputed in every denoising step; nothing else is remembered."""

    name = "fixed-window"
    description = "the last few frames, recomputed in every denoising step"
    exact = False

    @classmethod
    def create(cls, model: CausalVideoTransformer, batch_size: int, options: ContextOptions) -> FixedWindowContext:
        frames = options.fixed_frames
        if frames is None:
            frames = fixed_window(model, options.context_frames)
        return cls(model, TemporalWindow(model.config, frames, sink_frames=0))


class PerStepCachedContext(Context):
    """N caches: denoising step i reads the keys and values that step i of earlier chunks computed.

    They are by-products of denoising, so there are no cache writes. After a step the chunk's temporal keys and values
    are in the ring anyway. Noisy frames don't need spatial keys and values themselves, so these are computed in
    addition, for the last K frames of the chunk. Given frames are written clean to all N caches.

    Args:
        model: the network.
        timesteps: timesteps of the N denoising steps, the same in every chunk.
        step_caches: one per denoising step.
    """

    name = "per-step-cache"
    description = "keys and values from a separate cache for every step, as in Live2Diff (arXiv 2407.08701)"
    caches = True

    @classmethod
    def create(cls, model: CausalVideoTransformer, batch_size: int, options: ContextOptions) -> PerStepCachedContext:
        timesteps = list(dict.fromkeys(options.timesteps))  # steps at the same timestep share a cache
        window = options.context_frames
        step_caches = [
            KVCache(model.config, batch_size, context_frames=window, dtype=model.dtype, device=model.device)
            for _ in timesteps
        ]
        return cls(model, timesteps, step_caches)

    def __init__(
        self, model: CausalVideoTransformer, timesteps: Sequence[float], step_caches: Sequence[KVCache]
    ) -> None:
        self.model, self.step_caches = model, step_caches
        self._first = step_caches[0]  # all hold the same number of frames and the same caption
        self.window = self._first.window
        self._timesteps = torch.tensor(timesteps, device=model.device)
        self._denoising = False

    def set_text(self, text: list[TextKeysValues]) -> None:
        for cache in self.step_caches:
            cache.text = text

    @property
    def frames(self) -> int:
        return self._first.frames

    @property
    def nbytes(self) -> int:
        text = self._first.text_nbytes
        return text + sum(cache.nbytes - text for cache in self.step_caches)

    def append(self, latents: Tensor) -> None:
        for cache in self.step_caches:
            if self._denoising:  # denoising has written them
                cache.commit(latents.shape[2])
            else:
                self.model.write(latents, cache)

    def open_chunk(self) -> None:
        plan = self._first.plan(self.model.config.chunk_frames, clean=False)
        self._plan = replace(plan, writes_noisy_prefix=True)
        self._denoising = True

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        step = int((self._timesteps - timestep[0]).abs().argmin())
        out: Tensor = self.model(x, timestep, self._plan, self.step_caches[step])
        return out
