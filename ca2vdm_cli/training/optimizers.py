"""Optimizers (AdamW, or Muon for the matrices of the blocks) and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ca2vdm_cli.config import Optimizer, Schedule, TrainingConfig
from ca2vdm_cli.runtime import native_bfloat16

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, steep at 0 (Jordan et al. 2024)."""

RATES = {"adamw": "learning_rate", "muon": "muon_learning_rate"}
"""The setting of each optimizer's peak learning rate."""


def learning_rate_share(step: int, training: TrainingConfig) -> float:
    """Learning rate of step number ``step`` (from 0), as a share of the peak."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    if training.schedule is Schedule.COSINE:
        progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def make_optimizers(model: nn.Module, training: TrainingConfig) -> dict[str, torch.optim.Optimizer]:
    """The optimizers by name: AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest."""
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
    """Orthogonalized momentum for matrices (Jordan et al. 2024), scaled to AdamW's step size (Liu et al. 2025).

    Equals ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, except that it multiplies in bfloat16 only on
    devices with native support; on others bfloat16 is about fifty times slower than float32.

    Args:
        parameters: matrices.
        lr: learning rate.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        momentum: decay of the gradient's moving average (Nesterov momentum).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is supported
        """Update the parameters from their current gradients."""
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
    """Approximately U·Vᵀ for a matrix U·S·Vᵀ (n, m): matrix products alone bring its singular values close to 1."""
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
