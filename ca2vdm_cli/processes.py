"""The processes of a run: a single one, or those that ``torchrun`` or ``accelerate launch`` started.

Training joins them through accelerate; generation only shares out the videos and collects the reports.

Tested with CPU processes only (gloo; DDP, FSDP2 and DeepSpeed), never with several GPUs.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import Precision
from .errors import UsageError, UserError, first_line
from .runtime import native_bfloat16, resolve_device

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.distributed_c10d import Store


LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in the environment. If one is missing, the others are left over, and are ignored."""
JOIN_SECONDS = 60.0
"""How long a process waits for the others at the start."""


def launched() -> tuple[int, int]:
    """Rank and number of processes, if ``accelerate launch`` or ``torchrun`` started this one; else (0, 1)."""
    try:
        rank, processes, _ = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, processes) if 0 <= rank < processes and os.environ.get("MASTER_ADDR") else (0, 1)


class Group:
    """The processes that generate videos together. They share a key-value store, which the launcher or the first of
    them serves.

    Raises:
        UsageError: not all processes have come after ``JOIN_SECONDS``.
    """

    def __init__(self) -> None:
        self.rank, self.processes = launched()
        self._run = 1
        if self.processes > 1:
            deadline = time.monotonic() + JOIN_SECONDS
            try:
                self._store = self._connect(deadline)
                self._run = self._store.add(f"ca2vdm/{self.rank}", 1)  # of several in the same launcher
                while (there := self._count("joined")) < self.processes and time.monotonic() < deadline:
                    self._store.set(self._key("joined", self.rank), "")
                    time.sleep(0.05)
            except (OSError, RuntimeError) as error:
                raise UsageError(f"WORLD_SIZE: {self._fault('none', first_line(error))}") from error
            if there < self.processes:
                raise UsageError(f"WORLD_SIZE: {self._fault(str(there), f'after {JOIN_SECONDS:g} s')}")

    def gather(self, report: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every process's report, by rank; in processes other than the first, nothing.

        Raises:
            UserError: another process has failed.
        """
        if self.processes == 1:
            return [dict(report)]
        if self.rank:
            with suppress(RuntimeError):  # the first process serves the store, and may have failed
                self._store.set(self._key("report", self.rank), json.dumps(report))
            return []
        self._store.set(self._key("report", 0), json.dumps(report))
        while self._count("report") < self.processes:
            if self._count("failed"):
                raise UserError("another process has failed; its own message says why")
            time.sleep(0.05)
        return [json.loads(self._store.get(self._key("report", rank))) for rank in range(self.processes)]

    def fail(self) -> None:
        """Tell the first process not to wait for this one."""
        if self.processes > 1:
            with suppress(RuntimeError):
                self._store.set(self._key("failed", self.rank), "")

    def _connect(self, deadline: float) -> Store:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = self.rank == 0 and not by_launcher
        while not serves:  # torch would fill the terminal with warnings
            try:
                socket.create_connection((host, port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        patience = timedelta(seconds=JOIN_SECONDS)
        store = TCPStore(host, port, None, serves, patience, wait_for_workers=False)
        return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)

    def _key(self, what: str, rank: int) -> str:
        return f"ca2vdm/{self._run}/{what}/{rank}"

    def _count(self, what: str) -> int:
        """How many processes have set this key."""
        return sum(self._store.check([self._key(what, rank)]) for rank in range(self.processes))

    def _fault(self, there: str, why: str) -> str:
        return (
            f"{there} of {self.processes} processes can be reached ({why}); start all with torchrun, or unset RANK and "
            "WORLD_SIZE"
        )


@cache
def group() -> Group:
    """This process's group; waits for the other processes when it is first called."""
    return Group()


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
    if "WORLD_SIZE" in os.environ and not all(name in os.environ for name in LAUNCHER):
        for name in (*LAUNCHER, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # left over; accelerate would try to form a group
            os.environ.pop(name, None)
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
