"""``verify``: exactness, on the user's own weights or against a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ca2vdm_cli.bench.reference import RecordedRun
from ca2vdm_cli.bench.verify import RUN_TOLERANCE, STEP_TOLERANCE, agree, verify_strategies
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.plugins import choose_backend
from ca2vdm_cli.runtime import Dtype, dtype_name, resolve_device, resolve_dtype
from ca2vdm_cli.terminal import note, output_console, print_json, status, table


def run(
    preset: str | None,
    checkpoint: Path | None,
    recorded: Path | None,
    steps: int | None,
    seed: int,
    backend: str,
    device: str,
    dtype: str,
    overrides: list[str],
    *,
    as_json: bool,
) -> int:
    """Check, print each difference, and return 0 if all are within tolerance, else 1."""
    if recorded is not None:
        if preset is not None or checkpoint is not None or overrides:
            raise UsageError("--recorded: the file carries its own weights; leave out --preset, --checkpoint, --set")
        return _recorded(recorded, backend, device, dtype, as_json)
    return _strategies(preset, checkpoint, steps, seed, backend, device, dtype, overrides, as_json)


def _recorded(path: Path, backend: str, device: str, dtype: str, as_json: bool) -> int:
    where = resolve_device(device)
    number = resolve_dtype(Dtype(dtype), where)
    run = RecordedRun(path)
    chosen = choose_backend(backend, where, number)
    with status("verifying"):
        compared = list(run.compare(run.model(chosen, where, number)))
    if not compared:
        raise UsageError(f"{path}: has no expected.* tensors, so there is nothing to check")
    results = [
        {
            "tensor": c.name,
            "max_abs_difference": c.difference,
            "tolerance": RUN_TOLERANCE[number],
            "ok": c.difference <= RUN_TOLERANCE[number],
            "per_chunk": list(c.per_chunk),
        }
        for c in compared
    ]
    return _finish(str(path), chosen.name, where, number, results, as_json)


def _strategies(
    preset: str | None,
    checkpoint: Path | None,
    steps: int | None,
    seed: int,
    backend: str,
    device: str,
    dtype: str,
    overrides: list[str],
    as_json: bool,
) -> int:
    pipeline = Pipeline.load(
        preset,
        checkpoint=checkpoint,
        overrides=overrides,
        backend=backend,
        device=device,
        dtype=dtype,
        random_weights=True,
        pixels=False,
        seed=seed,
    )
    number = pipeline.model.dtype
    results = []
    with status("verifying"):
        rows = list(verify_strategies(pipeline, steps=steps, seed=seed))
    for row in rows:
        end = row.first_frame + pipeline.config.model.chunk_frames - 1
        allowed = STEP_TOLERANCE[number] * row.scale if row.before_slide else None
        results.append(
            {
                "tensor": f"frames {row.first_frame}–{end}",
                "max_abs_difference": row.difference,
                "tolerance": allowed,
                "ok": agree(row, number) if row.before_slide else None,
                "per_chunk": [],
            }
        )
    name = pipeline.preset.name + ("" if pipeline.trained else " (random weights)")
    return _finish(name, pipeline.backend.name, pipeline.model.device, number, results, as_json)


def _finish(
    source: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    results: list[dict[str, Any]],
    as_json: bool,
) -> int:
    failed = [r["tensor"] for r in results if r["ok"] is False]
    kind = dtype_name(dtype)
    if as_json:
        print_json(
            {
                "source": source,
                "backend": backend,
                "device": str(device),
                "dtype": kind,
                "ok": not failed,
                "results": results,
            }
        )
        return int(bool(failed))
    rows = []
    for r in results:
        verdict = {True: "[green]equal[/]", False: "[bold red]differs[/]", None: "drift: the window has slid"}[r["ok"]]
        per_chunk = "  ".join(f"{d:.0e}" for d in r["per_chunk"])
        allowed = "–" if r["tolerance"] is None else f"{r['tolerance']:.1e}"
        rows.append([r["tensor"], f"{r['max_abs_difference']:.2e}", allowed, verdict, per_chunk])
    columns = ["", "difference>", "allowed>", ""]
    with_chunks = any(r["per_chunk"] for r in results)
    output_console().print(
        table([*columns, "by chunk"] if with_chunks else columns, rows if with_chunks else [row[:4] for row in rows])
    )
    note(
        f"{source}: {backend} on {device} in {kind}: {'all equal' if not failed else 'NOT EQUAL: ' + ', '.join(failed)}"
    )
    return int(bool(failed))
