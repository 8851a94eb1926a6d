"""A clip's clean frames as the model itself makes them, so that training meets the errors that sampling makes.

Each chunk is noised and made again through the cache, after the chunks that were made before it (self-forcing, Huang et
al. 2025; with a strength below 1 the true chunk shines through, which keeps the target of the chunk to come true, as in
self-resampling, Guo et al. 2025).

Shapes: latents (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ca2vdm_cli.generate.context import CachedContext
from ca2vdm_cli.generate.samplers import Sampler
from ca2vdm_cli.model.kv_cache import KVCache
from ca2vdm_cli.model.transformer import CausalVideoTransformer


@torch.no_grad()
def self_forcing_rollout(
    model: CausalVideoTransformer,
    sampler: Sampler,
    clip: Tensor,
    prefix: int,
    chunks: int,
    strength: float,
    generators: Sequence[torch.Generator],
    text: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Clean frames (B, C, P + (J-1)·l, h, w): the clip's first P, then the model's own chunks.

    Args:
        model: the network.
        sampler: of the model's noise process.
        clip: true latents, T at least P + (J-1)·l.
        prefix: P, frames that stay true.
        chunks: J; the last is not made, nothing follows it.
        strength: share of the noise range that a true chunk is noised to; 1 begins at noise alone.
        generators: one a clip, on the CPU.
        text: embedding and mask of the captions.
    """
    process, length, device = sampler.process, model.config.chunk_frames, clip.device
    half = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if half else model.dtype
    context = CachedContext(model, KVCache(model.config, clip.shape[0], dtype=dtype, device=device))
    if text is not None:
        context.set_text(model.text_keys_values(*text))

    def write(frames: Tensor) -> None:
        rows = zip(frames.split(1), generators, strict=True)
        context.append(torch.cat([process.perturb_prefix(row, length, generator) for row, generator in rows]))

    highest = strength * (process.config.train_timesteps - 1)
    first = next((i for i, t in enumerate(sampler.timesteps) if t <= highest), len(sampler.timesteps) - 1)
    made = [clip[:, :, :prefix]]
    if prefix:
        write(made[0])
    for start in range(prefix, prefix + (chunks - 1) * length, length):
        true = clip[:, :, start : start + length]
        shape = tuple(true.shape[1:])
        noise = torch.stack([process.draw_noise(shape, generator) for generator in generators])
        x = sampler.start(noise.to(device))
        if first:
            x = sampler.noised(first, true, noise.to(device))

        def draw(shape: tuple[int, ...] = shape) -> Tensor:
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

        context.open_chunk()
        for i in range(first, len(sampler.timesteps)):
            timestep = torch.full((len(x),), sampler.timesteps[i], device=device)
            output = context.predict(sampler.scale_input(i, x), timestep).float()
            x = sampler.step(i, x, output, lambda _: draw().to(device))
        made.append(x)
        if start + 2 * length <= prefix + (chunks - 1) * length:
            write(x)
    return torch.cat(made, dim=2)
