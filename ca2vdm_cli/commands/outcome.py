"""How a run of ``sample`` or ``extend`` ended: one report for all processes, and what an error leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ca2vdm_cli.errors import UsageError, UserError, out_of_memory


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report for the videos of all processes.

    Args:
        reports: each process's own, by rank. What they share is taken from the first.
    """
    if len(reports) == 1:
        return reports[0]

    def values(key: str) -> list[Any]:
        return [report[key] for report in reports if report[key] is not None]

    outputs = [name for output in values("output") for name in ([output] if isinstance(output, str) else output)]
    seconds = max(values("seconds"))
    together = {key: max(values(key)) for key in reports[0] if key.endswith("_bytes")}
    together |= {key: max(values(key)) for key in reports[0] if key.endswith("_seconds") and values(key)}
    frames = sum(report["frames_per_second"] * report["seconds"] for report in reports)
    return (
        reports[0]
        | together
        | {
            "num_videos": sum(values("num_videos")),
            "resumed_frames": sum(values("resumed_frames")),
            "output": outputs[0] if len(outputs) == 1 else outputs,
            "seconds": seconds,
            "first_chunk_seconds": min(values("first_chunk_seconds"), default=None),
            "frames_per_second": frames / seconds,
        }
    )


def with_finished_frames(error: BaseException, frames: int, names: Sequence[str]) -> BaseException:
    """The error that ended a run, with the place of the frames that were finished.

    Args:
        error: a ``UserError``, or that memory ran out; others are returned unchanged.
        frames: number of new frames in all outputs.
        names: the outputs that have frames.
    """
    shown = error if isinstance(error, UserError) else out_of_memory(error)
    if shown is None or isinstance(error, UsageError) or not frames or not names:
        return error
    finished = "1 finished frame is" if frames == 1 else f"{frames} finished frames are"
    return UserError(f"{shown}; {finished} in {', '.join(names)}", shown.exit_code)
