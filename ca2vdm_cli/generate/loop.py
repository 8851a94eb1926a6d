"""The loop that makes a video of chunks, and what it needs: seeded noise, and a context of finished frames.

Shape letters: B videos, C channels, L frames of a chunk, P frames of context, h, w latent size, N denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.model.kv_cache import TextKeysValues
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.runtime import synchronize

from .context import Context
from .diffusion import NoiseProcess
from .samplers import Sampler


class NoiseSource(Protocol):
    """All randomness of a run."""

    def chunk(self, index: int) -> None:
        """Begin chunk ``index``; -1 is the context that a video is given."""

    def initial(self, process: NoiseProcess) -> Tensor:
        """The chunk's starting noise (B, C, L, h, w)."""

    def step(self, index: int) -> Tensor:
        """The noise (B, C, L, h, w) added after denoising step ``index``."""

    def perturb(self, process: NoiseProcess, latents: Tensor) -> Tensor:
        """Prefix perturbation of finished frames, where the weights were trained with it."""


class SeededNoise:
    """Noise drawn from (seed, video index, chunk index).

    What a video looks like therefore depends neither on how long it is nor on what is generated beside it. Numbers are
    drawn on the CPU, so that they are the same on every device.

    Args:
        seed: the run's seed.
        videos: indices of the B videos generated together.
        shape: (C, L, h, w) of a chunk.
        device: where the noise is needed.
    """

    def __init__(self, seed: int, videos: list[int], shape: tuple[int, ...], device: torch.device) -> None:
        if seed < 0:
            raise UsageError(f"seed: {seed} must not be negative")
        self.seed, self.videos, self.shape, self.device = seed, videos, shape, device
        self._generators: list[torch.Generator] = []

    def chunk(self, index: int) -> None:
        """Begin chunk ``index``; -1 is the context that a video is given."""
        self._generators = []
        for video in self.videos:
            state = np.random.SeedSequence([self.seed, video, index + 1]).generate_state(1, np.uint64)[0]
            self._generators.append(torch.Generator().manual_seed(int(state) % 2**63))

    def initial(self, process: NoiseProcess) -> Tensor:
        """The chunk's starting noise (B, C, L, h, w)."""
        return torch.stack([process.draw_noise(self.shape, g) for g in self._generators]).to(self.device)

    def step(self, index: int) -> Tensor:
        """The noise added after denoising step ``index``."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self._generators]).to(self.device)

    def perturb(self, process: NoiseProcess, latents: Tensor) -> Tensor:
        """Prefix perturbation, a video at a time."""
        videos = zip(latents.split(1), self._generators, strict=True)
        return torch.cat([process.perturb_prefix(one, self.shape[1], generator) for one, generator in videos])


@dataclass(frozen=True)
class Caption:
    """Text embeddings, and how strongly to follow them."""

    embedding: Tensor
    """(B, M, text_channels) from the text encoder."""
    mask: Tensor
    """(B, M), nonzero at real tokens."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 turns it off. Both halves are one batch, and both have a context."""

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional half."""
        return self.guidance_scale != 1.0


@dataclass(frozen=True)
class LatentChunk:
    """One finished chunk."""

    index: int
    """Which chunk, from 0."""
    first_frame: int
    """Number of its first frame, the given context included."""
    latents: Tensor
    """(B, C, L, h, w) float32."""
    write_seconds: float
    """Time to make the frames before it context: the previous chunk's cache write, or that of the given frames."""
    denoise_seconds: float
    """Time of the N denoising steps."""


@torch.inference_mode()
def generate(
    context: Context,
    process: NoiseProcess,
    sampler: Sampler,
    noise: NoiseSource,
    chunks: int,
    *,
    given: Tensor | None = None,
    caption: Caption | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[LatentChunk]:
    """Generate chunk after chunk; each is yielded as soon as it is denoised, before it is written to the cache.

    Args:
        context: an empty context (see ``make_context``).
        process: the model's noise process.
        sampler: how a chunk is denoised.
        noise: all randomness.
        chunks: how many.
        given: clean latents (B, C, P, h, w) to continue, P at most the window; None begins from an empty context.
        caption: needed by models with text; if it is guided, the context must have room for 2B videos.
        on_step: called with (chunk index, steps done).

    Raises:
        UsageError: guidance for a model without text, or a video that has outgrown positions that do not wrap.
    """
    model = context.model
    channels = model.config.in_channels
    guided = caption is not None and caption.guided
    if caption is not None:
        context.set_text(_text_keys_values(model, caption))

    def both(x: Tensor) -> Tensor:
        return torch.cat([x, x]) if guided else x

    noise.chunk(-1)
    finished = both(noise.perturb(process, given)) if given is not None else None  # not in the context yet
    for index in range(chunks):
        synchronize(model.device)
        began = time.perf_counter()
        if finished is not None:
            context.append(finished)
        synchronize(model.device)
        written = time.perf_counter()
        noise.chunk(index)
        first_frame = context.frames
        x = sampler.start(noise.initial(process))
        context.open_chunk()
        for i, t in enumerate(sampler.timesteps):
            seen = both(sampler.scale_input(i, x))
            timestep = torch.full((seen.shape[0],), t, device=x.device)
            output = context.predict(seen, timestep).float()
            if caption is not None and guided:
                output = _guide(output, caption.guidance_scale, channels)
            x = sampler.step(i, x, output, noise.step)
            if on_step is not None:
                on_step(index, i + 1)
        synchronize(model.device)
        denoised = time.perf_counter()
        finished = both(noise.perturb(process, x))
        yield LatentChunk(index, first_frame, x, written - began, denoised - written)


def stored_caption(model: CausalVideoTransformer, videos: int) -> Caption | None:
    """What a model with text is given where there is no text: its stored unconditional caption. None without text."""
    stored = model.unconditional_caption(videos)
    return None if stored is None else Caption(*stored)


def _text_keys_values(model: CausalVideoTransformer, caption: Caption) -> list[TextKeysValues]:
    """The caption's; with guidance, then those of the stored unconditional caption under the same mask."""
    if not caption.guided:
        return model.text_keys_values(caption.embedding, caption.mask)
    stored = model.unconditional_caption(len(caption.embedding))
    if stored is None:
        raise UsageError("caption: this model has no text, so there is nothing to guide")
    unconditional = stored[0].to(caption.embedding)
    return model.text_keys_values(torch.cat([caption.embedding, unconditional]), caption.mask.repeat(2, 1))


def _guide(output: Tensor, scale: float, channels: int) -> Tensor:
    """Guidance on the noise channels only; the variance is the conditional half's."""
    conditional, unconditional = output.chunk(2)
    noise = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([noise, conditional[:, channels:]], dim=1)
