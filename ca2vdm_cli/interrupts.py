"""Ctrl-C, SIGTERM and SIGHUP at a moment that suits: between two training steps, between two frames of a file."""

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
    once. Yields a function that tells whether one waits.

    Signals that are ignored, as under nohup, stay so. Threads other than the main one get none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if waiting:
            raise KeyboardInterrupt
        waiting.append(number)

    with _handled_by(hold):
        yield lambda: bool(waiting)
    if waiting:
        raise KeyboardInterrupt


@contextmanager
def noted_interrupts(
    silent_at: Callable[[FrameType], bool] = lambda frame: False,
) -> Iterator[Callable[[], bool]]:
    """Interrupts raise ``KeyboardInterrupt`` as ever, and are noted: a library that calls back may drop what is raised
    there. Yields a function that tells whether there was one.

    Args:
        silent_at: where in the program they are noted only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if frame is None or not silent_at(frame):
            raise KeyboardInterrupt

    with _handled_by(note):
        yield lambda: bool(noted)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Interrupts that are not ignored go to ``handler``."""
    heard = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
