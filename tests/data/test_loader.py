"""The loader: the same batches with any number of workers, which neither outlive their parent nor hide errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from command_kit import batch

from ca2vdm_cli.config import DataConfig
from ca2vdm_cli.data import ClipLoader, ClipSource, MovingDigits, loader, open_clips
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.video_io import open_writer

FRAMES = 4


def write_video(path: Path, count: int) -> None:
    with open_writer(path, fps=8) as writer:
        for t in range(count):
            writer.write(np.full((16, 16, 3), 4 * t, np.uint8))


def videos(path: Path, seed: int = 0) -> ClipSource:
    return open_clips(path, load_preset("tiny").config, seed, FRAMES)


def digits() -> ClipSource:
    return open_clips(None, load_preset("tiny").config, 0, FRAMES)


def test_workers_make_the_same_batches_as_one_process(tmp_path: Path) -> None:
    lines = '{"path": "a.mp4", "text": "one"}\n{"path": "b.mp4"}\n{"path": "c.mp4"}\n'
    (tmp_path / "list.jsonl").write_text(lines)
    write_video(tmp_path / "a.mp4", 30)
    write_video(tmp_path / "b.mp4", 20)
    (tmp_path / "c.mp4").write_bytes(b"nothing")
    source = videos(tmp_path / "list.jsonl")

    def length(step: int) -> int:
        return 2 + step % 3

    with ClipLoader(videos(tmp_path / "list.jsonl"), length, 3, first=5, workers=0) as alone:
        expected = [next(alone) for _ in range(7)]
    source_of_workers = videos(tmp_path / "list.jsonl")
    with ClipLoader(source_of_workers, length, 3, first=5, workers=2) as many:
        batches = [next(many) for _ in range(7)]
        assert many.wait_seconds > 0 and len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()
    for step, (one, other) in enumerate(zip(expected, batches, strict=True), 5):
        assert one.step == other.step == step and one.captions == other.captions
        assert torch.equal(one.clips, other.clips)
        assert torch.equal(one.clips, batch(source, 3 * step, 3, length(step)))
    assert {caption for one in batches for caption in one.captions} == {"one", None}


def test_training_processes_divide_a_steps_clips() -> None:
    source = digits()
    whole = ClipLoader(source, FRAMES, 4, first=3)
    ranks = [ClipLoader(source, FRAMES, 2, first=3, rank=rank, world=2) for rank in (0, 1)]
    assert whole.workers == 0 and isinstance(source, MovingDigits)
    for _ in range(2):
        assert torch.equal(next(whole).clips, torch.cat([next(rank).clips for rank in ranks]))


def test_what_workers_skip_reaches_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ca2vdm_cli.data.clips.HEADERS", 0)  # as if there were too many videos to look at first
    write_video(tmp_path / "a.mp4", 20)
    write_video(tmp_path / "b.mp4", 2)
    source = open_clips(tmp_path, load_preset("tiny").config, 0, FRAMES)
    assert source.skipped == {}  # type: ignore[attr-defined]
    with ClipLoader(source, FRAMES, 8, workers=1) as loader_:
        next(loader_)
    assert source.skipped == {"b.mp4": "2 frames, a clip has 4"}  # type: ignore[attr-defined]


def test_an_error_in_a_worker_is_one_line_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ca2vdm_cli.data.clips.HEADERS", 0)
    write_video(tmp_path / "a.mp4", 2)
    with (
        ClipLoader(open_clips(tmp_path, load_preset("tiny").config, 0, FRAMES), FRAMES, 2, workers=1) as loader_,
        pytest.raises(UserError, match=r"no usable video \(a\.mp4: 2 frames, a clip has 4\)$"),
    ):
        next(loader_)
    assert not multiprocessing.active_children()


def test_a_dead_worker_is_an_error_and_workers_ignore_signals() -> None:
    with ClipLoader(digits(), FRAMES, 2, workers=1) as loader_:
        next(loader_)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, number)
        for _ in range(4):
            next(loader_)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"a worker process died with code -9 .* try --set data\.workers=0"):
            deque(islice(loader_, 10))


SCRIPT = """if True:
    import multiprocessing, os, signal, sys
    from ca2vdm_cli.data import ClipLoader, open_clips
    from ca2vdm_cli.presets import load_preset
    if __name__ == "__main__":
        loader = ClipLoader(open_clips(None, load_preset("tiny").config, 0, 4), 4, 2, workers=1)
        next(loader)
        print(multiprocessing.active_children()[0].pid, flush=True)
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["end", "kill"])
def test_workers_end_with_their_parent(tmp_path: Path, how: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py", how], capture_output=True, text=True, timeout=60, check=False
    )
    assert not run.stderr and run.returncode == (0 if how == "end" else -signal.SIGKILL)
    for _ in range(100):
        if not Path(f"/proc/{int(run.stdout)}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker still runs")


def test_workers_are_the_default_if_frames_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", 20)
    monkeypatch.setattr(loader, "DEFAULT_WORKERS", 0)
    config = replace(load_preset("tiny").config, data=DataConfig(stride=2))
    assert next(ClipLoader(open_clips(tmp_path, config, 0, FRAMES), FRAMES, 2)).clips.shape == (2, FRAMES, 1, 32, 32)
