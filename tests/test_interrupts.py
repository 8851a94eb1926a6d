"""Ctrl-C and SIGTERM, held back until a safe moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from ca2vdm_cli.interrupts import NUMBERS, held_interrupts, released_interrupts


@pytest.fixture(autouse=True)
def no_signal_is_ignored() -> Iterator[None]:
    """No signal is ignored, not even SIGHUP, which nohup makes processes ignore."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    seen = []

    def work() -> None:
        with held_interrupts() as interrupted:
            seen.append(interrupted())
            signal.raise_signal(number)
            seen.append(interrupted())

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [False, True]
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held_interrupts() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_does_not_wait() -> None:
    seen = []

    def work() -> None:
        with held_interrupts():
            for _ in range(3):
                seen.append(True)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(seen) == 2


def test_an_error_is_not_hidden_by_an_interrupt() -> None:
    def work() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


def test_threads_get_no_interrupts() -> None:
    seen = []

    def work() -> None:
        with held_interrupts() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_the_first_interrupt_is_announced_at_once() -> None:
    seen = []

    def work() -> None:
        with held_interrupts(lambda: seen.append("announced")):
            signal.raise_signal(signal.SIGTERM)
            seen.append("went on")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["announced", "went on"]


def test_an_inner_block_passes_an_interrupt_on() -> None:
    """A frame is written whole, and then the chunk is finished."""
    seen = []

    def work() -> None:
        with held_interrupts() as interrupted:
            with held_interrupts():
                signal.raise_signal(signal.SIGINT)
                seen.append("frame")
            seen.append("chunk")
            assert interrupted()
            with held_interrupts():
                signal.raise_signal(signal.SIGINT)
                seen.append("frame")
            seen.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["frame", "chunk", "frame"]


def test_a_released_block_stops_at_once() -> None:
    seen = []

    def work() -> None:
        with held_interrupts(lambda: seen.append("announced")), released_interrupts():
            signal.raise_signal(signal.SIGINT)
            seen.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == []
