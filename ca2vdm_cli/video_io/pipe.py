"""A pipe as FFmpeg and Pillow read it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from select import select
from typing import BinaryIO

from ca2vdm_cli.interrupts import held_interrupts

POLL_SECONDS = 0.1
"""How often a read from a pipe checks for an interrupt while no data arrives."""


class Pipe:
    """A pipe as FFmpeg reads it: no seeking, and each read returns what has arrived.

    PyAV loses or prints exceptions that are raised in FFmpeg's callbacks. So ``read`` raises nothing, interrupts are
    held, and ``call`` raises afterwards.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._head = b""
        self._error: OSError | None = None
        self._interrupted: Callable[[], bool] = lambda: False

    def read(self, size: int) -> bytes:
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        try:
            while not self._interrupted():
                if select([self._file], [], [], POLL_SECONDS)[0]:
                    return os.read(self._file.fileno(), size)
        except OSError as error:
            self._error = error
        return b""

    def peek(self, size: int) -> bytes:
        """The next bytes, fewer only at the end; they can still be read."""
        data = b""
        with self.call():
            while len(data) < size and (more := self.read(size - len(data))):
                data += more
        self._head = data
        return data

    @contextmanager
    def call(self) -> Iterator[None]:
        """Wrap a call into FFmpeg: hold interrupts, and raise afterwards what ``read`` could not."""
        with held_interrupts() as self._interrupted:
            try:
                yield
            finally:
                if self._interrupted():
                    raise KeyboardInterrupt
                if self._error:
                    raise self._error
