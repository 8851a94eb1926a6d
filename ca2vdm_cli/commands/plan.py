"""``plan``: estimate the cost of a video before it is generated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.table import Table

from ca2vdm_cli.bench.estimate import Workload, estimate
from ca2vdm_cli.bench.report import operations
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.loading import find_weights
from ca2vdm_cli.plugins import choose_backend
from ca2vdm_cli.runtime import Dtype, resolve_device, resolve_dtype
from ca2vdm_cli.terminal import duration, output_console, print_json, size, status

_UNITS = {"": 1, "B": 1, **{f"{letter}iB": 1024**i for i, letter in enumerate("KMGT", start=1)}}
_UNITS |= {f"{letter}B": 1000**i for i, letter in enumerate("KMGT", start=1)}

_CACHE_PARTS = {"context": "context", "chunk": "slots of a chunk", "prefix": "spatial prefix", "sinks": "sinks"}


def run(
    *,
    preset: str | None,
    checkpoint: Path | None,
    frames: int | None,
    steps: int | None,
    sampler: str | None,
    context_frames: int | None,
    cache_budget: str | None,
    backend: str,
    device: str,
    dtype: str,
    overrides: list[str],
    as_json: bool,
) -> None:
    """Estimate and report."""
    loaded, weights = find_weights(preset, checkpoint, overrides)
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(Dtype(dtype), torch_device)
    sampling = loaded.config.sampling
    workload = Workload(
        loaded,
        choose_backend(backend, torch_device, torch_dtype),
        torch_device,
        torch_dtype,
        frames=frames or sampling.frames,
        steps=steps or sampling.steps,
        sampler=sampler or sampling.sampler,
        context_frames=context_frames,
        cache_budget=None if cache_budget is None else _bytes(cache_budget),
        weights_file_bytes=0 if weights is None else weights.stat().st_size,
    )
    with status("measuring the machine"):
        report = estimate(workload)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    if not match or match[2] not in _UNITS:
        raise UsageError(f"--cache-budget {text}: must be a size such as 1GiB, 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _print(report: dict[str, Any]) -> None:
    out = output_console()
    time, memory = duration(report["seconds"]), size(report["peak_memory_bytes"])
    fits = "" if report["fits"] else ", [red]more than is available[/]"
    out.print(f"[bold]{report['frames']} frames in about {time}, with a peak of {memory} of memory{fits}[/]")
    out.print(
        f"{report['preset']}, cached, {report['sampler']} × {report['steps']} steps, {report['context_frames']}-frame "
        f"window, {report['backend']} on {report['device']} in {report['dtype']}",
        style="dim",
        markup=False,
    )
    rate = report["frames_per_second"]
    times = [
        f"{duration(report['seconds_per_step'])} per step",
        f"{duration(report['cache_write_seconds'])} per cache write",
        f"{duration(report['seconds_per_chunk'])} per chunk",
        f"first chunk after {duration(report['first_chunk_seconds'])}",
        f"{rate:.3g} frames/s" if rate >= 0.1 else f"{duration(1 / rate)} per frame",
    ]
    parts = [
        f"cache {size(report['cache_bytes'])}",
        f"weights {size(report['weights_bytes'])}",
        f"working memory {size(max(report[f'{part}_rise_bytes'] for part in ('step', 'write', 'decode')))}",
        f"process {size(report['process_bytes'])}",
    ]
    rows = [
        ["time", ", ".join(times)],
        ["memory", ", ".join(parts)],
        ["cache", _cache(report)],
        ["operations", f"{operations(report['flops'])}FLOP, {operations(report['flops_per_step'])}FLOP per step"],
        ["window", _window(report)],
    ]
    if report["left_out"]:
        rows.append(["not included", ", ".join(report["left_out"])])
    lines = Table.grid(padding=(0, 2))
    for name, text in rows:
        lines.add_row(f"  {name}", text)
    out.print(lines)


def _cache(report: dict[str, Any]) -> str:
    """What the cache holds."""
    parts = report["cache_parts_bytes"].items()
    return ", ".join(f"{_CACHE_PARTS.get(name, name)} {size(count)}" for name, count in parts if count)


def _window(report: dict[str, Any]) -> str:
    """The longest window, and what limits it."""
    fits, longest = report["largest_window_in_budget"], report["largest_window_of_positions"]
    largest, trained = report["largest_window"], report["largest_window_in_training"]
    limits = [f"training has windows of up to {trained} frames"]
    if longest is not None:
        limits.append(f"the model's positions allow {longest}")
    if fits is not None:
        limits.append(f"a cache of {size(report['cache_budget_bytes'])} holds {fits} frames")
    answer = f"at most --context-frames {largest}" if largest else "too little for any window"
    if report["context_frames"] > trained:
        answer = f"{report['context_frames']} frames are more than the weights were trained for; {answer}"
    return f"{answer}: {', '.join(limits)}"
