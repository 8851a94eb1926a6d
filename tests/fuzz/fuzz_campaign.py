"""A long fuzzing run that can be interrupted and continued.

    python tests/fuzz/fuzz_campaign.py --cases 10000 --folder runs/fuzz

The cases are divided into batches, each from a seed of its own and run by a process of its own, which a crash or a hang
may end. ``FOLDER/KEY/KIND-SEED.jsonl`` has a line per finished case, so the same command goes on where an earlier one
stopped. KEY stands for the code and the cases: after a change of either, the run begins anew. Each finding is kept in
``FOLDER/KEY/findings/``: the files of the case, its command and what it printed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests")]  # when run as a program

import hypothesis  # noqa: E402
from fuzz_cases import KINDS, SHARES  # noqa: E402
from fuzz_material import Material, make_material  # noqa: E402
from fuzz_run import LIMIT_WAIT, Outcome, run_case, run_program  # noqa: E402
from fuzz_values import Case  # noqa: E402

BATCH = 500
"""Cases per process."""
PROGRAM_EVERY = 250
"""Each case of this number also runs as a program of its own, which must end in the same way."""
PR_SET_PDEATHSIG = 1
"""As in Linux's prctl.h: the signal that a process gets when its parent ends."""
SILENCE_SECONDS = 4 * LIMIT_WAIT
"""A process that finishes no case for so long is killed; start-up takes some of it."""


@dataclass(frozen=True)
class Batch:
    """Some cases of one kind."""

    kind: str
    seed: int
    cases: int
    folder: Path
    """Of the run."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed:04d}"

    @property
    def results(self) -> Path:
        """A line of JSON per finished case."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def current(self) -> Path:
        """The case that is running."""
        return self.folder / f"{self.name}.case"

    def lines(self) -> list[dict[str, Any]]:
        """The finished cases; a line that a kill cut off does not count."""
        if not self.results.exists():
            return []
        content = self.results.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self.results.write_bytes(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def record(self, number: int, case: Case, outcome: Outcome) -> None:
        """Add a finished case, and keep what is needed to repeat a finding."""
        entry: dict[str, Any] = {"n": number, "code": outcome.code, "seconds": round(outcome.seconds, 3)}
        if outcome.problem:
            entry |= {"problem": outcome.problem, "place": _place(outcome.trace), "size": _size(case)}
            keep = self.folder / "findings" / f"{self.name}-{number:03d}"
            for name, content in case.files.items():
                path = keep / "files" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            keep.mkdir(parents=True, exist_ok=True)
            command = shlex.join(["ca2vdm", *case.arguments])
            text = f"$ {command}\n{outcome.problem}\nexit code {outcome.code}\n{outcome.stderr}\n{outcome.trace}"
            (keep / "what.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def run_batch(batch: Batch) -> None:
    """In a process of its own: generate the batch's cases, and run those that are not finished."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # one process at a time writes the results
    material = load_material(batch.folder)
    finished = len(batch.lines())
    number = 0
    scratch = batch.folder / f"{batch.name}.scratch"

    @hypothesis.seed(batch.seed)
    @hypothesis.settings(
        max_examples=batch.cases,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(KINDS[batch.kind](material))
    def each(case: Case) -> None:
        nonlocal number
        if number >= finished:
            batch.current.write_bytes(pickle.dumps((number, case)))
            outcome = run_case(case, scratch)
            if outcome.problem is None and number % PROGRAM_EVERY == 0:
                outcome = _compared(outcome, run_program(case, scratch))
            batch.record(number, case, outcome)
        number += 1

    each()
    batch.current.unlink(missing_ok=True)
    (batch.folder / f"{batch.name}.done").touch()


def _compared(here: Outcome, program: Outcome) -> Outcome:
    """The outcome of a case that ran twice."""
    problem = program.problem
    if problem is None and program.code != here.code:
        problem = f"exit code {here.code} here, {program.code} as a program"
    return Outcome(program.code, program.stderr, problem and f"as a program: {problem}", here.trace, here.seconds)


def supervise(batch: Batch) -> None:
    """Run a batch in another process until all its cases are finished, recording those that end or stop it."""
    while not (batch.folder / f"{batch.name}.done").exists():
        with (batch.folder / f"{batch.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, "--batch", batch.kind, str(batch.seed), str(batch.cases), str(batch.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            hung = _wait(process, batch)
        finally:
            process.kill()
            process.wait()
        if process.returncode and batch.current.exists():
            number, case = pickle.loads(batch.current.read_bytes())  # written by this program
            if number < len(batch.lines()):
                raise RuntimeError(f"{batch.name}: the process failed between two cases; see {log.name}")
            problem = "hangs" if hung else f"the process ends with {process.returncode}"
            batch.record(number, case, Outcome(None, "", problem, log.name))
        elif process.returncode:
            raise RuntimeError(f"{batch.name}: the process failed; see {log.name}")


def _wait(process: subprocess.Popen[bytes], batch: Batch) -> bool:
    """Wait for the end of a process; returns whether it stopped finishing cases, and has to be killed."""
    size, since = -1, time.monotonic()
    while True:
        try:
            process.wait(0.2)
            return False
        except subprocess.TimeoutExpired:
            now = batch.results.stat().st_size if batch.results.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > SILENCE_SECONDS:
                return True


def load_material(folder: Path) -> Material:
    """The valid files that the cases damage, made once per run."""
    path = folder / "material.pickle"
    if not path.exists():
        content = pickle.dumps(make_material())
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(path)
    loaded: Material = pickle.loads(path.read_bytes())
    return loaded


def code_key() -> str:
    """Stands for the code that is tested and the cases that test it."""
    digest = hashlib.sha256(hypothesis.__version__.encode())
    folders = [ROOT / "ca2vdm_cli", ROOT / "backends", ROOT / "presets", Path(__file__).parent]
    for path in sorted(path for folder in folders for ending in ("py", "yaml") for path in folder.rglob(f"*.{ending}")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def batches(kinds: list[str], cases: int, folder: Path) -> Iterator[Batch]:
    """All batches of a run, the kinds taking turns."""
    total = sum(SHARES[kind] for kind in kinds)
    left = {kind: round(cases * SHARES[kind] / total) for kind in kinds}
    seed = 0
    while any(left.values()):
        for kind in kinds:
            if left[kind]:
                count = min(BATCH, left[kind])
                left[kind] -= count
                yield Batch(kind, seed, count, folder)
        seed += 1


def summary(done: list[Batch]) -> tuple[str, int]:
    """A table of counts, the findings, and how many different ones there are."""
    rows: list[str] = []
    findings: dict[tuple[str, str, str], list[tuple[int, Batch, int]]] = {}
    for kind in dict.fromkeys(batch.kind for batch in done):
        entries = [(batch, entry) for batch in done if batch.kind == kind for entry in batch.lines()]
        codes = Counter(entry["code"] for _, entry in entries)
        slowest = max((entry["seconds"] for _, entry in entries), default=0.0)
        counts = "".join(f"{codes[code]:>8}" for code in (0, 1, 2))
        bad = [(batch, entry) for batch, entry in entries if "problem" in entry]
        rows.append(f"{kind:<10}{len(entries):>7}{counts}{len(bad):>10}{slowest:>9.1f} s")
        for batch, entry in bad:
            findings.setdefault((kind, entry["problem"], entry["place"]), []).append((entry["size"], batch, entry["n"]))
    lines = [f"{'kind':<10}{'cases':>7}{'code 0':>8}{'code 1':>8}{'code 2':>8}{'findings':>10}{'slowest':>11}", *rows]
    for (kind, problem, place), found in findings.items():
        _, batch, number = min(found, key=lambda one: one[0])
        keep = batch.folder / "findings" / f"{batch.name}-{number:03d}"
        lines.append(f"{kind}: {problem}{place and f' at {place}'}: {len(found)} cases, the smallest in {keep}")
    total = sum(len(batch.lines()) for batch in done)
    lines.append(f"{total} cases, {len(findings)} different findings")
    return "\n".join(lines), len(findings)


def _place(trace: str) -> str:
    """The last line of a traceback that is in this package, and the error."""
    lines = trace.splitlines()
    ours = [line.strip() for line in lines if "ca2vdm_cli" in line and line.strip().startswith("File")]
    if not ours:
        return lines[-1] if lines else ""
    _, path, rest = ours[-1].split('"')
    return f"{Path(path).name}{rest.replace(', line ', ':').replace(', in ', ' ')}: {lines[-1].partition(':')[0]}"


def _size(case: Case) -> int:
    return sum(map(len, case.arguments)) + sum(map(len, case.files.values()))


def run(cases: int, folder: Path, kinds: list[str]) -> int:
    """Run or continue, print the summary, and return the number of different findings."""
    folder = folder.resolve() / code_key()
    folder.mkdir(parents=True, exist_ok=True)
    load_material(folder)
    todo = list(batches(kinds, cases, folder))
    began, before = time.monotonic(), sum(len(batch.lines()) for batch in todo)
    finished = before
    print(f"{folder}: {before} of {cases} cases finished earlier", flush=True)
    for batch in todo:
        finished -= len(batch.lines())
        supervise(batch)
        finished += len(batch.lines())
        rate = (finished - before) / (time.monotonic() - began)
        print(f"{batch.name}: {finished} of {cases} cases, {rate:.1f}/s", flush=True)
    text, findings = summary(todo)
    print(text, flush=True)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="how many, over all kinds (default: 10000)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "fuzz", help="default: runs/fuzz")
    parser.add_argument("--batch", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; default: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"there is no kind {unknown.pop()}")
    if arguments.batch:
        kind, seed, cases, folder = arguments.batch
        run_batch(Batch(kind, int(seed), int(cases), Path(folder)))
        return 0
    return int(run(arguments.cases, arguments.folder, arguments.kinds or list(KINDS)) > 0)


if __name__ == "__main__":
    sys.exit(main())
