"""Rollouts: clean frames that the model itself generates, so that training sees the errors that accumulate in sampling.

Each chunk is noised and denoised again through the cache, after the chunks generated before it (self-forcing, Huang et
al. 2025). With a strength below 1 some of the true chunk remains, so that the next chunk is still a sensible target
(self-resampling, Guo et al. 2025).

Shapes: latents (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ca2vdm_cli.generate.context import CachedContext
from ca2vdm_cli.generate.loop import GeneratorNoise, denoise_chunk
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
    """Clean frames (B, C, P + (J-1)·l, h, w): the clip's first P frames, then generated chunks.

    Args:
        model: the network.
        sampler: a sampler of the model's noise process.
        clip: true latents, T at least P + (J-1)·l.
        prefix: P, frames that stay true.
        chunks: J. The last chunk is not generated, since nothing follows it.
        strength: how far a true chunk is noised, as a share of the noise range; 1 starts from pure noise.
        generators: one CPU generator per clip.
        text: embedding and mask of the captions.
    """
    process, length, device = sampler.process, model.config.chunk_frames, clip.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    context = CachedContext(model, KVCache(model.config, clip.shape[0], dtype=dtype, device=device))
    if text is not None:
        context.set_text(model.text_keys_values(*text))
    noise = GeneratorNoise(generators, model.config.chunk_shape, device)
    highest = strength * (process.config.train_timesteps - 1)
    first_step = next((i for i, t in enumerate(sampler.timesteps) if t <= highest), len(sampler.timesteps) - 1)
    parts = [clip[:, :, :prefix]]
    for start in range(prefix, prefix + (chunks - 1) * length, length):
        if start:
            context.append(noise.perturb(process, parts[-1]))
        initial = noise.initial(process)
        x = sampler.start(initial)
        if first_step:
            x = sampler.noised(first_step, clip[:, :, start : start + length], initial)
        parts.append(denoise_chunk(context, sampler, x, noise.step, first_step=first_step))
    return torch.cat(parts, dim=2)
