"""``kill -9`` at random moments: the resumed run ends like one that was never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_kit import GENERATE, ca2vdm, load

pytestmark = pytest.mark.slow

# Forks a process for each attempt, since importing torch anew takes seconds. Nothing is computed before the fork.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
import ca2vdm_cli.commands.generate, ca2vdm_cli.commands.resume
from ca2vdm_cli.__main__ import main

kills, request = json.loads(sys.argv[1]), json.loads(sys.argv[2])
randomness, killed, take, longest = random.Random(kills), 0, 0, 1.0
takes = []

def attempt(delay):
    folder = f"take-{take}"
    arguments = ["resume", folder, "-q"]
    if not Path(folder, "run.json").exists():
        arguments = [*request, "--run", folder, "-o", f"{folder}.npz", "--overwrite"]
    began, child = time.monotonic(), os.fork()
    if not child:
        os._exit(main(arguments))
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), time.monotonic() - began

while killed < kills:
    code, seconds = attempt(randomness.uniform(0, 0.6 * longest) if takes or killed else None)
    assert code in (0, -signal.SIGKILL), code
    killed += code != 0
    if code == 0:
        longest = seconds if not takes else longest
        takes.append(f"take-{take}.npz")
        take += 1
code, _ = attempt(None)
assert code == 0
print(json.dumps([*takes, f"take-{take}.npz"]))
"""


@pytest.mark.parametrize("extend", [False, True], ids=["sample", "extend"])
def test_killed_at_random_moments(extend: bool, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times in all, at any moment: while it starts, denoises, writes a chunk, a snapshot or the video."""
    monkeypatch.chdir(tmp_path)
    request = ["--preset", str(weights), *map(str, GENERATE), "--frames", "22", "-q"]
    if extend:
        assert ca2vdm("sample", *request[:-3], "--frames", 11, "-q", "-o", "given.npz") == 0
        request = ["extend", "given.npz", *request, "--num-videos", "2"]
    else:
        request = ["sample", *request]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, json.dumps(10), json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    takes = json.loads(done.stdout)
    assert ca2vdm(*request, "-o", "whole.npz") == 0
    names = [("take-{}-00", "whole-00"), ("take-{}-01", "whole-01")] if extend else [("take-{}", "whole")]
    for number in range(len(takes)):
        for take, whole in names:
            assert Path(f"{take.format(number)}.npz").read_bytes() == Path(f"{whole}.npz").read_bytes()
    assert len(load(f"{names[0][1]}.npz")) == (33 if extend else 22)
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("*.reserved")]
