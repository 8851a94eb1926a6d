"""The processes of a run, through accelerate: one on a laptop, or many that ``accelerate launch`` has started.

Only CPU processes (gloo) were ever run by the authors, with DDP, FSDP2 and DeepSpeed; GPUs never.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .config import Precision
from .errors import UsageError, UserError
from .runtime import native_bfloat16, resolve_device

if TYPE_CHECKING:
    from accelerate import Accelerator


def launched() -> tuple[int, int]:
    """This process's number, and how many ``accelerate launch`` or ``torchrun`` has started: (0, 1) when alone."""
    try:
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1
    return (rank, processes) if 0 <= rank < processes else (0, 1)


def share_of(count: int) -> range:
    """Which of ``count`` pieces of work are this process's: as even as can be, in order; the first has the most."""
    rank, processes = launched()
    return range(-(-count * rank // processes), -(-count * (rank + 1) // processes))


def make_accelerator(device: str, precision: Precision, *, unused_parameters: bool = False) -> Accelerator:
    """accelerate's view of this run.

    Args:
        device: ``auto`` or a name; a launcher gives every process its own GPU.
        precision: what to compute in.
        unused_parameters: whether some steps leave parameters out, which several processes have to look for then.

    Raises:
        UserError: accelerate is not installed.
        UsageError: a device that accelerate would not take.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    except ImportError as error:
        raise UserError("training needs accelerate: pip install 'ca2vdm[train]'") from error
    where = resolve_device(device)
    if where.type == "cuda" and where.index and device != "auto":
        raise UsageError(
            f"--device {device}: training takes the first GPU that it sees; choose it by CUDA_VISIBLE_DEVICES"
        )
    shared = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    group = InitProcessGroupKwargs(timeout=timedelta(days=1))  # the others wait while the first encodes or validates
    if shared and where.type == "cpu":
        group.backend = "gloo"  # accelerate knows DeepSpeed on GPUs only, and would make every process the only one
    accelerator = Accelerator(
        cpu=where.type == "cpu" and not shared,
        mixed_precision="bf16" if computes_half(precision, where) else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=unused_parameters),
            group,
        ],
    )
    if accelerator.distributed_type.value == "FSDP":  # which would round latents and losses too; autocast does not
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    accelerator.gradient_accumulation_steps = 1  # the trainer's own; the launcher's setting would scale the loss again
    return accelerator


def computes_half(precision: Precision, device: torch.device) -> bool:
    """Whether training multiplies in bfloat16."""
    return native_bfloat16(device) if precision is Precision.AUTO else precision is Precision.BFLOAT16


def gather_for(module: nn.Module, method: str) -> None:
    """Let a module's method find its weights whole, as ``forward`` does, where FSDP shares them; else do nothing."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(module, method)


def gathered(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Parameters or moments as ordinary tensors, gathered from the processes that share them (FSDP).

    Args:
        tensors: by name; all processes must name the same. One at a time is whole on a GPU, and goes to the processor.
        keep: whether this process wants them; the others help and get nothing.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors:
        gather = getattr(tensor, "full_tensor", None)
        if gather is not None:
            full: Tensor = gather()
            tensor = full.cpu()
        if keep:
            kept[name] = tensor
    return kept


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """An ordinary tensor laid out as another is: on its device, and shared among processes as it is (FSDP)."""
    tensor = tensor.to(other.device)
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(tensor, other.device_mesh, other.placements)


def any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether something is so in any process; all of them must ask together."""
    if accelerator.num_processes == 1:
        return here
    count: Tensor = accelerator.reduce(torch.tensor([float(here)], device=accelerator.device), reduction="sum")
    return bool(count.item() > 0)
