"""Low-rank adapters (LoRA, Hu et al. 2021): a frozen matrix W is used as W + alpha / rank · up · down.

An adapter is a parametrization of the weight itself, so that every reader of a weight gets the adapted one. Wrapper
layers, as in peft, would be bypassed: attention reads the rows of ``qkv.weight`` that it needs and never calls ``qkv``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_INSIDE = ".parametrizations.weight."
"""Separates an adapted layer's name from its parts: ``original``, the layer's own weight, and the adapter's."""
_OWN = "original"


class LowRank(nn.Module):
    """Adds ``up`` (n, rank) times ``down`` (rank, m) to a weight (n, m). ``up`` starts at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """(n, m) -> (n, m)."""
        return weight + self.scale * (self.up @ self.down)


def add_adapters(blocks: nn.Module, rank: int, alpha: float) -> None:
    """Give every linear layer in ``blocks`` an adapter, and freeze everything else in them."""
    blocks.requires_grad_(False)
    layers = [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with adapters merged into the weights, under the names of a model without adapters."""
    state: dict[str, Tensor] = model.state_dict()
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        name, adapted, part = key.partition(_INSIDE)
        if not adapted:
            weights[key] = value
        elif part == _OWN:
            with torch.no_grad():
                layer = model.get_submodule(name)
                assert isinstance(layer.weight, Tensor)
                weights[f"{name}.weight"] = layer.weight
    return weights


def split(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for the model: ``weights`` (named as by ``merged``) as own weights, and the current adapters."""
    state = dict(weights)
    for key, value in model.state_dict().items():
        name, adapted, part = key.partition(_INSIDE)
        if adapted and part != _OWN:
            state[key] = value
        elif adapted and f"{name}.weight" in state:
            state[key] = state.pop(f"{name}.weight")
    return state
