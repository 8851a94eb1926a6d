"""DeepSpeed's ZeRO stages 1 and 2, through accelerate: each process keeps a share of the optimizer's moments.

Weights are whole in every process, so models, averages and checkpoints are as without it; what is here makes moments
whole for a checkpoint and takes them from one. Tried with two CPU processes and DeepSpeed 0.19 only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ca2vdm_cli.config import Optimizer, TrainingConfig
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.processes import computes_half

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, beside the number of steps."""


def in_use(accelerator: Accelerator) -> bool:
    """Whether the launcher has asked for DeepSpeed."""
    return bool(accelerator.distributed_type.value == "DEEPSPEED")


def configure(accelerator: Accelerator, training: TrainingConfig, share: int) -> None:
    """Put our settings into DeepSpeed's, before it is given the model; how state is shared stays as its config says.

    Args:
        accelerator: its configuration is changed.
        training: what to train.
        share: clips of one forward of one process.

    Raises:
        UsageError: what it can't do.
    """
    settings: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise UsageError(f"DeepSpeed: stage {zero.get('stage')} of ZeRO is not supported, 1 and 2 are; or take FSDP2")
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device", "none") != "none":
            raise UsageError(f"DeepSpeed: {section} is not supported; leave it out of its config")
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise UsageError(f"DeepSpeed: the {section} is that of the preset; leave it out of its config")
    if training.optimizer is not Optimizer.ADAMW:
        raise UsageError(f"DeepSpeed: it does not go with {training.optimizer.value}; training.optimizer=adamw")
    settings.update(
        train_micro_batch_size_per_gpu=share,
        gradient_accumulation_steps=1,  # the trainer's own
        gradient_clipping=training.gradient_clip,
        fp16={"enabled": False},
        bf16={"enabled": False},  # which would round the weights themselves
        torch_autocast={"enabled": computes_half(training.precision, accelerator.device), "dtype": "bfloat16"},
    )


def refresh(optimizer: Any) -> None:
    """Take over weights that were loaded into the model."""
    optimizer.optimizer.refresh_fp32_params()


def parameters(optimizer: Any) -> list[nn.Parameter]:
    """What it learns; its own groups have shares of these."""
    return [parameter for group in optimizer.optimizer.bit16_groups for parameter in group]


def whole_state(optimizer: Any) -> dict[Tensor, dict[str, Tensor]]:
    """Moments of each parameter, gathered from the processes, which must ask together; as AdamW has them."""
    from deepspeed.utils import safe_get_full_optimizer_state

    inner = optimizer.optimizer
    found: dict[Tensor, dict[str, Tensor]] = {}
    for parameters, flat in zip(inner.bit16_groups, inner.single_partition_of_fp32_groups, strict=True):
        step = inner.optimizer.state.get(flat, {}).get("step")
        if step is None:  # nothing was learned yet
            continue
        for parameter in parameters:
            found[parameter] = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            found[parameter]["step"] = step.clone()
    return found


def set_state(optimizer: Any, state: dict[Tensor, dict[str, Tensor]]) -> None:
    """The reverse. AdamW may count the steps of each parameter on its own, this counts those of all: the most are."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

    inner = optimizer.optimizer
    for parameters, flat in zip(inner.bit16_groups, inner.single_partition_of_fp32_groups, strict=True):
        steps = [state[parameter]["step"] for parameter in parameters if parameter in state]
        if not steps:
            continue
        moments = {name: torch.zeros_like(flat) for name in MOMENTS}
        inner.optimizer.state[flat] = {"step": torch.stack(steps).max(), **moments}
        lazy_init_hp_params_optimizer_state(parameters, flat, inner.optimizer.state)
        for parameter in parameters:
            for name in MOMENTS:
                if parameter in state:
                    safe_set_full_optimizer_state(parameter, state[parameter][name], name)
