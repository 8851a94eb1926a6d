"""Low-rank adapters (LoRA, Hu et al. 2021): a frozen matrix W is used as W + alpha / rank · up · down.

An adapter is a parametrisation of the weight itself. Layers around layers, as peft has them, would be passed by: an
attention takes the rows of ``qkv.weight`` that it needs, and never calls ``qkv``. So whoever reads a weight reads the
adapted one, and the merged weights under the published names are what the model says its weights are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_INSIDE = ".parametrizations.weight."
"""Between the name of an adapted layer and those of its parts: ``original``, its own weight, and the adapter's."""
_OWN = "original"


class LowRank(nn.Module):
    """Adds ``up`` (n, rank) times ``down`` (rank, m) to a weight (n, m); nothing at first, as ``up`` is zero."""

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
    """Give every linear layer in ``blocks`` an adapter; those alone are trained from then on."""
    blocks.requires_grad_(False)
    layers = [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with adapters merged, in the names of a model without them; without adapters it is the model's."""
    state: dict[str, Tensor] = model.state_dict()
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name, adapted, part = key.partition(_INSIDE)
        if not adapted:
            found[key] = value
        elif part == _OWN:
            with torch.no_grad():
                layer = model.get_submodule(name)
                assert isinstance(layer.weight, Tensor)
                found[f"{name}.weight"] = layer.weight
    return found


def split(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that has ``weights``, named as ``merged`` does, under the model's adapters as they are."""
    found = dict(weights)
    for key, value in model.state_dict().items():
        name, adapted, part = key.partition(_INSIDE)
        if adapted and part != _OWN:
            found[key] = value
        elif adapted and f"{name}.weight" in found:
            found[key] = found.pop(f"{name}.weight")
    return found
