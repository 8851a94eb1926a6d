"""``train --check-data``: reads a data set as training would, and reports what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.markup import escape

from ca2vdm_cli.config import Crop, DataConfig
from ca2vdm_cli.data import Layout, Video, read_layout
from ca2vdm_cli.data.clips import list_reasons, too_short
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.loading import find_weights
from ca2vdm_cli.terminal import ProgressBar, console, duration, note, print_json, table

ROWS = 20
"""How many rejects the table lists; ``--json`` lists all."""


@dataclass(frozen=True)
class _Facts:
    """What is known about a usable video."""

    frames: int
    size: tuple[int, int]
    fps: float | None
    damage: str = ""


def run(
    preset: str | None,
    checkpoint: Path | None,
    data: Path | None,
    aspect: str | None,
    overrides: list[str],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Count clips, hours, resolutions, frame rates, captions, damage and rejects. Decodes two frames of each video.

    Raises:
        UsageError: there is nothing to read, or it does not have the layout ``data.format``.
        UserError: no video is usable; the message gives the reasons.
    """
    loaded, _ = find_weights(preset, checkpoint, overrides)
    config = loaded.config
    if config.video is None:
        raise UsageError(f"preset {loaded.name}: it works on latents only and cannot read videos")
    if data is None:
        raise UsageError("--check-data: the preset's synthetic data needs no check; name a data set with --data")
    frames = config.clip_frames
    settings = config.data if aspect is None else replace(config.data, crop=Crop(aspect))
    span = (frames - 1) * settings.stride + 1
    layout = read_layout(data, settings)
    usable, rejects = _examine_all(layout, span, quiet)
    if not usable:
        raise UserError(f"{data}: no usable video ({list_reasons(rejects) or 'no video files'})")
    sizes = Counter(f"{width}x{height}" for height, width in (video.size for video in usable.values()))
    rates = Counter("none" if video.fps is None else f"{video.fps:.4g}" for video in usable.values())
    captions = sum(video.caption is not None for video in layout.videos if video.name in usable)
    # a video that a list names with several captions counts once
    distinct = {(video.file, video.part): usable[video.name] for video in layout.videos if video.name in usable}
    seconds = sum(video.frames / (video.fps or config.video.fps) for video in distinct.values())
    report = {
        "data": str(data),
        "format": layout.format,
        "videos": len(layout.videos),
        "usable_videos": len(usable),
        "frames": sum(video.frames for video in distinct.values()),
        "hours": seconds / 3600,
        "clip_frames": frames,
        "stride": settings.stride,
        "clips": sum(video.frames // span for video in usable.values()),
        "start_positions": sum(video.frames - span + 1 for video in usable.values()),
        "resolutions": dict(sizes.most_common()),
        "frame_rates": dict(rates.most_common()),
        "captions": captions,
        "damaged": {name: video.damage for name, video in usable.items() if video.damage},
        "rejects": rejects,
        "other_files": dict(Counter(layout.other).most_common()),
        "notes": list(layout.notes),
    }
    if as_json:
        print_json(report)
        return
    if quiet:
        return
    _show(report, settings, sizes, rates, rejects, layout)


def _examine_all(layout: Layout, span: int, quiet: bool) -> tuple[dict[str, _Facts], dict[str, str]]:
    """The usable videos by name, and why the others are not usable."""
    usable: dict[str, _Facts] = {}
    rejects = dict(layout.rejects)
    total = len(layout.videos)
    with ProgressBar("reading", total, total, quiet=quiet, unit="videos") as bar:
        for done, video in enumerate(layout.videos, 1):
            try:
                facts = _examine(video)
                if facts.frames < span:
                    short = too_short(facts.frames, span)
                    rejects[video.name] = f"damaged, {short}" if facts.damage else short
                else:
                    usable[video.name] = facts
            except UserError as error:
                rejects[video.name] = video.reason(error)
            bar.advance(finished=done)
    return usable, rejects


def _examine(video: Video) -> _Facts:
    """Look at a video, and decode its first and last frames; raises UserError."""
    look, frames = video.look(), video.count()
    first = next(iter(video.read(range(1))), None)
    if first is None:
        raise UserError(f"{video.file}: frame 1 of {frames} cannot be decoded")
    size = look.size or (first.shape[0], first.shape[1])
    decodable = frames if _decodes(video, range(frames - 1, frames)) else _decodes(video, range(frames))
    damage = f"{decodable} of {frames} frames can be decoded" if decodable < frames else ""
    return _Facts(decodable, size, None if look.fps is None else float(look.fps), damage)


def _decodes(video: Video, frames: range) -> int:
    """How many of these frames can be decoded, before the first that cannot."""
    count = 0
    with suppress(UserError):
        for _ in video.read(frames):
            count += 1
    return count


def _show(
    report: Mapping[str, object],
    settings: DataConfig,
    sizes: Counter[str],
    rates: Counter[str],
    rejects: dict[str, str],
    layout: Layout,
) -> None:
    hours, damaged, other = report["hours"], report["damaged"], report["other_files"]
    assert isinstance(hours, float) and isinstance(damaged, dict) and isinstance(other, dict)
    rows = [
        ["format", f"{report['format']}, split {settings.split.value}"],
        ["videos", f"{report['videos']}, {report['usable_videos']} of them usable"],
        ["length", f"{report['frames']} frames, {duration(hours * 3600)}"],
        [
            "clips",
            f"{report['clips']} of {report['clip_frames']} frames without overlap at stride {settings.stride}, "
            f"{report['start_positions']} start positions",
        ],
        ["resolutions", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(8))],
        ["frames per second", ", ".join(f"{rate} ({count})" for rate, count in rates.most_common(8))],
        ["captions", str(report["captions"])],
        ["damaged, used in part", str(len(damaged))],
        ["rejects", str(len(rejects))],
        ["other files", escape(", ".join(f"{count} {suffix}" for suffix, count in other.items())) or "none"],
    ]
    out = console()
    out.print(table(["", ""], rows, title=escape(str(report["data"]))))
    for title, reasons in (("damaged", damaged), ("reject", rejects)):
        if reasons:
            shown = [[escape(name), escape(reason)] for name, reason in list(reasons.items())[:ROWS]]
            out.print(table([title, "reason"], shown))
        if len(reasons) > ROWS:
            note(f"  and {len(reasons) - ROWS} more; --json lists them all")
    for line in layout.notes:
        note(line)
