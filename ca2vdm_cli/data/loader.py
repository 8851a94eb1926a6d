"""Batches prepared ahead of time in worker processes, so that a training step need not wait for them.

A ``DataLoader`` with 2 workers makes 0.85 to 0.95 times as many batches of H.264 clips per second, needs 6 s to notice
a dead worker (this loader: 0.2 s), and leaves its workers running when their parent is killed.

Shapes: B batch, T frames, C channels, H height, W width.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.resource_tracker
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler

import cv2
import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.errors import UserError

from .clips import Clips, VideoClips
from .source import ClipSource

AHEAD = 2
"""How many batches a worker may be ahead of the current step."""
PATIENCE = 0.5
"""Seconds between two calls of ``waiting``."""
DEFAULT_WORKERS = 2
"""Default number of workers if frames have to be decoded."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that a terminal or scheduler sends to a whole process group; only the parent acts on them."""
_Task = tuple[range, int]
"""The numbers of a batch's clips, and their length in frames."""
_Result = tuple[Tensor | np.ndarray, tuple[str | None, ...]] | UserError
"""Clips (B, T, C, H, W) and their captions, or what went wrong. Workers send arrays, since tensors would go through
shared memory, of which containers have little."""
_Reasons = dict[str, str]
"""Videos that a worker has skipped, or found damaged, since its last result, with reasons."""


@dataclass(frozen=True)
class Batch:
    """The clips of one step."""

    step: int
    """Number of the step."""
    clips: Tensor
    """(B, T, C, H, W) float32; latents (B, T, c, h, w) if the source has latents."""
    captions: tuple[str | None, ...]
    """The clips' captions; None for a clip without one."""


class ClipLoader:
    """An endless iterator over the batches of step ``first``, ``first + 1`` and so on. Close it after use.

    With w training processes, the clips of step n have the numbers n · w · B to (n + 1) · w · B - 1; process r takes
    the r-th B of them. So a step's clips do not depend on how they are divided or on the number of workers.

    Args:
        source: where clips come from. Each worker gets a copy, so it must hold paths, not open files.
        frames: the length of a clip, or a function from the step to the length.
        batch_size: B, clips per step and process.
        first: the first step.
        workers: number of worker processes; with 0, this process makes each batch on demand. The default is
            ``DEFAULT_WORKERS`` if frames have to be decoded, else 0.
        rank: r, this training process's number.
        world: w, the number of training processes.

    Attributes:
        wait_seconds: total time that callers have waited in ``next``.
        workers: number of worker processes.
    """

    def __init__(
        self,
        source: ClipSource,
        frames: int | Callable[[int], int],
        batch_size: int,
        first: int = 0,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source, self.wait_seconds = source, 0.0
        self.workers = (DEFAULT_WORKERS if isinstance(source, VideoClips) else 0) if workers is None else workers
        self._frames, self._size, self._rank, self._world = frames, batch_size, rank, world
        self._step = first
        self._running: list[_Worker] = []
        if self.workers:
            self._start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self, waiting: Callable[[float], None] = lambda seconds: None) -> Batch:
        """The next step's batch.

        Args:
            waiting: called every ``PATIENCE`` seconds while a worker is awaited, with the seconds so far. What it
                raises passes through, and the batch can be asked for again.

        Raises:
            UserError: no video is usable any more, or a worker has died.
        """
        began = time.perf_counter()
        result = self._next_result(waiting)
        self.wait_seconds += time.perf_counter() - began
        if isinstance(result, UserError):
            self.close()
            raise result
        clips, captions = result
        self._step += 1
        return Batch(self._step - 1, torch.as_tensor(clips), captions)

    def close(self) -> None:
        """End the workers. A second call does nothing; after it, ``next`` makes batches in this process."""
        atexit.unregister(self.close)
        running, self._running = self._running, []
        for worker in running:
            worker.end()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_result(self, waiting: Callable[[float], None]) -> _Result:
        if not self._running:
            return _make(self.source, *self._task(self._step))
        worker = self._running[self._step % self.workers]
        result, skipped, damaged = _awaited(worker.results, waiting)
        worker.ask(self._task(self._step + self.workers * AHEAD))
        if isinstance(self.source, Clips):
            for known, news in ((self.source.skipped, skipped), (self.source.damaged, damaged)):
                for name, reason in news.items():
                    known.setdefault(name, reason)
        return result

    def _task(self, step: int) -> _Task:
        index = (step * self._world + self._rank) * self._size
        return range(index, index + self._size), self._frames if isinstance(self._frames, int) else self._frames(step)

    def _start(self) -> None:
        # Workers inherit the blocked signals; one that arrives meanwhile reaches this process afterwards.
        multiprocessing.resource_tracker.ensure_running()  # otherwise starting a worker would unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for _ in range(self.workers):
                self._running.append(_Worker(self.source))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        atexit.register(self.close)  # runs before multiprocessing's own handler, which would wait for the workers
        for step in range(self._step, self._step + self.workers * AHEAD):
            self._running[step % self.workers].ask(self._task(step))


def _awaited(
    results: queue.SimpleQueue[tuple[_Result, _Reasons, _Reasons]], waiting: Callable[[float], None]
) -> tuple[_Result, _Reasons, _Reasons]:
    began = time.perf_counter()
    while True:
        try:
            return results.get(timeout=PATIENCE)
        except queue.Empty:
            waiting(time.perf_counter() - began)


def _make(source: ClipSource, indices: range, length: int) -> _Result:
    try:
        clips, captions = zip(*(source.clip(index, length) for index in indices), strict=True)
    except UserError as error:
        return error
    return torch.stack(clips), captions


class _Worker:
    """A process that makes batches, and a thread that receives them."""

    def __init__(self, source: ClipSource) -> None:
        # Not forked from this process, whose threads may hold locks, but from one that has only imported modules.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ca2vdm_cli.data"])
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_work, args=(child, source), daemon=True)
        with _main_module_hidden(unless_in=source):
            self._process.start()
        child.close()
        self.results: queue.SimpleQueue[tuple[_Result, _Reasons, _Reasons]] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()

    def ask(self, task: _Task) -> None:
        with suppress(OSError):  # the worker has died, and ``results`` will say so
            self._pipe.send(task)

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _receive(self) -> None:
        try:
            while True:
                self.results.put(self._pipe.recv())
        except Exception:  # whatever it is, the caller must not wait forever
            self._process.join()
            code = self._process.exitcode
            why = "see its error above; a script with its own clip source needs an if __name__ == '__main__' guard"
            if code == -signal.SIGKILL:
                why = "out of memory, perhaps"
            message = f"data.workers: a worker process died with code {code} ({why}); try --set data.workers=0"
            self.results.put((UserError(message), {}, {}))


@contextmanager
def _main_module_hidden(*, unless_in: ClipSource) -> Iterator[None]:
    """Keep a new process from running the main script again, which it does to find what the script defines.

    Only a source that the script itself defines needs that; such a script must be guarded by ``__name__``.
    """
    main = sys.modules["__main__"]
    if b"__main__" in bytes(ForkingPickler.dumps(unless_in)):
        yield
        return
    file, spec = vars(main).pop("__file__", None), main.__spec__
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _work(pipe: Connection, source: ClipSource) -> None:
    """The main function of a worker, which runs until its parent exits or kills it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    skipped, damaged = (source.skipped, source.damaged) if isinstance(source, Clips) else ({}, {})
    reported = [0, 0]
    with suppress(EOFError, OSError):
        while True:
            result = _make(source, *pipe.recv())
            news = [
                dict(islice(known.items(), told, None))
                for known, told in zip((skipped, damaged), reported, strict=True)
            ]
            reported = [len(skipped), len(damaged)]
            if not isinstance(result, UserError):
                result = np.asarray(result[0]), result[1]
            pipe.send((result, *news))
