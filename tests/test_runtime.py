"""The machine: memory that is measured, and what to do where it can't be."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch

from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.runtime import PeakMemory, processor, resolve_device, synchronize

CPU = torch.device("cpu")
MIB = 2**20


def touched(mebibytes: int) -> bytearray:
    return bytearray(b"\1") * (mebibytes * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak can't be reset")
def test_growth_is_counted_from_now_on() -> None:
    del_me = touched(200)
    del del_me
    memory = PeakMemory(CPU)
    kept = touched(50)
    assert 45 * MIB < memory.growth() < 150 * MIB
    assert kept


def test_without_a_reset_only_a_rise_above_the_earlier_peak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Any, mode: str = "r", **options: Any) -> Any:
        if "w" in mode:
            raise PermissionError(path)
        return builtins.open(path, mode, **options)

    del_me = touched(200)
    del del_me
    monkeypatch.setattr("ca2vdm_cli.runtime.open", read_only, raising=False)
    memory = PeakMemory(CPU)
    kept = touched(10)
    assert memory.growth() < 30 * MIB
    assert kept


def test_every_device_can_be_waited_for() -> None:
    for device in ("cpu", "meta"):
        synchronize(torch.device(device))


def test_the_gpu_that_is_waited_for_is_the_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


def test_the_processor_has_a_name() -> None:
    assert processor(CPU).strip()


@pytest.mark.parametrize(("rank", "device"), [("1", "cuda:1"), ("2", None), ("x", None), ("-1", None)])
def test_every_process_has_a_gpu_of_its_own(rank: str, device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    if device is not None:
        assert resolve_device("auto") == torch.device(device)
        return
    with pytest.raises(UsageError, match="this machine has 2 GPUs; launch no more processes"):
        resolve_device("auto")
