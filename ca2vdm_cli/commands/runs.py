"""``runs``: list run folders as a tree of takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.runs.catalog import as_tree, find_runs
from ca2vdm_cli.terminal import output_console, print_json, size, table


def run(folders: Sequence[Path], *, as_json: bool) -> None:
    """``ca2vdm runs``."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
    runs = list(find_runs(folders))
    if as_json:
        print_json({"runs": [asdict(run) for run in runs]})
        return
    if not runs:
        raise UsageError(f"{', '.join(map(str, folders))}: no run there; sample and extend make one with --run DIR")
    rows = [
        [
            f"{prefix}{run.path}",
            "" if run.from_frame is None else f"from {run.from_frame}",
            f"{run.frames}/{run.frames_wanted}",
            run.status,
            "" if run.seed is None else str(run.seed),
            size(run.bytes - run.shared_bytes) + (f" + {size(run.shared_bytes)} shared" if run.shared_bytes else ""),
            ", ".join(run.outputs[:1]) + (f" … ({len(run.outputs)})" if len(run.outputs) > 1 else ""),
        ]
        for prefix, run in as_tree(runs)
    ]
    columns = ["take", "branch", "frames>", "status", "seed>", "size", "output"]
    output_console().print(table(columns, rows))
