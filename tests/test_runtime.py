"""The machine: measuring memory, synchronizing, and choosing a device."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch

from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.runtime import PeakMemory, device_name, resolve_device, synchronize

CPU = torch.device("cpu")
MIB = 2**20


def touched(mebibytes: int) -> bytearray:
    return bytearray(b"\1") * (mebibytes * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak can't be reset")
def test_growth_is_measured_from_now_on() -> None:
    del_me = touched(200)
    del del_me
    memory = PeakMemory(CPU)
    block = touched(50)
    assert 45 * MIB < memory.growth() < 150 * MIB
    assert block


def test_without_a_reset_only_a_rise_above_the_earlier_peak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Any, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            raise PermissionError(path)
        return builtins.open(path, mode, **options)

    del_me = touched(200)
    del del_me
    monkeypatch.setattr("ca2vdm_cli.runtime.open", read_only, raising=False)
    memory = PeakMemory(CPU)
    block = touched(10)
    assert memory.growth() < 30 * MIB
    assert block


def test_every_device_can_be_synchronized() -> None:
    for device in ("cpu", "meta"):
        synchronize(torch.device(device))


def test_the_named_gpu_is_synchronized(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


def test_the_cpu_has_a_name() -> None:
    assert device_name(CPU).strip()


@pytest.mark.parametrize(("rank", "device"), [("1", "cuda:1"), ("2", None), ("x", None), ("-1", None)])
def test_every_process_gets_its_own_gpu(rank: str, device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    if device is not None:
        assert resolve_device("auto") == torch.device(device)
        return
    with pytest.raises(UsageError, match="this machine has 2 GPUs; launch at most that many processes"):
        resolve_device("auto")
