"""The machine: devices, dtypes, synchronization and memory."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from .errors import UsageError, first_line
from .options import Dtype as Dtype


def resolve_device(name: str) -> torch.device:
    """The device with this name, as PyTorch names it. ``auto`` is a GPU if there is one; each process gets its own.

    Raises:
        UsageError: there is no such device on this machine.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local_rank, gpus = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
        if not local_rank.isdecimal() or int(local_rank) >= gpus:
            raise UsageError(
                f"LOCAL_RANK {local_rank}: this machine has {gpus} GPUs; launch at most that many processes"
            )
        return torch.device(f"cuda:{int(local_rank)}")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it has shapes, but no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device: {name} is not available here ({first_line(error)}); try cpu") from None
    return device


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware instead of converting to float32 and back."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    if any(getattr(torch.cpu, check, bool)() for check in checks):
        return True
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            features = next((line for line in file if line.lower().startswith("features")), "")  # 64-bit ARM
    except OSError:
        return False
    return "bf16" in features.split()


def resolve_dtype(dtype: Dtype | str | torch.dtype, device: torch.device) -> torch.dtype:
    """The PyTorch dtype that a setting stands for on this device; ``torch.float32`` is the same as ``float32``.

    Raises:
        UsageError: no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        dtype = dtype_name(dtype)
    if dtype not in list(Dtype):
        raise UsageError(f"dtype: {dtype!r} is not one of {', '.join(known.value for known in Dtype)}")
    if dtype == Dtype.AUTO:
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    resolved: torch.dtype = getattr(torch, Dtype(dtype).value)
    return resolved


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work, so that timings are correct."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)  # the default is the current device
    else:
        getattr(getattr(torch, device.type, None), "synchronize", lambda: None)()


def device_name(device: torch.device) -> str:
    """Name of the CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip().lower() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the process on a CPU (libraries included), of PyTorch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device) -> int | None:
    """Free bytes of the GPU, or of the machine or container; None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        machine = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        return max(0, min([machine, *_limits()]))
    return None


def _limits() -> Iterator[int]:
    """Bytes that limits on this process leave: on its address space (``ulimit -v``), and its control groups'."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
            yield limit - int(file.read().split()[0]) * resource.getpagesize()
    with suppress(OSError), open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if not controllers:  # version 2
                yield from _group_limit(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _group_limit(Path("/sys/fs/cgroup/memory"), path, *names)


def _group_limit(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """What a control group and those around it leave. In a container the path may not exist: its folder is the root."""
    group = root / path.strip("/")
    for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
        with suppress(OSError, ValueError):
            most, used = (int((folder / name).read_text()) for name in (limit, usage))  # "max" is no number
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield most - used + int(facts.get(reclaimable, 0))


def resident_memory() -> int:
    """Bytes of this process in memory now, libraries included; the peak so far if the system reports only that."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return peak_memory(torch.device("cpu"))


class PeakMemory:
    """Measures by how much memory rises, at its peak, from now on.

    On Linux, freed memory is first returned to the system and the kernel's high-water mark is reset; don't time the
    same section. If that is not possible, only a rise above the process's earlier peak is seen. On a GPU, PyTorch's
    allocations are measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            try:
                with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                    file.write("5")
                self._before = self._resident("VmRSS")
            except OSError:
                self._before = self._resident("VmHWM")

    def growth(self) -> int:
        """Peak bytes above the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return max(0, self._resident("VmHWM") - self._before)

    def _resident(self, field: str) -> int:
        try:
            with open("/proc/self/status", encoding="ascii") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
        except (OSError, StopIteration):
            return peak_memory(self.device)
