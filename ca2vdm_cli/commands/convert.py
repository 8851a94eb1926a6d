"""``import``: turn a checkpoint in the published format into weights for a preset."""

from __future__ import annotations

from pathlib import Path

import torch

from ca2vdm_cli.checkpoint import KeyReport, match_weights, save_tensors
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.loading import build_model, model_state
from ca2vdm_cli.memory import check_memory, parameter_count
from ca2vdm_cli.plugins import backends
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.published import read_published
from ca2vdm_cli.terminal import console, note

MAX_LISTED = 8
"""Missing or left-over keys that are listed by name."""


def run(
    *,
    checkpoint: Path,
    output: Path,
    preset: str,
    dtype: str,
    overrides: list[str],
    partial: bool,
    overwrite: bool,
) -> None:
    """Read the checkpoint, compare it with the preset's model, write the matching tensors, and report."""
    if output.suffix != ".safetensors":
        raise UsageError(f"-o {output}: must end in .safetensors")
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: exists already; choose another output, or replace it with --overwrite")
    loaded = load_preset(preset, overrides)
    if partial:  # what is missing gets a new model's values
        check_memory({"weights": 4 * parameter_count(loaded.config.model)}, torch.device("cpu"), force=None)
    model = loaded.config.model
    own = build_model(model, backends["eager"]).state_dict() if partial else model_state(model)
    weights = read_published(checkpoint, own)
    tensors = weights.tensors
    report = match_weights(own, tensors, str(checkpoint), partial=partial, extra=True)
    state = {**(own if partial else {}), **{key: tensors[key] for key in report.matched}}
    if dtype != "auto":
        state = {
            key: value.to(getattr(torch, dtype)) if value.is_floating_point() else value for key, value in state.items()
        }
    save_tensors(output, state, {"format": "pt", "preset": loaded.name})
    _print(report)
    if weights.others:
        other = weights.others[0].rstrip(".") or "the top level"
        note(f"weights are under {weights.place.rstrip('.') or 'the top level'}; not used: those under {other}")
    note(f"→ {output}; check it with: ca2vdm verify --preset {preset} --checkpoint {output}")


def _print(report: KeyReport) -> None:
    out = console()
    if report.unread:
        note(f"ignored, because this model does not read them: {', '.join(report.unread)}")
    for title, keys in (("matched", report.matched), ("missing", report.missing), ("left over", report.left_over)):
        is_problem = bool(keys) and title != "matched"
        out.print(f"{title}: {len(keys)}", style="bold" if is_problem else None)
        if is_problem:
            for key in keys[:MAX_LISTED]:
                note(f"  {key}")
            if len(keys) > MAX_LISTED:
                note(f"  … and {len(keys) - MAX_LISTED} more")
