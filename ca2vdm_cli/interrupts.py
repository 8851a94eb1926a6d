"""Ctrl-C and SIGTERM at a moment that suits: between two training steps, between two frames of a file."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold back an interrupt until the end of the block, where it raises ``KeyboardInterrupt``; a second one does so at
    once. Yields a function that tells whether one waits. Threads other than the main one get no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if waiting:
            raise KeyboardInterrupt
        waiting.append(number)

    before = [signal.signal(number, hold) for number in NUMBERS]
    try:
        yield lambda: bool(waiting)
    finally:
        for number, handler in zip(NUMBERS, before, strict=True):
            signal.signal(number, handler)
    if waiting:
        raise KeyboardInterrupt
