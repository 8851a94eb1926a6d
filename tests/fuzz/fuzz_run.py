"""Run a case in a scratch folder, and judge how it ended."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fuzz_values import Case

from ca2vdm_cli.__main__ import main
from ca2vdm_cli.bench import estimate

LIMIT_SECONDS = 20.0
"""A case that computes for longer hangs."""
LIMIT_WAIT = 300.0
"""So does one that ends no sooner, however busy the machine is."""
LIMIT_BYTES = 2**30
"""Memory that a case may take beyond what earlier ones took."""
LIMIT_DATA = 6 * 2**30
"""Memory that the process may take: what wants more is a finding, not a dead machine."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "COLUMNS": "80"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    code: int | None
    """The exit code; None if there was none."""
    stderr: str
    problem: str | None
    """What is wrong with that, in a few words; None if nothing is."""
    trace: str = ""
    """The traceback."""
    seconds: float = 0.0


class _TookTooLong(BaseException):
    """Not an ``Exception``, so that no command handles it."""


def write_files(case: Case, folder: Path) -> None:
    """Empty the folder and write the case's files to it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def run_case(case: Case, folder: Path) -> Outcome:
    """Run it in this process, with standard input at its end."""
    write_files(case, folder)
    out, err = _stream(), _stream()
    memory, began = _peak_bytes(), time.monotonic()
    code, trace, problem = None, "", None
    with _surroundings(folder, out, err):
        try:
            code = _exit_code(case)
        except _TookTooLong:
            trace, problem = traceback.format_exc(), f"no end within {LIMIT_SECONDS:.0f} s of computing"
        except BaseException as error:  # the judgement is what this is about
            trace, problem = traceback.format_exc(), f"{type(error).__name__} left main()"
    if code == 130:  # no case interrupts itself: the run is to stop
        raise KeyboardInterrupt
    seconds, text = time.monotonic() - began, _written(err)
    problem = problem or _judge(code, text, _written(out))
    if problem is None and (taken := _peak_bytes() - memory) > LIMIT_BYTES:
        problem = f"took {taken / 2**30:.1f} GiB of memory"
    if "a bug in ca2vdm" in text:
        trace = _trace_of(case, folder)
    return Outcome(code, text, problem, trace, seconds)


def run_program(case: Case, folder: Path) -> Outcome:
    """Run it as a program of its own."""
    write_files(case, folder)
    command = [sys.executable, "-W", "error", "-m", "ca2vdm_cli", *case.arguments]
    environment = {**os.environ, **OFFLINE, "HOME": str(folder)}
    limit = int(3 * LIMIT_SECONDS)  # with the imports
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=2 * LIMIT_WAIT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
        )
    except subprocess.TimeoutExpired:
        return Outcome(None, "", "the program did not end")
    text = done.stderr.decode(errors="replace")
    return Outcome(done.returncode, text, _judge(done.returncode, text, done.stdout.decode(errors="replace")))


def _exit_code(case: Case) -> int:
    try:
        return main(list(case.arguments))
    except SystemExit as end:  # installing and showing the shell's completion
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _judge(code: int | None, stderr: str, stdout: str) -> str | None:
    """What is wrong with the end of a command, if anything."""
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    for words in ("Traceback", "a bug in ca2vdm", "Warning:"):
        if words in stderr:
            return f"prints {words!r}"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if _CONTROL.search(stderr):
        return "prints a control character"
    if code and not errors and not stdout:
        return f"exit code {code} without a line"
    if len(errors) > 1 or (errors and (code == 0 or lines[-1] != errors[0])):
        return f"exit code {code} with {len(errors)} error lines, the last line is {lines[-1]!r}"
    return None


def _trace_of(case: Case, folder: Path) -> str:
    """The traceback behind "a bug in ca2vdm", from another run."""
    write_files(case, folder)
    with _surroundings(folder, _stream(), _stream()):
        try:
            main([*case.arguments, "--debug"])
        except BaseException:
            return traceback.format_exc()
    return ""


@contextlib.contextmanager
def _surroundings(folder: Path, out: io.TextIOWrapper, err: io.TextIOWrapper) -> Iterator[None]:
    """The case's folder, streams, environment and time limit; everything is as it was afterwards."""
    before, folder_before = dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    os.environ.update(OFFLINE, HOME=str(folder))
    os.chdir(folder)
    measure, estimate.MEASURE_SECONDS = estimate.MEASURE_SECONDS, 0.02
    data = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_DATA, data[1]))
    alarms = {number: signal.signal(number, _stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    with (
        open(os.devnull, encoding="utf-8") as nothing,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        stdin, sys.stdin = sys.stdin, nothing
        warnings.simplefilter("error")
        signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_WAIT)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_DATA, data)
            sys.stdin = stdin
            for number, handler in (handlers | alarms).items():
                signal.signal(number, handler)
            os.environ.clear()
            os.environ.update(before)
            os.chdir(folder_before)
            estimate.MEASURE_SECONDS = measure


def _stop(number: int, frame: FrameType | None) -> None:
    raise _TookTooLong


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="")


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(errors="replace")  # type: ignore[attr-defined]


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
