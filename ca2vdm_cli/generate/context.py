"""Contexts: how a denoising step sees the finished frames of a run, cached or recomputed.

Shape letters: B videos, C channels, L frames of a chunk, n appended frames, h, w latent size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ca2vdm_cli.errors import UserError
from ca2vdm_cli.model.kv_cache import KVCache, TextKeysValues
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import Registry
from ca2vdm_cli.plugins import contexts as _contexts


@dataclass(frozen=True)
class ContextOptions:
    """Settings of a context, beside the model and the batch size."""

    context_frames: int | None = None
    """Window in frames; the model's own by default."""
    sink_frames: int | None = None
    """First frames that are never evicted; the model's own by default."""
    timesteps: Sequence[float] = ()
    """Timesteps of the denoising steps, for contexts that store something per step."""
    fixed_frames: int | None = None
    """Window of the baseline ``fixed-window``."""


class Context(ABC):
    """The finished frames of a run, as a denoising step sees them.

    Subclass it and register the class (hook ``ca2vdm_register_contexts``); ``sample --strategy``, ``bench --compare``
    and ``verify`` then accept its name.
    """

    name: ClassVar[str]
    """The name that selects it, such as ``--strategy cached``."""
    description: ClassVar[str]
    """One line."""
    exact: ClassVar[bool] = False
    """Whether outputs equal those of ``cached`` until the window slides. ``bench`` and ``verify`` check this."""
    caches: ClassVar[bool] = False
    """Whether it stores keys and values, so that shapes are the same in every chunk."""
    extendable: ClassVar[bool] = False
    """Whether it grows with the video instead of having a window."""

    model: CausalVideoTransformer
    window: TemporalWindow
    """The frames that a chunk sees, and their positions."""

    @classmethod
    def create(cls, model: CausalVideoTransformer, batch_size: int, options: ContextOptions) -> Context:
        """An empty context.

        Args:
            model: the network.
            batch_size: videos B generated together, including the unconditional half under guidance.
            options: further settings; a context ignores those that do not concern it.

        Raises:
            UsageError: the model's positions can't express the window.
        """
        raise NotImplementedError

    @abstractmethod
    def set_text(self, text: list[TextKeysValues]) -> None:
        """Set the caption of all chunks, as every block's keys and values."""

    @property
    @abstractmethod
    def frames(self) -> int:
        """Number of finished frames since the start of the video."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held from chunk to chunk."""

    @abstractmethod
    def append(self, latents: Tensor) -> None:
        """Add finished frames (B, C, n, h, w)."""

    @abstractmethod
    def open_chunk(self) -> None:
        """Prepare the denoising steps of the next chunk."""

    @abstractmethod
    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The network's output (B, out_channels, L, h, w) for the noisy chunk x."""


class CachedContext(Context):
    """The KV cache: finished frames are written to it once."""

    name = "cached"
    description = "keys and values, written once and shared by all denoising steps (this method)"
    exact = caches = True

    @classmethod
    def create(cls, model: CausalVideoTransformer, batch_size: int, options: ContextOptions) -> CachedContext:
        cache = KVCache(
            model.config,
            batch_size,
            context_frames=options.context_frames,
            sink_frames=options.sink_frames,
            dtype=model.dtype,
            device=model.device,
        )
        return cls(model, cache)

    def __init__(self, model: CausalVideoTransformer, cache: KVCache) -> None:
        self.model, self.cache, self.window = model, cache, cache.window

    def set_text(self, text: list[TextKeysValues]) -> None:
        self.cache.text = text

    @property
    def frames(self) -> int:
        return self.cache.frames

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def append(self, latents: Tensor) -> None:
        self.model.write(latents, self.cache)

    def open_chunk(self) -> None:
        self._plan = self.cache.plan(self.model.config.chunk_frames, clean=False)

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.model(x, timestep, self._plan, self.cache)
        return out


class RecomputedContext(Context):
    """The latents of the window's frames, which pass through the network again in every denoising step."""

    name = "recompute"
    description = "the window's frames, recomputed in every denoising step"
    exact = True

    @classmethod
    def create(cls, model: CausalVideoTransformer, batch_size: int, options: ContextOptions) -> RecomputedContext:
        return cls(model, TemporalWindow(model.config, options.context_frames, options.sink_frames))

    def __init__(self, model: CausalVideoTransformer, window: TemporalWindow) -> None:
        self.model, self.window = model, window
        self._text: list[TextKeysValues] = []
        self._frames = 0
        self._latents: Tensor | None = None

    def set_text(self, text: list[TextKeysValues]) -> None:
        self._text = text

    @property
    def frames(self) -> int:
        return self._frames

    @property
    def nbytes(self) -> int:
        return 0 if self._latents is None else self._latents.nbytes

    def append(self, latents: Tensor) -> None:
        end = self._frames + latents.shape[2]
        numbers = [*self.window.context(self._frames), *range(self._frames, end)]
        joined = latents if self._latents is None else torch.cat([self._latents, latents], dim=2)
        self._latents = joined[:, :, [numbers.index(f) for f in self.window.context(end)]]
        self._frames = end

    def open_chunk(self) -> None:
        self._plan = self.model.context_plan(self.model.config.chunk_frames, self._frames, self.window)

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        if self._latents is not None:
            x = torch.cat([self._latents.to(x.dtype), x], dim=2)
        out: Tensor = self.model(x, timestep, self._plan, text=self._text)
        return out


contexts: Registry[type[Context]] = _contexts
"""All contexts, by name."""


def make_context(
    model: CausalVideoTransformer,
    name: str,
    batch_size: int,
    *,
    context_frames: int | None = None,
    sink_frames: int | None = None,
    timesteps: Sequence[float] = (),
    fixed_frames: int | None = None,
) -> Context:
    """An empty context, by name; see ``Context.create`` and ``ContextOptions``."""
    options = ContextOptions(context_frames, sink_frames, timesteps, fixed_frames)
    context = contexts[name].create(model, batch_size, options)
    for attribute in ("model", "window"):
        if not hasattr(context, attribute):
            raise UserError(f"context {name!r} of {contexts.owner(name)} has no {attribute}; set it in create()")
    return context
