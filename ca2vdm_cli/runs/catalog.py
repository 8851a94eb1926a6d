"""What is known about run folders: how far each got, what it takes on disk, and which one it branches off from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ca2vdm_cli.errors import UserError

from .record import RunFolder, RunRecord

DEPTH = 3
"""How many levels of folders are searched for runs."""


@dataclass(frozen=True)
class RunFacts:
    """One run."""

    path: str
    id: str | None
    """None if ``run.json`` is damaged."""
    parent: str | None
    """The id of the run that it branches off from."""
    from_frame: int | None
    """The first frame of its own, if it branches off."""
    status: str
    """``running``, ``interrupted``, ``finished``, or ``damaged``."""
    frames: int
    """Finished frames of all videos together, without those of the input."""
    frames_wanted: int
    bytes: int
    """Size of the folder on disk."""
    shared_bytes: int
    """Those of them that are hard links, which other takes have too."""
    outputs: list[str]
    seed: int | None
    prompt: str | None


def find_runs(folders: Iterable[Path]) -> Iterator[RunFacts]:
    """The runs in some folders, or in folders inside them."""
    for folder in folders:
        for path in _run_folders(folder, DEPTH):
            yield describe(RunFolder(path))


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if RunFolder(folder).exists:
        yield folder
    elif depth and folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield from _run_folders(path, depth - 1)


def describe(folder: RunFolder) -> RunFacts:
    """Everything about a run. All its chunks are read, so damage is found."""
    files = [path.stat() for path in folder.path.rglob("*") if path.is_file()]
    size, shared = sum(file.st_size for file in files), sum(file.st_size for file in files if file.st_nlink > 1)
    try:
        record = folder.read()
    except UserError:
        return RunFacts(str(folder.path), None, None, None, "damaged", 0, 0, size, shared, [], None, None)
    frames, damaged = _finished(folder, record)
    request = record.request
    status = "damaged" if damaged else "finished" if record.finished else "interrupted"
    return RunFacts(
        path=str(folder.path),
        id=record.id,
        parent=record.parent.id if record.parent else None,
        from_frame=record.parent.frame if record.parent else None,
        status="running" if folder.in_use else status,
        frames=frames,
        frames_wanted=request.frames * len(request.videos),
        bytes=size,
        shared_bytes=shared,
        outputs=[folder.located(output) for output in request.outputs],
        seed=request.options.get("seed"),
        prompt=request.options.get("prompt"),
    )


def _finished(folder: RunFolder, record: RunRecord) -> tuple[int, bool]:
    """Number of finished frames of all videos, and whether a chunk is damaged."""
    request, length = record.request, int(record.provenance.settings["model"]["chunk_frames"])
    wanted = request.frames - int(request.first_frame)
    frames, damaged = 0, False
    for number, first in enumerate(range(0, len(request.videos), request.batch)):
        journal, videos = folder.journal(number), len(request.videos[first : first + request.batch])
        count = sum(1 for _ in journal.chunks(-(-wanted // length)))
        damaged = damaged or bool(journal.problems)
        frames += videos * (min(count * length, wanted) + int(request.first_frame and count > 0))
    return frames, damaged


def as_tree(runs: list[RunFacts]) -> list[tuple[str, RunFacts]]:
    """The runs in the order of a tree, each with the lines before its name."""
    known = {run.id for run in runs if run.id}

    def lines(parent: str | None, prefix: str) -> Iterator[tuple[str, RunFacts]]:
        children = [run for run in runs if (run.parent if run.parent in known else None) == parent]
        for run in children:
            last = run is children[-1]
            yield (prefix + ("└─ " if last else "├─ ") if parent else ""), run
            if run.id:
                yield from lines(run.id, prefix + ("   " if last else "│  ") if parent else "")

    return list(lines(None, ""))
