"""``import``: a published-format checkpoint becomes weights for a preset."""

from __future__ import annotations

from pathlib import Path

import torch

from ca2vdm_cli.checkpoint import KeyReport, load_weights, read_published, save_tensors
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.loading import build_model
from ca2vdm_cli.plugins import backends
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.terminal import console, note

SHOWN = 8
"""How many keys of a kind are named."""


def run(
    checkpoint: Path, output: Path, preset: str, dtype: str, overrides: list[str], *, partial: bool, overwrite: bool
) -> None:
    """Read, compare, write."""
    if output.suffix != ".safetensors":
        raise UsageError(f"-o {output}: must end in .safetensors")
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: exists already; choose another output, or replace it with --overwrite")
    loaded = load_preset(preset, overrides)
    tensors = read_published(checkpoint)
    model = build_model(loaded.config.model, backends["eager"])
    report = load_weights(model, tensors, str(checkpoint), partial=partial, extra=True)
    state = {**(model.state_dict() if partial else {}), **{key: tensors[key] for key in report.matched}}
    if dtype != "auto":
        state = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in state.items()}
    save_tensors(output, state, {"format": "pt", "preset": loaded.name})
    _print(report)
    note(f"→ {output}; check it with: ca2vdm verify --preset {preset} --checkpoint {output}")


def _print(report: KeyReport) -> None:
    out = console()
    for what, keys in (("matched", report.matched), ("missing", report.missing), ("left over", report.left_over)):
        out.print(f"{what}: {len(keys)}", style="bold" if keys and what != "matched" else None)
        if what != "matched":
            for key in keys[:SHOWN]:
                note(f"  {key}")
            if len(keys) > SHOWN:
                note(f"  … and {len(keys) - SHOWN} more")
