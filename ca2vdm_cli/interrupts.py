"""Hold Ctrl-C, SIGTERM and SIGHUP back until a safe moment: between two training steps, or two frames of a file."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold back an interrupt until the end of the block, where it raises ``KeyboardInterrupt``; a second one does so at
    once. Yields a function that says whether one is being held.

    Ignored signals, such as SIGHUP under nohup, stay ignored. In threads other than the main one this does nothing,
    since Python handles signals in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            raise KeyboardInterrupt
        held.append(number)

    active = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hold) for number in active}
    try:
        yield lambda: bool(held)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt
