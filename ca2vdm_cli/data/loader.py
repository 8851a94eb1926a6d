"""Batches made ahead, in worker processes, so that a step need not wait for them.

Shapes: B batch, T frames, C channels, H height, W width.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import cv2
import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.errors import UserError

from .clips import Clips, VideoClips
from .source import ClipSource

AHEAD = 2
"""Batches that a worker may be ahead of the step."""
DEFAULT_WORKERS = 2
"""Workers where frames have to be decoded, unless told otherwise."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal or scheduler sends to a whole group of processes; the parent alone is to act on it."""


@dataclass(frozen=True)
class Batch:
    """The clips of one step."""

    step: int
    """Which step."""
    clips: Tensor
    """(B, T, C, H, W) float32; latents (B, T, c, h, w) where the source has latents."""
    captions: tuple[str | None, ...]
    """What is said of each; None where nothing is."""


class ClipLoader:
    """An endless iterator of batches, those of step ``first``, ``first + 1`` and so on; to be closed.

    The clips of step n are numbers n · w · B to (n + 1) · w · B - 1 for w processes; process r takes the r-th B of
    them. So a step's clips are the same however it is split, and whatever the number of workers.

    Args:
        source: what has the clips. With workers it is copied to each; it must hold paths, not open files.
        frames: the length of a clip, or what says it for a step.
        batch_size: B, clips per step and process.
        first: the first step.
        workers: worker processes; 0 makes batches in this one when asked for; by default ``DEFAULT_WORKERS`` where
            frames have to be decoded, else 0.
        rank: r, this process's number among those that train.
        world: w, how many they are.

    Attributes:
        wait_seconds: for how long ``next`` has kept its caller waiting, in all.
        workers: worker processes.
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
        self._started: list[_Worker] = []
        if self.workers:
            self._start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next step's batch.

        Raises:
            UserError: no video is usable any more, or a worker has died.
        """
        began = time.perf_counter()
        try:
            if not self._started:
                answer = _make(self.source, self._task(self._step))
            else:
                worker = self._started[self._step % self.workers]
                answer = worker.answer()
                worker.ask(self._task(self._step + self.workers * AHEAD))
        finally:
            self.wait_seconds += time.perf_counter() - began
        if isinstance(answer, UserError):
            self.close()
            raise answer
        if self._started and isinstance(self.source, Clips):
            for name, reason in answer.skipped.items():
                self.source.skipped.setdefault(name, reason)
        self._step += 1
        return answer.batch

    def close(self) -> None:
        """End the workers; a second call does nothing, and ``next`` then makes batches in this process."""
        atexit.unregister(self.close)
        started, self._started = self._started, []
        for worker in started:
            worker.end()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _task(self, step: int) -> _Task:
        frames = self._frames if isinstance(self._frames, int) else self._frames(step)
        return _Task(step, (step * self._world + self._rank) * self._size, self._size, frames)

    def _start(self) -> None:
        # Workers inherit what is blocked; a signal that comes meanwhile reaches this process when it is over.
        multiprocessing.resource_tracker.ensure_running()  # or else starting a worker would unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            for _ in range(self.workers):
                self._started.append(_Worker(self.source))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        atexit.register(self.close)  # runs before multiprocessing's own, which would wait for the workers
        for step in itertools.islice(itertools.count(self._step), self.workers * AHEAD):
            self._started[step % self.workers].ask(self._task(step))


@dataclass(frozen=True)
class _Task:
    """A batch to make."""

    step: int
    index: int
    size: int
    frames: int


@dataclass(frozen=True)
class _Answer:
    """A batch, and what was found to be unusable on the way."""

    batch: Batch
    skipped: dict[str, str]


def _make(source: ClipSource, task: _Task) -> _Answer | UserError:
    try:
        clips, captions = [], []
        for index in range(task.index, task.index + task.size):
            clips.append(source.clip(index, task.frames))
            captions.append(source.caption(index))  # of the clip just drawn, so nothing is decoded again
    except UserError as error:
        return error
    skipped = dict(source.skipped) if isinstance(source, Clips) else {}
    return _Answer(Batch(task.step, torch.stack(clips), tuple(captions)), skipped)


class _Worker:
    """A process that makes batches, and the thread that fetches them.

    Batches come through a pipe and not through shared memory, of which containers have little.
    """

    def __init__(self, source: ClipSource) -> None:
        # Forked not from this process, whose threads hold locks, but from one that has done nothing but import.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ca2vdm_cli.data"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, source), daemon=True)
        self._process.start()
        theirs.close()
        self._answers: queue.Queue[_Answer | UserError] = queue.Queue()
        threading.Thread(target=self._fetch, daemon=True).start()

    def ask(self, task: _Task) -> None:
        with suppress(OSError):  # it has died, as ``answer`` will tell
            self._pipe.send(task)

    def answer(self) -> _Answer | UserError:
        return self._answers.get()

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _fetch(self) -> None:
        try:
            while True:
                received: tuple[_Task, np.ndarray, tuple[str | None, ...], dict[str, str]] | UserError
                received = self._pipe.recv()
                if isinstance(received, UserError):
                    self._answers.put(received)
                    continue
                task, clips, captions, skipped = received
                self._answers.put(_Answer(Batch(task.step, torch.from_numpy(clips), captions), skipped))
        except Exception:  # whatever it is, the caller must not wait for ever
            self._process.join()
            code = self._process.exitcode
            why = "out of memory, perhaps" if code == -signal.SIGKILL else "its own message is above, if it left one"
            advice = "try --set data.workers=0"
            error = UserError(f"data.workers: a worker process died with code {code} ({why}); {advice}")
            self._answers.put(error)


def _work(pipe: Connection, source: ClipSource) -> None:
    """What a worker does, until its parent has gone or kills it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    told: dict[str, str] = {}
    with suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            answer = _make(source, task)
            if isinstance(answer, UserError):
                pipe.send(answer)
                continue
            news = {name: reason for name, reason in answer.skipped.items() if name not in told}
            told |= news
            pipe.send((task, answer.batch.clips.numpy(), answer.batch.captions, news))
