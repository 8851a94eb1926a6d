"""What turns gradients into steps: AdamW, or Muon for the matrices of the blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ca2vdm_cli.config import Optimizer, TrainingConfig
from ca2vdm_cli.runtime import native_bfloat16

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, steep at 0 (Jordan et al. 2024)."""


def make_optimizers(model: nn.Module, training: TrainingConfig) -> dict[str, torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the others, by name."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if training.optimizer is Optimizer.MUON:
        matrices = [name for name in parameters if name.startswith("blocks.") and name.endswith(".weight")]
        optimizers["muon"] = Muon(
            [parameters.pop(name) for name in matrices],
            lr=training.muon_learning_rate,
            weight_decay=training.weight_decay,
        )
    if parameters:
        optimizers["adamw"] = torch.optim.AdamW(
            parameters.values(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=training.weight_decay
        )
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024), in steps of AdamW's size (Liu et al. 2025).

    It does what ``torch.optim.Muon`` does with ``adjust_lr_fn="match_rms_adamw"``, but multiplies in bfloat16 only
    where the device does so natively: elsewhere that takes some fifty times as long as float32.

    Args:
        parameters: matrices.
        lr: learning rate.
        weight_decay: decoupled, times the learning rate.
        momentum: of the gradient's average, applied ahead (Nesterov).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no closure here
        """One step on the gradients as they are."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                update = orthogonal(gradient.lerp(average, momentum))
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * rate * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U·Vᵀ of a matrix U·S·Vᵀ (n, m): its singular values are brought near 1, by products alone."""
    x = matrix.bfloat16() if native_bfloat16(matrix.device) else matrix.float()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.T if tall else x).to(matrix.dtype)
