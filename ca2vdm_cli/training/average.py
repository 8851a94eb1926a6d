"""The exponential moving average of the weights, which is what sampling uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .lora import merged


class WeightAverage:
    """A float32 moving average of a model's weights, adapters merged. It starts at the model's current weights.

    Args:
        model: the model being trained.
        decay: weight of the previous average in each update, once training is under way.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors: dict[str, Tensor] = {}
        """By the names of a model without adapters."""
        self.restart()

    def restart(self) -> None:
        """Set the average to the model's weights."""
        self.tensors = {key: value.detach().clone() for key, value in merged(self.model).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after step number ``step``; early steps count more, so the random start fades quickly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = merged(self.model)
        for cls in {type(value) for value in self.tensors.values()}:  # FSDP shards parameters, but not buffers
            keys = [key for key, value in self.tensors.items() if type(value) is cls and value.is_floating_point()]
            if keys:
                averages = [self.tensors[key] for key in keys]
                torch._foreach_lerp_(averages, [weights[key].detach() for key in keys], 1 - decay)
