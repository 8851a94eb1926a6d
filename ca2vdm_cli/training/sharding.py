"""How a run's processes share its weights and optimizer moments: not at all (DDP), by FSDP2, or by DeepSpeed.

The trainer and its checkpoints see whole, ordinary tensors whatever the launcher chose, so a run may be resumed with
another number of processes, or another kind of sharding. Tested with two CPU processes only (DeepSpeed 0.19).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ca2vdm_cli.config import Optimizer, TrainingConfig
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.processes import computes_half

from .loss import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

Moments = Mapping[Tensor, dict[str, Tensor]]
"""An optimizer's state of each parameter, by name."""
ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW stores per parameter, besides the step count."""


class Sharding:
    """Nothing is sharded: one process, or DDP, where each process holds all weights and moments.

    Args:
        accelerator: devices and processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def prepare(
        self, objective: Objective, optimizers: dict[str, torch.optim.Optimizer], training: TrainingConfig, share: int
    ) -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
        """Distribute the model and its optimizers.

        Args:
            objective: the model and its loss.
            optimizers: by name.
            training: the preset's ``training`` section.
            share: clips in one forward of one process.

        Returns:
            What to call in place of ``objective``, and what to step in place of ``optimizers``.

        Raises:
            UsageError: settings that this kind of sharding does not support.
        """
        forward, *prepared = self.accelerator.prepare(objective, *optimizers.values())
        return forward, dict(zip(optimizers, prepared, strict=True))

    def accumulate(self, forward: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward pass; gradients are exchanged only in the ``last`` one of a step."""
        return nullcontext() if last else self.accelerator.no_sync(forward)

    def parameters(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The model's parameters that an optimizer updates."""
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def moments(self, optimizer: torch.optim.Optimizer) -> Moments:
        """An optimizer's state. All processes must call it together."""
        return optimizer.state

    def set_moments(self, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
        """Inverse of ``moments``."""
        optimizer.state.update(moments)

    def refresh(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell an optimizer that new weights were loaded into the model."""

    def gather(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Parameters or moments as whole tensors in the main process; an empty dict in the others.

        All processes must call it together, with the same names.
        """
        return dict(tensors) if self.accelerator.is_main_process else {}

    def scatter(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A whole tensor on the device of another, and sharded as that one is."""
        return tensor.to(like.device)


class FullySharded(Sharding):
    """FSDP2: each process holds a share of every weight and moment.

    Raises:
        UsageError: FSDP1, or units that are smaller than a block.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        if not accelerator.is_fsdp2:
            raise UsageError("FSDP: version 1 is not supported; use accelerate launch --fsdp_version 2")
        if accelerator.state.fsdp_plugin.min_num_params:
            raise UsageError(
                "FSDP: a block must stay whole; use --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP or NO_WRAP"
            )

    def prepare(
        self, objective: Objective, optimizers: dict[str, torch.optim.Optimizer], training: TrainingConfig, share: int
    ) -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
        """Also let the methods that use weights outside ``forward`` gather them as ``forward`` does."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        prepared = super().prepare(objective, optimizers, training, share)
        register_fsdp_forward_method(objective, "run")
        for block in objective.model.blocks:
            register_fsdp_forward_method(block, "text_keys_values")
        return prepared

    def gather(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """One tensor at a time is whole on the GPU, then moves to the CPU. Buffers are not sharded."""
        whole: dict[str, Tensor] = {}
        for name, tensor in tensors:
            full_tensor = getattr(tensor, "full_tensor", None)
            if full_tensor is not None:
                tensor = full_tensor().cpu()
            if self.accelerator.is_main_process:
                whole[name] = tensor
        return whole

    def scatter(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A whole tensor on the device of another, and sharded as that one is."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        tensor = super().scatter(tensor, like)
        return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


class DeepSpeedSharding(Sharding):
    """DeepSpeed's ZeRO stages 1 and 2: each process holds all weights, and a share of AdamW's moments."""

    def prepare(
        self, objective: Objective, optimizers: dict[str, torch.optim.Optimizer], training: TrainingConfig, share: int
    ) -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
        """Configure DeepSpeed first."""
        self.configure(training, share)
        return super().prepare(objective, optimizers, training, share)

    def configure(self, training: TrainingConfig, share: int) -> None:
        """Put the preset's settings into DeepSpeed's configuration; its own settings say how state is sharded.

        Raises:
            UsageError: a configuration that is not supported.
        """
        settings: dict[str, Any] = self.accelerator.deepspeed_plugin.deepspeed_config
        zero = settings.get("zero_optimization", {})
        if zero.get("stage") not in (1, 2):
            raise UsageError(f"DeepSpeed: ZeRO stage {zero.get('stage')} is not supported; use 1 or 2, or FSDP2")
        for section in ("offload_optimizer", "offload_param"):
            if zero.get(section, {}).get("device", "none") != "none":
                raise UsageError(f"DeepSpeed: {section} is not supported; leave it out of the configuration")
        for section in ("optimizer", "scheduler"):
            if section in settings:
                raise UsageError(f"DeepSpeed: the preset sets the {section}; leave it out of the configuration")
        if training.optimizer is not Optimizer.ADAMW:
            raise UsageError(
                f"DeepSpeed: it does not support the optimizer {training.optimizer.value}; set training.optimizer=adamw"
            )
        settings.update(
            train_micro_batch_size_per_gpu=share,
            gradient_accumulation_steps=1,  # the trainer accumulates
            gradient_clipping=training.gradient_clip,
            fp16={"enabled": False},
            bf16={"enabled": False},  # would round the weights themselves
            torch_autocast={
                "enabled": computes_half(training.precision, self.accelerator.device),
                "dtype": "bfloat16",
            },
        )

    def accumulate(self, forward: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """DeepSpeed's optimizer step is part of the ``last`` backward pass."""
        self.accelerator.sync_gradients = last
        return super().accumulate(forward, last=last)

    def parameters(self, optimizer: Any) -> list[Tensor]:
        """The model's parameters; DeepSpeed's own groups hold shares of these."""
        return [parameter for group in optimizer.optimizer.bit16_groups for parameter in group]

    def moments(self, optimizer: Any) -> Moments:
        """Moments of each parameter, gathered from all processes, in AdamW's form."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = optimizer.optimizer
        moments: dict[Tensor, dict[str, Tensor]] = {}
        for parameters, flat in zip(inner.bit16_groups, inner.single_partition_of_fp32_groups, strict=True):
            step = inner.optimizer.state.get(flat, {}).get("step")
            if step is None:  # before the first step
                continue
            for parameter in parameters:
                moments[parameter] = {name: safe_get_full_optimizer_state(parameter, name) for name in ADAMW_MOMENTS}
                moments[parameter]["step"] = step.clone()
        return moments

    def set_moments(self, optimizer: Any, moments: Moments) -> None:
        """Inverse of ``moments``. DeepSpeed keeps one step count for all parameters; the largest is used."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

        inner = optimizer.optimizer
        for parameters, flat in zip(inner.bit16_groups, inner.single_partition_of_fp32_groups, strict=True):
            steps = [moments[parameter]["step"] for parameter in parameters if parameter in moments]
            if not steps:
                continue
            zeros = {name: torch.zeros_like(flat) for name in ADAMW_MOMENTS}
            inner.optimizer.state[flat] = {"step": torch.stack(steps).max(), **zeros}
            lazy_init_hp_params_optimizer_state(parameters, flat, inner.optimizer.state)
            for parameter in parameters:
                for name in ADAMW_MOMENTS:
                    if parameter in moments:
                        safe_set_full_optimizer_state(parameter, moments[parameter][name], name)

    def refresh(self, optimizer: Any) -> None:
        """Copy the model's weights into DeepSpeed's float32 ones."""
        optimizer.optimizer.refresh_fp32_params()


def make_sharding(accelerator: Accelerator) -> Sharding:
    """The kind of sharding that the launcher selected.

    Raises:
        UsageError: a kind of sharding that does not fit the model.
    """
    kinds = {"FSDP": FullySharded, "DEEPSPEED": DeepSpeedSharding}
    return kinds.get(accelerator.distributed_type.value, Sharding)(accelerator)
