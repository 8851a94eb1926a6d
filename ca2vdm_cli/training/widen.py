"""Make a model twice as wide without changing what it computes, to train it further (Net2Net, Chen et al. 2016).

Each channel and each head of the narrow model exists twice in the wide one. A layer that reads a channel reads both
copies, each with a share of the old weight; the two shares add up to 1. Shares are random, because with equal shares
both copies would get equal gradients and stay identical. A LayerNorm sees the same mean and variance as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ca2vdm_cli.checkpoint import load_weights
from ca2vdm_cli.config import ModelConfig
from ca2vdm_cli.loading import build_model
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import choose_backend

SMALLEST_SHARE = 0.25
"""Smallest share of a weight that one copy gets; the other copy gets the rest."""


def wider(config: ModelConfig) -> ModelConfig:
    """Twice the width, with heads of the same size."""
    return replace(config, hidden_size=2 * config.hidden_size, num_heads=2 * config.num_heads)


def widen(narrow: Mapping[str, Tensor], config: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """The narrow model's weights and buffers, widened for the wide model of ``config``."""
    half = config.hidden_size // 2
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in make_model(config).state_dict().items()}
    wide = {}
    for name, tensor in narrow.items():
        for dim, size in enumerate(shapes[name]):
            if size == tensor.shape[dim]:
                continue
            # A dimension is one or several widths, perhaps plus the mask's channel, which is not doubled.
            widths, rest = tensor.split([tensor.shape[dim] // half * half, tensor.shape[dim] % half], dim)
            copies = [widths.unflatten(dim, (-1, half))] * 2
            if dim == 1 and name.endswith(".weight"):  # a layer's inputs
                share = SMALLEST_SHARE + (1 - 2 * SMALLEST_SHARE) * torch.rand(copies[0].shape, generator=generator)
                copies = [copies[0] * share, copies[1] * (1 - share)]
            tensor = torch.cat([torch.cat(copies, dim + 1).flatten(dim, dim + 1), rest], dim)
        wide[name] = tensor
    return wide


def widened(weights: dict[str, Tensor], config: ModelConfig, seed: int, source: str) -> dict[str, Tensor]:
    """Check and widen the weights of a narrow model.

    Args:
        weights: the narrow model's.
        config: the narrow model's sizes; the result fits ``wider(config)``.
        seed: seed of the shares.
        source: where the weights come from, for errors.

    Raises:
        UserError: the weights don't fit the narrow model.
    """
    narrow = make_model(config)
    load_weights(narrow, weights, source)
    return widen(narrow.state_dict(), wider(config), torch.Generator().manual_seed(seed))


def make_model(config: ModelConfig) -> CausalVideoTransformer:
    """A model of these sizes, on the CPU in float32."""
    return build_model(config, choose_backend("eager", torch.device("cpu"), torch.float32))
