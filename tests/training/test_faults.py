"""What goes wrong during training: full disks, dead and stopped workers, faulty plug-ins, two runs in one folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_kit import RUN, Refused, ca2vdm, clip, save

import ca2vdm_cli
from ca2vdm_cli import TrainingCallbacks, UserError, metrics
from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.config import Precision
from ca2vdm_cli.processes import make_accelerator
from ca2vdm_cli.training import log, loop
from ca2vdm_cli.training.reports import StepReport
from ca2vdm_cli.training.run_folder import METRICS_FILE, WEIGHTS_FILE, RunFolder
from ca2vdm_cli.training.time_limit import MEASURED_STEPS, TimeLimit
from ca2vdm_cli.video_io import Frame
from ca2vdm_cli.video_metrics import Metric

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

QUICK = {"training.autoencoder_steps": 1, "training.checkpoint_every": 100}
TRAIN = ["train", "--preset", "tiny", *RUN, "--set", "training.autoencoder_steps=1"]


class Watcher(TrainingCallbacks):
    """Collects notes, and does something after a step or a note."""

    def __init__(
        self, after_step: Callable[[int], object] = lambda step: None, after_note: Callable[[], object] = lambda: None
    ) -> None:
        self.notes: list[str] = []
        self._after_step, self._after_note = after_step, after_note

    def note(self, message: str) -> None:
        self.notes.append(message)
        self._after_note()

    def on_step(self, report: StepReport, mean_loss: float) -> None:
        self._after_step(report.step)


def train(callbacks: TrainingCallbacks, data: Any = None, **options: Any) -> ca2vdm_cli.TrainingResult:
    options = {"steps": 4, "backend": "eager", "device": "cpu", "out": "run", "callbacks": callbacks, **options}
    return ca2vdm_cli.train("tiny", data, overrides={**QUICK, **options.pop("overrides", {})}, **options)


def newest_step() -> int:
    last, problems = RunFolder(Path("run")).newest()
    assert last is not None and not problems
    return last.step


# ------------------------------------------------------------------------------------------------------------- logs
def test_metrics_that_cannot_be_written_are_reported_once() -> None:
    def fill_disk(step: int) -> None:
        if step == 1:
            Path("run", METRICS_FILE).unlink()
            Path("run", METRICS_FILE).symlink_to("/dev/full")
        if step == 3:  # space again
            Path("run", METRICS_FILE).unlink()

    watcher = Watcher(fill_disk)
    assert train(watcher).steps == 4
    notes = [note for note in watcher.notes if METRICS_FILE in note]
    assert notes == ["run/metrics.jsonl: cannot be written (No space left on device); training goes on without it"]
    assert [json.loads(line)["step"] for line in Path("run", METRICS_FILE).read_text().splitlines()] == [4]


def test_a_deleted_folder_does_not_end_training() -> None:
    def delete(step: int) -> None:
        if step == 2:
            Path("run").rename("gone")

    watcher = Watcher(delete)
    assert train(watcher).steps == 4
    (note,) = [note for note in watcher.notes if METRICS_FILE in note]
    assert "(No such file or directory); training goes on without it" in note
    assert newest_step() == 4


@pytest.mark.parametrize("at_start", [True, False])
def test_tensorboard_that_cannot_be_written_is_reported_once(at_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    write = log._Appended.write
    started = False

    def full(file: Any, data: bytes) -> None:
        if "tfevents" in file._file.name and (at_start or started):
            raise OSError(28, "No space left on device")
        write(file, data)

    def start(step: int) -> None:
        nonlocal started
        started = True

    monkeypatch.setattr(log._Appended, "write", full)
    watcher = Watcher(start)
    assert train(watcher).steps == 4
    (note,) = [note for note in watcher.notes if "tensorboard" in note]
    assert note == "run/tensorboard: cannot be written (No space left on device); training goes on without it"
    assert len(Path("run", METRICS_FILE).read_text().splitlines()) == 4


def test_tensorboard_files_can_be_read() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Watcher(), overrides={"training.validate_every": 4, "training.validation_clips": 1})
    board = EventAccumulator("run/tensorboard").Reload()
    lines = [json.loads(line) for line in Path("run", METRICS_FILE).read_text().splitlines()]
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.step for event in board.Images("validation/sheet")] == [4]


def test_pictures_that_cannot_be_written_are_reported_once() -> None:
    def block(step: int) -> None:
        if step == 1:
            Path("run/validation").rename("elsewhere")
            Path("run/validation").write_text("not a folder")

    watcher = Watcher(block)
    often = {"training.validate_every": 2, "training.validation_clips": 1}
    assert train(watcher, overrides=often).steps == 4
    (note,) = [note for note in watcher.notes if "no pictures" in note]
    assert note.startswith("validation at step 2 leaves no pictures: run/validation")
    assert len(Path("run/validation.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------------------------------------------------- workers
def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def signal_workers(number: signal.Signals) -> None:
    for process in workers():
        os.kill(process, number)


@pytest.fixture
def video() -> str:
    save("clip.mp4", clip(20))
    return "clip.mp4"


@pytest.mark.slow
def test_a_dead_worker_ends_training_with_a_checkpoint(video: str) -> None:
    two = {"data.workers": 1}
    watcher = Watcher(lambda step: signal_workers(signal.SIGKILL) if step == 3 else None)
    with pytest.raises(UserError) as error:
        train(watcher, video, steps=40, overrides=two)
    message = str(error.value)
    step = newest_step()
    assert step >= 3 and "\n" not in message
    assert message.startswith("data.workers: a worker process died with code -9 (out of memory, perhaps); try --set")
    assert message.endswith(f"; step {step} is saved, continue with ca2vdm train --resume --out run")
    resumed = ca2vdm_cli.train(out="run", resume=True, steps=step + 1, overrides={"data.workers": 0}, device="cpu")
    assert resumed.steps_this_run == 1


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [False, True])
def test_a_stopped_worker_is_waited_for_with_a_word(
    interrupt: bool, video: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "OVERDUE", 0.4)

    def react() -> None:
        if not watcher.notes[-1].startswith("step "):
            return
        if interrupt:
            signal.raise_signal(signal.SIGINT)
        else:
            signal_workers(signal.SIGCONT)

    watcher = Watcher(lambda step: signal_workers(signal.SIGSTOP) if step == 2 else None, react)
    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            train(watcher, video, steps=40, overrides={"data.workers": 1})
        assert 2 <= newest_step() < 40
    else:
        assert train(watcher, video, steps=8, overrides={"data.workers": 1}).steps == 8
    waits = [note for note in watcher.notes if "waiting for clips" in note]
    assert len(waits) == 1
    assert re.fullmatch(
        r"step \d: waiting for clips \(a worker process is slow or stopped; --set data.workers=0 .*", waits[0]
    )


# ---------------------------------------------------------------------------------------------------------- plug-ins
class Wordy(Metric):
    name = "wordy"
    description = "for tests"

    def measure(self, generated: Frame, true: Frame) -> float:
        return "very good"  # type: ignore[return-value]


@pytest.fixture
def wordy() -> Iterator[str]:
    metrics.register(Wordy())
    yield Wordy.name
    metrics.unregister(Wordy.name)


def test_a_metric_that_returns_no_number_is_blamed(wordy: str, refused: Refused) -> None:
    settings = ["--set", f"training.validation_metrics=[{wordy}]", "--set", "training.validate_every=3"]
    often = ["--set", "training.checkpoint_every=100", "--set", "training.validation_clips=1"]
    line = refused(1, *TRAIN, *settings, *often, "--steps", 5, "--out", "run", "-q")
    assert line == (
        "error: Python code: its metric 'wordy' returned 'very good', which is not a number; fix or uninstall it; step "
        "3 is saved, continue with ca2vdm train --resume --out run"
    )
    assert newest_step() == 3


# ------------------------------------------------------------------------------------------------------------- locks
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_another_process_trains(resume: bool, refused: Refused) -> None:
    if resume:
        assert ca2vdm(*TRAIN, "--steps", 1, "--out", "run", "-q") == 0
    request = ["train", "--resume", *RUN] if resume else TRAIN
    with RunFolder(Path("run")).locked():
        line = refused(2, *request, "--steps", 2, "--out", "run")
    owner = f"process {os.getpid()}"
    assert line == f"error: --out: run is in use by another training ({owner}); wait for it, or choose another folder"
    assert Path("run").exists() == resume
    assert ca2vdm(*request, "--steps", 2, "--out", "run", "-q") == 0
    assert not Path("run/.lock").exists()


def test_a_lock_is_no_link_to_somewhere(refused: Refused) -> None:
    Path("run").mkdir()
    Path("theirs").write_text("somebody's")
    Path("run/.lock").symlink_to(Path("theirs").resolve())
    assert "run: cannot be created" in refused(1, *TRAIN, "--steps", 1, "--out", "run")
    assert Path("theirs").read_text() == "somebody's"


def test_a_request_that_fails_leaves_no_folder(refused: Refused) -> None:
    refused(2, *TRAIN, "--data", "absent", "--out", "deep/run")
    assert not Path("deep").exists()


# -------------------------------------------------------------------------------------------------------- time limits
def test_the_last_step_fits_the_time() -> None:
    now = 0.0
    limit, accelerator = TimeLimit(10, lambda: now), make_accelerator("cpu", Precision.FLOAT32)
    steps, step, changes = 1000, 0, []
    while step < steps:
        now += 20 if step == 0 else 2 if step < 100 else 3  # slower at first, and later again
        step += 1
        if (new := limit.last_step(step, steps, accelerator)) is not None:
            steps = new
            changes.append((step, steps))
    assert changes[0][0] == 1 + MEASURED_STEPS and 270 < changes[0][1] < 290
    assert 220 < steps < 235 and 570 < now <= 600
    assert TimeLimit(10, lambda: now).last_step(5, 50, accelerator) is None
    generous = TimeLimit(1000, lambda: now)
    assert [generous.last_step(step, 50, accelerator) for step in range(1, 30)] == [None] * 29


def test_a_time_limit_ends_training_with_the_schedule_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(TimeLimit.__init__, "__defaults__", (time.monotonic,))
    settings = {"training.schedule": "cosine", "training.learning_rate": 1e-3}
    result = train(Watcher(), steps=10_000, max_minutes=0.5, overrides=settings)
    assert 15 < result.steps < 30
    rates = [json.loads(line)["learning_rate"] for line in Path("run", METRICS_FILE).read_text().splitlines()]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < 0.05 * rates[0]
    assert ca2vdm_cli.load_preset("run").config.training.steps == result.steps
    assert load_tensors(Path("run", WEIGHTS_FILE))[1]["step"] == str(result.steps)


def test_an_impossible_time_limit_is_refused(refused: Refused) -> None:
    assert refused(2, *TRAIN, "--max-minutes", 0) == "error: --max-minutes: 0.0 must be above 0"
