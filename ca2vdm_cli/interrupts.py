"""Hold Ctrl-C, SIGTERM and SIGHUP back until a safe moment: between two training steps, two chunks, or two frames of a
file."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Hold:
    """A signal handler that remembers the first signal, and raises ``KeyboardInterrupt`` at the second."""

    def __init__(self, on_first: Callable[[], object] | None) -> None:
        self.held: list[int] = []
        self._on_first = on_first

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.held:
            raise KeyboardInterrupt
        self.held.append(number)
        if self._on_first:
            self._on_first()


@contextmanager
def held_interrupts(on_first: Callable[[], object] | None = None) -> Iterator[Callable[[], bool]]:
    """Hold back an interrupt until the end of the block, where it raises ``KeyboardInterrupt``; a second one does so at
    once. Yields a function that says whether one is being held.

    Blocks may be nested: an interrupt that an inner one has held is passed to the outer one, which holds it further.
    Ignored signals, such as SIGHUP under nohup, stay ignored. In threads other than the main one this does nothing,
    since Python handles signals in the main thread only.

    Args:
        on_first: called in the signal's handler when the first interrupt arrives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    hold = _Hold(on_first)
    active = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hold) for number in active}
    try:
        yield lambda: bool(hold.held)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for held in hold.held:
        outer = before[signal.Signals(held)]
        if not isinstance(outer, _Hold):
            raise KeyboardInterrupt
        outer(held, None)


@contextmanager
def released_interrupts() -> Iterator[None]:
    """Within ``held_interrupts``: let an interrupt stop this block at once, for calls that may block for long."""
    active = [number for number in NUMBERS if isinstance(signal.getsignal(number), _Hold)]
    before = {number: signal.signal(number, signal.default_int_handler) for number in active}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
