"""Videos through pipes, and Ctrl-C while reading or writing them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
from video_kit import child, make_clip, save

from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.video_io import (
    open_reader,
    open_writer,
)

WRITE = """
import sys, numpy as np
with open_writer("-", format="{format}", fps=8) as writer:
    for i in range(80):
        writer.write(np.full((48, 64, 3), 3 * i, np.uint8))
    print("written", file=sys.stderr, flush=True)
    sys.stdin.readline()
"""
READ = """
import sys
for i, frame in enumerate(open_reader("-")):
    print(i, int(frame.mean().round()), flush=True)
"""


@pytest.mark.parametrize("format", ["y4m", "mkv"])
def test_frames_come_through_a_pipe_before_it_ends(format: str) -> None:
    pipe = subprocess.PIPE
    with (
        child(WRITE.format(format=format), stdin=pipe, stdout=pipe, stderr=pipe) as writer,
        child(READ, stdin=writer.stdout, stdout=pipe) as reader,
    ):
        assert writer.stdout and writer.stdin and writer.stderr and reader.stdout
        writer.stdout.close()
        assert writer.stderr.readline() == b"written\n"
        early = [reader.stdout.readline().split() for _ in range(20)]
        assert writer.poll() is None
        writer.stdin.close()
        rows = early + [line.split() for line in reader.stdout]
        assert writer.wait() == reader.wait() == 0 and writer.stderr.read() == b""
    assert [int(index) for index, _ in rows] == list(range(80))
    assert all(abs(int(mean) - 3 * int(index)) <= 2 for index, mean in rows)


@pytest.mark.parametrize("format", ["y4m", "mkv"])
def test_a_closed_pipe_raises_a_broken_pipe_error_and_prints_nothing(format: str) -> None:
    code = f"""
import numpy as np
try:
    with open_writer("-", format="{format}", fps=8) as writer:
        while True:
            writer.write(np.random.randint(0, 255, (48, 64, 3), np.uint8))
except BrokenPipeError:
    raise SystemExit(7)
"""
    with child(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout and writer.stderr
        assert writer.stdout.read(100)
        writer.stdout.close()
        assert writer.wait() == 7 and writer.stderr.read() == b""


def test_ctrl_c_while_waiting_for_a_pipe() -> None:
    code = """
try:
    print("ready", flush=True)
    open_reader("-")
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    with child(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout and reader.stdin and reader.stderr
        assert reader.stdout.readline() == b"ready\n"
        reader.stdin.write(b"YUV4MPEG2 W64")
        reader.stdin.flush()
        time.sleep(0.3)  # until it waits for more
        reader.send_signal(signal.SIGINT)
        assert reader.wait(20) == 130 and reader.stderr.read() == b""


@pytest.mark.parametrize("nth", [1, 2, 6])
def test_ctrl_c_on_the_way_into_a_read(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """PyAV would drop what is raised in its callback, and print what is raised before the callback's first line."""
    save(tmp_path / "clip.y4m", make_clip(60))
    calls = 0

    def interrupt_on_entry(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        if frame.f_code.co_name == "read" and Path(frame.f_code.co_filename).name == "pipe.py":
            calls += 1
            if calls == nth:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(["cat", tmp_path / "clip.y4m"], stdout=subprocess.PIPE) as pipe:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=pipe.stdout, isatty=lambda: False))
        trace = sys.gettrace()
        sys.settrace(interrupt_on_entry)
        try:
            with pytest.raises(KeyboardInterrupt), open_reader("-") as reader:
                list(reader)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            sys.settrace(trace)
            signal.signal(signal.SIGINT, before)
    assert calls >= nth and capfd.readouterr().err == ""


@pytest.mark.parametrize("seekable", [True, False])
def test_standard_input(tmp_path: Path, seekable: bool) -> None:
    save(tmp_path / "clip.mp4", make_clip())
    data = (tmp_path / "clip.mp4").read_bytes()
    with (
        (tmp_path / "clip.mp4").open("rb") as file,
        child(READ, stdin=file if seekable else subprocess.PIPE, stdout=subprocess.PIPE) as reader,
    ):
        out, _ = reader.communicate(None if seekable else data)
    assert reader.returncode == 0 and len(out.splitlines()) == 6


@pytest.mark.parametrize("data", [b"", b"nothing to see here\n" * 500])
def test_standard_input_without_a_video(data: bytes) -> None:
    with child(READ, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        _, message = reader.communicate(data)
    assert message.splitlines()[-1].startswith(b"ca2vdm_cli.errors.UserError: standard input: ")


@pytest.mark.parametrize("format", ["mp4", "gif", "npz", "png"])
def test_formats_that_a_pipe_cannot_take(format: str) -> None:
    with pytest.raises(UsageError, match="use y4m, mkv"):
        open_writer("-", format=format, fps=8)
