"""The processes of a run, through accelerate: a single one, or those that ``accelerate launch`` started.

Tested with CPU processes only (gloo; DDP, FSDP2 and DeepSpeed), never with several GPUs.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import Precision
from .errors import UsageError, UserError
from .runtime import native_bfloat16, resolve_device

if TYPE_CHECKING:
    from accelerate import Accelerator


def launched() -> tuple[int, int]:
    """Rank and number of processes, if ``accelerate launch`` or ``torchrun`` started this one; else (0, 1)."""
    try:
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1
    return (rank, processes) if 0 <= rank < processes else (0, 1)


def share_of(count: int) -> range:
    """This process's contiguous share of ``count`` work items; shares differ by at most one, larger ones first."""
    rank, processes = launched()
    return range(-(-count * rank // processes), -(-count * (rank + 1) // processes))


def make_accelerator(device: str, precision: Precision, *, unused_parameters: bool = False) -> Accelerator:
    """Set up accelerate for this run.

    Args:
        device: ``auto`` or a device's name; a launcher gives every process its own GPU.
        precision: the dtype of matrix products.
        unused_parameters: whether some steps leave parameters without a gradient, which DDP then has to look for.

    Raises:
        UserError: accelerate is not installed.
        UsageError: accelerate can't be made to use that device.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise UserError("training needs accelerate: pip install 'ca2vdm[train]'") from error
    resolved = resolve_device(device)
    if resolved.type == "cuda" and resolved.index and device != "auto":
        raise UsageError(f"device: training uses the first visible GPU, not {device}; set CUDA_VISIBLE_DEVICES instead")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    group = InitProcessGroupKwargs(timeout=timedelta(days=1))  # others wait while the main one encodes or validates
    if deepspeed and resolved.type == "cpu":
        group.backend = "gloo"  # by default accelerate lets DeepSpeed's CPU processes run alone
    accelerator = Accelerator(
        cpu=resolved.type == "cpu" and not deepspeed,
        mixed_precision="bf16" if computes_half(precision, resolved) else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=unused_parameters),
            group,
        ],
    )
    if accelerator.distributed_type.value == "FSDP":  # it would round latents and losses too; autocast does not
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    accelerator.gradient_accumulation_steps = (
        1  # the trainer accumulates; the launcher's setting would scale the loss again
    )
    return accelerator


def computes_half(precision: Precision, device: torch.device) -> bool:
    """Whether training multiplies matrices in bfloat16."""
    return native_bfloat16(device) if precision is Precision.AUTO else precision is Precision.BFLOAT16


def any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether ``here`` is true in any process. All processes must call it together."""
    if accelerator.num_processes == 1:
        return here
    count: Tensor = accelerator.reduce(torch.tensor([float(here)], device=accelerator.device), reduction="sum")
    return bool(count.item() > 0)
