"""The loop that generates a video chunk by chunk, and the seeded noise it starts from.

Shape letters: B videos, C channels, L frames of a chunk, P frames of context, h, w latent size, M text tokens, N
denoising steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from .samplers import DrawNoise, Sampler


class NoiseSource(Protocol):
    """All randomness of a run."""

    def chunk(self, index: int) -> None:
        """Begin chunk ``index``; -1 is the given context."""

    def initial(self, process: NoiseProcess) -> Tensor:
        """The chunk's initial noise (B, C, L, h, w)."""

    def step(self, index: int) -> Tensor:
        """The noise (B, C, L, h, w) added after denoising step ``index``."""

    def perturb(self, process: NoiseProcess, latents: Tensor) -> Tensor:
        """Prefix perturbation of finished frames, if the weights were trained with it."""


class GeneratorNoise:
    """Noise drawn from one random generator per video, on the CPU, so that it is the same on every device.

    Args:
        generators: one CPU generator per video.
        shape: (C, L, h, w) of a chunk.
        device: device of the returned noise.
    """

    def __init__(self, generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> None:
        self.generators, self.shape, self.device = generators, shape, device

    def initial(self, process: NoiseProcess) -> Tensor:
        """The chunk's initial noise (B, C, L, h, w)."""
        return torch.stack([process.draw_noise(self.shape, g) for g in self.generators]).to(self.device)

    def step(self, index: int) -> Tensor:
        """The noise (B, C, L, h, w) added after denoising step ``index``."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)

    def perturb(self, process: NoiseProcess, latents: Tensor) -> Tensor:
        """Prefix perturbation of finished frames (B, C, n, h, w), video by video."""
        videos = zip(latents.split(1), self.generators, strict=True)
        return torch.cat([process.perturb_prefix(video, self.shape[1], generator) for video, generator in videos])


class SeededNoise(GeneratorNoise):
    """Noise drawn from (seed, video index, chunk index).

    A video therefore depends neither on its length nor on the videos generated beside it.

    Args:
        seed: the run's seed.
        videos: indices of the B videos generated together.
        shape: (C, L, h, w) of a chunk.
        device: device of the returned noise.
    """

    def __init__(self, seed: int, videos: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        if seed < 0:
            raise UsageError(f"seed: {seed} must not be negative")
        super().__init__([], shape, device)
        self.seed, self.videos = seed, videos

    def chunk(self, index: int) -> None:
        """Begin chunk ``index``; -1 is the given context."""
        seeds = [np.random.SeedSequence([self.seed, video, index + 1]) for video in self.videos]
        states = [int(seed.generate_state(1, np.uint64)[0]) for seed in seeds]
        self.generators = [torch.Generator().manual_seed(state % 2**63) for state in states]


@dataclass(frozen=True)
class Caption:
    """Text embeddings, and how strongly to follow them."""

    embedding: Tensor
    """(B, M, text_channels) from the text encoder."""
    mask: Tensor
    """(B, M), nonzero at real tokens."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 turns it off. Both halves share one batch, and both have a context."""

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional half."""
        return self.guidance_scale != 1.0


@dataclass(frozen=True)
class LatentChunk:
    """One finished chunk."""

    index: int
    """Number of the chunk, from 0."""
    first_frame: int
    """Number of its first frame, counting the given context."""
    latents: Tensor
    """(B, C, L, h, w) float32."""
    write_seconds: float
    """Time spent writing the preceding frames to the context: the previous chunk, or the given frames."""
    denoise_seconds: float
    """Time spent in the N denoising steps."""


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
    """Generate chunk after chunk. Each is yielded as soon as it is denoised, before it is written to the context.

    Args:
        context: an empty context (see ``make_context``).
        process: the model's noise process.
        sampler: how a chunk is denoised.
        noise: all randomness.
        chunks: number of chunks.
        given: clean latents (B, C, P, h, w) to continue, P at most the window; None starts from an empty context.
        caption: needed by models with text. If it is guided, the context must have room for 2B videos.
        on_step: called with (chunk index, steps done).

    Raises:
        UsageError: guidance for a model without text, or a video longer than the model's absolute positions.
    """
    model = context.model
    guidance_scale = 1.0 if caption is None else caption.guidance_scale
    if caption is not None:
        context.set_text(_text_keys_values(model, caption))

    noise.chunk(-1)
    finished = None if given is None else noise.perturb(process, given)  # frames that are not in the context yet
    for index in range(chunks):
        synchronize(model.device)
        began = time.perf_counter()
        if finished is not None:
            context.append(torch.cat([finished, finished]) if guidance_scale != 1 else finished)
        synchronize(model.device)
        written = time.perf_counter()
        noise.chunk(index)
        first_frame = context.frames
        x = denoise_chunk(
            context,
            sampler,
            sampler.start(noise.initial(process)),
            noise.step,
            guidance_scale=guidance_scale,
            on_step=None if on_step is None else partial(on_step, index),
        )
        synchronize(model.device)
        denoised = time.perf_counter()
        finished = noise.perturb(process, x)
        yield LatentChunk(index, first_frame, x, written - began, denoised - written)


def denoise_chunk(
    context: Context,
    sampler: Sampler,
    x: Tensor,
    noise: DrawNoise,
    *,
    first_step: int = 0,
    guidance_scale: float = 1.0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Denoise one chunk in a context.

    Args:
        context: the finished frames. With guidance it holds 2B videos, the conditional half first.
        sampler: how the chunk is denoised; ``start`` has been called.
        x: the chunk (B, C, L, h, w) at step ``first_step``.
        noise: draws the noise of a step.
        first_step: the first denoising step to take.
        guidance_scale: classifier-free guidance; 1 turns it off.
        on_step: called with the number of steps done.

    Returns:
        The finished latents (B, C, L, h, w).
    """
    context.open_chunk()
    for i in range(first_step, len(sampler.timesteps)):
        inputs = sampler.scale_input(i, x)
        if guidance_scale != 1:
            inputs = torch.cat([inputs, inputs])
        timestep = torch.full((len(inputs),), sampler.timesteps[i], device=x.device)
        output = context.predict(inputs, timestep).float()
        if guidance_scale != 1:
            output = _guide(output, guidance_scale, x.shape[1])
        x = sampler.step(i, x, output, noise)
        if on_step is not None:
            on_step(i + 1)
    return x


def stored_caption(model: CausalVideoTransformer, videos: int) -> Caption | None:
    """The stored unconditional caption, for videos without a prompt; None for a model without text."""
    stored = model.unconditional_caption(videos)
    return None if stored is None else Caption(*stored)


def _text_keys_values(model: CausalVideoTransformer, caption: Caption) -> list[TextKeysValues]:
    """Keys and values of a caption. Under guidance the stored unconditional caption follows, with the same mask."""
    if not caption.guided:
        return model.text_keys_values(caption.embedding, caption.mask)
    stored = model.unconditional_caption(len(caption.embedding))
    if stored is None:
        raise UsageError("caption: this model takes no text, so there is nothing to guide")
    unconditional = stored[0].to(caption.embedding)
    return model.text_keys_values(torch.cat([caption.embedding, unconditional]), caption.mask.repeat(2, 1))


def _guide(output: Tensor, scale: float, channels: int) -> Tensor:
    """Guidance of the noise channels only; the variance is that of the conditional half."""
    conditional, unconditional = output.chunk(2)
    noise = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([noise, conditional[:, channels:]], dim=1)
