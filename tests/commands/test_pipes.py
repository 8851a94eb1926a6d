"""Commands in separate processes: pipes, signals, and no terminal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from ca2vdm_cli.__main__ import main
from ca2vdm_cli.video_io import Frame, open_reader

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, "-W", "error", "-m", "ca2vdm_cli"]
BEGIN = "import sys; from ca2vdm_cli.__main__ import main; print('main', flush=True); sys.exit(main())"
ANNOUNCING = [sys.executable, "-W", "error", "-c", BEGIN]
"""The same program, but it prints a line when it has started."""
RUN = ["--device", "cpu", "--backend", "eager"]
ENDLESS = ["--frames", "1000000"]
FRAME = len(b"FRAME\n") + 32 * 32 * 3 // 2  # of y4m
TIMEOUT = 60


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of ``sample`` and ``extend``, with weights that were trained for two steps."""
    folder = str(tmp_path_factory.mktemp("trained") / "weights")
    settings = ["--set", "training.autoencoder_steps=2"]
    assert main(["train", "--preset", "tiny", "--steps", "2", "--out", folder, "--quiet", *RUN, *settings]) == 0
    return ["--preset", folder, "--steps", "2", *RUN]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """``start(*arguments, stdin=...)``: starts a command in an empty folder, with pipes for its output."""
    running: list[subprocess.Popen[bytes]] = []

    def start(
        *arguments: str, stdin: IO[bytes] | int | None = None, program: list[str] = PROGRAM
    ) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        child = subprocess.Popen([*program, *arguments], stdin=stdin, stdout=pipe, stderr=pipe, cwd=tmp_path)
        running.append(child)
        return child

    yield start
    for child in running:
        child.kill()
        child.communicate()


def read(pipe: IO[bytes] | None, size: int) -> bytes:
    assert pipe
    return pipe.read(size)


def wait_for(path: Path) -> None:
    """Wait until the file or folder exists, and a little longer, so that it has content."""
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < end, f"no {path.name} after {TIMEOUT} s"
        time.sleep(0.05)
    time.sleep(0.5)


def load(path: Path) -> list[Frame]:
    with open_reader(path) as reader:
        return list(reader)


def test_frames_are_piped_as_they_are_finished(start: Any, generate: list[str]) -> None:
    """Also: when the reader closes the pipe, the command ends without a message."""
    sample = start("sample", *generate, *ENDLESS, "-o", "-")
    header = sample.stdout.readline()
    assert header.startswith(b"YUV4MPEG2 W32 H32 F8:1 ")
    frames = [read(sample.stdout, FRAME) for _ in range(10)]
    assert all(frame.startswith(b"FRAME\n") and len(frame) == FRAME for frame in frames)
    assert sample.poll() is None
    sample.stdout.close()
    assert sample.wait(TIMEOUT) == 0
    assert sample.stderr.read() == b""


def test_piping_from_command_to_command(start: Any, generate: list[str], tmp_path: Path) -> None:
    """Standard output holds nothing but video. Messages go to standard error, without colours or a progress bar."""
    sample = start("sample", *generate, "--frames", "10", "--fps", "12", "-o", "-")
    extend = start("extend", "-", *generate, "--frames", "7", "-o", "-", "--format", "mkv", stdin=sample.stdout)
    sample.stdout.close()
    video, report = extend.communicate(timeout=TIMEOUT)
    assert (extend.returncode, sample.wait(TIMEOUT)) == (0, 0)
    for text in (report, sample.stderr.read()):
        assert b"frames/s" in text
        assert b"\x1b" not in text
        assert b"\r" not in text
    (tmp_path / "out.mkv").write_bytes(video)
    assert len(load(tmp_path / "out.mkv")) == 17
    with open_reader(tmp_path / "out.mkv") as reader:
        assert reader.fps == 12


def test_interrupting_a_pipe_of_commands(start: Any, generate: list[str], tmp_path: Path) -> None:
    """Ctrl-C reaches both commands; the second has no new frame yet, so it leaves no file."""
    sample = start("sample", *generate, *ENDLESS, "-o", "-", "-q")
    extend = start("extend", "-", *generate, "-o", "out.mkv", stdin=sample.stdout)
    sample.stdout.close()
    wait_for(tmp_path / "out.partial.mkv")
    for child in (sample, extend):
        child.send_signal(signal.SIGINT)
    assert (sample.wait(TIMEOUT), extend.wait(TIMEOUT)) == (130, 130)
    assert sample.stderr.read() == b""
    assert extend.stderr.read() == b"interrupted: no new frame was generated\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_sample_leaves_a_playable_file(
    number: signal.Signals, start: Any, generate: list[str], tmp_path: Path
) -> None:
    sample = start("sample", *generate, *ENDLESS, "-o", "out.mp4")
    wait_for(tmp_path / "out.partial.mp4")
    sample.send_signal(number)
    out, text = sample.communicate(timeout=TIMEOUT)
    assert sample.returncode == 130
    assert out == b""
    frames = len(load(tmp_path / "out.mp4"))
    assert frames > 0
    assert frames % 4 == 0  # whole chunks
    assert text.decode() == (
        "interrupted: finishing this chunk; press Ctrl-C again to stop at once\n"
        f"interrupted: {frames} new frames are in out.mp4\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_killed_sample_leaves_its_finished_chunks(start: Any, generate: list[str], tmp_path: Path) -> None:
    sample = start("sample", *generate, *ENDLESS, "-o", "out.mp4")
    wait_for(tmp_path / "out.partial.mp4")
    sample.kill()
    sample.communicate(timeout=TIMEOUT)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["out.partial.mp4"]
    frames = len(load(tmp_path / "out.partial.mp4"))
    assert frames > 0
    again = start("sample", *generate, "--frames", str(frames + 4), "-o", "out.mp4")
    again.communicate(timeout=TIMEOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]  # it begins with the same frames
    assert len(load(tmp_path / "out.mp4")) == frames + 4


def test_an_interrupt_while_the_command_starts(start: Any, generate: list[str], tmp_path: Path) -> None:
    sample = start("sample", *generate, *ENDLESS, "-o", "out.mp4", program=ANNOUNCING)
    assert sample.stdout.readline() == b"main\n"
    time.sleep(0.1)
    sample.send_signal(signal.SIGINT)
    assert sample.wait(TIMEOUT) == 130
    assert b"Traceback" not in sample.stderr.read()


@pytest.mark.parametrize(
    "command", [["--help"], ["presets"], ["backends"], ["verify", "--preset", "tiny", "--steps", "1"]]
)
def test_text_into_a_closed_pipe(start: Any, command: list[str]) -> None:
    child = start(*command)
    child.stdout.close()
    assert child.wait(TIMEOUT) == 0
    assert child.stderr.read() == b""
