"""``verify``: exactness, on the user's own weights or against a recorded run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ca2vdm_cli.bench.reference import RecordedRun
from ca2vdm_cli.bench.verify import RUN_TOLERANCE, tolerance, verify_methods
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import contexts
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.plugins import choose_backend
from ca2vdm_cli.runtime import Dtype, dtype_name, resolve_device, resolve_dtype
from ca2vdm_cli.terminal import note, output_console, print_json, status, table

from .bench import parse_baselines


def run(
    *,
    preset: str | None,
    checkpoint: Path | None,
    recorded: Path | None,
    compare: str | None,
    steps: int | None,
    seed: int,
    backend: str,
    device: str,
    dtype: str,
    overrides: list[str],
    as_json: bool,
    force: bool,
) -> int:
    """Check, print each difference, and return 0 if all are within tolerance, else 1."""
    if recorded is not None:
        if preset is not None or checkpoint is not None or compare is not None or overrides:
            raise UsageError(
                "--recorded: the file has its own weights; leave out --preset, --checkpoint, --compare and --set"
            )
        return _recorded(recorded, backend=backend, device=device, dtype=dtype, as_json=as_json, force=force)
    baselines = _exact_baselines(compare or "recompute")
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
        force=force,
    )
    pipeline.check_memory(("cached", *baselines))
    return _own_weights(pipeline, baselines, steps=steps, seed=seed, as_json=as_json)


def _exact_baselines(compare: str) -> tuple[str, ...]:
    baselines = parse_baselines(compare)
    if not baselines:
        raise UsageError(f"--compare {compare}: name at least one context to compare with cached")
    for name in baselines:
        if not contexts[name].exact:
            raise UsageError(f"--compare {name}: its outputs are not meant to equal those of cached; leave it out")
    return baselines


@dataclass
class _Check:
    """One tensor against what it should equal."""

    tensor: str
    method: str | None
    """The baseline that is compared with ``cached``; None for recorded runs."""
    max_abs_difference: float
    tolerance: float | None
    """None after the window has slid: outputs then drift apart."""
    per_chunk: tuple[float, ...] = ()
    """Recorded videos: the largest difference in each chunk."""
    ok: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.ok = None if self.tolerance is None else self.max_abs_difference <= self.tolerance

    def __str__(self) -> str:
        return f"{self.tensor} ({self.method})" if self.method else self.tensor


def _recorded(path: Path, *, backend: str, device: str, dtype: str, as_json: bool, force: bool) -> int:
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(Dtype(dtype), torch_device)
    recording = RecordedRun(path)
    chosen = choose_backend(backend, torch_device, torch_dtype)
    with status("verifying"):
        comparisons = list(recording.compare(recording.model(chosen, torch_device, torch_dtype, force=force)))
    if not comparisons:
        raise UsageError(f"{path}: has no expected.* tensors, so there is nothing to check")
    if recording.unread:
        note(f"ignored, because this model does not read them: {', '.join(recording.unread)}")
    checks = [_Check(c.name, None, c.difference, RUN_TOLERANCE[torch_dtype], c.per_chunk) for c in comparisons]
    return _finish(str(path), chosen.name, torch_device, torch_dtype, checks, as_json=as_json)


def _own_weights(pipeline: Pipeline, baselines: tuple[str, ...], *, steps: int | None, seed: int, as_json: bool) -> int:
    dtype, checks = pipeline.model.dtype, []
    with status("verifying"):
        chunks = list(verify_methods(pipeline, baselines, steps=steps, seed=seed))
    for chunk in chunks:
        tensor = f"frames {chunk.first_frame}–{chunk.first_frame + pipeline.config.model.chunk_frames - 1}"
        allowed = tolerance(chunk, dtype) if chunk.before_slide else None
        checks += [_Check(tensor, method, difference, allowed) for method, difference in chunk.differences.items()]
    source = pipeline.preset.name + ("" if pipeline.trained else " (random weights)")
    return _finish(source, pipeline.backend.name, pipeline.model.device, dtype, checks, as_json=as_json)


def _finish(
    source: str, backend: str, device: torch.device, dtype: torch.dtype, checks: list[_Check], *, as_json: bool
) -> int:
    failed = [str(check) for check in checks if check.ok is False]
    precision = dtype_name(dtype)
    if as_json:
        report = {"source": source, "backend": backend, "device": str(device), "dtype": precision, "ok": not failed}
        print_json(report | {"results": [asdict(check) for check in checks]})
        return int(bool(failed))
    rows = []
    for check in checks:
        outcome = {True: "[green]equal[/]", False: "[bold red]differs[/]", None: "drift: the window has slid"}[check.ok]
        per_chunk = "  ".join(f"{difference:.0e}" for difference in check.per_chunk)
        allowed = "–" if check.tolerance is None else f"{check.tolerance:.1e}"
        rows.append([str(check), f"{check.max_abs_difference:.2e}", allowed, outcome, per_chunk])
    columns = ["", "difference>", "allowed>", "", *(["by chunk"] if any(check.per_chunk for check in checks) else [])]
    output_console().print(table(columns, [row[: len(columns)] for row in rows]))
    outcome = "all equal" if not failed else f"NOT EQUAL: {', '.join(failed)}"
    note(f"{source}: {backend} on {device} in {precision}: {outcome}")
    return int(bool(failed))
