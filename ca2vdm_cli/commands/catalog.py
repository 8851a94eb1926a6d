"""``backends`` and ``presets``: what there is."""

from __future__ import annotations

import sys

from rich.markup import escape

from ca2vdm_cli import presets
from ca2vdm_cli.terminal import output_console, print_json, table


def list_backends(device: str, dtype: str, *, as_json: bool) -> None:
    """Every backend, whether it runs here, and why not."""
    from ca2vdm_cli.plugins import backends, choose_backend, why_unavailable
    from ca2vdm_cli.runtime import Dtype, dtype_name, resolve_device, resolve_dtype

    where = resolve_device(device)
    number = resolve_dtype(Dtype(dtype), where)
    auto = choose_backend("auto", where, number).name
    found = [
        {
            "name": backend.name,
            "description": backend.description,
            "available": (reason := why_unavailable(backend, where, number)) is None,
            "reason": reason,
            "auto": backend.name == auto,
        }
        for backend in sorted(backends.values(), key=lambda backend: -backend.priority)
    ]
    kind = dtype_name(number)
    if as_json:
        print_json({"device": str(where), "dtype": kind, "backends": found})
        return
    rows = [
        [
            f"[bold]{b['name']}[/]",
            "[green]auto picks it[/]" if b["auto"] else "available" if b["available"] else "[red]unavailable[/]",
            escape(str(b["reason"] or b["description"])),
        ]
        for b in found
    ]
    output_console().print(table(["backend", f"{where}, {kind}", ""], rows))


def list_presets(*, as_json: bool) -> None:
    """The built-in presets."""
    found = presets.list_presets()
    if as_json:
        print_json(
            {p.name: {"description": p.config.description, "weights": p.weights_path is not None} for p in found}
        )
        return
    rows = []
    for p in found:
        m = p.config.model
        size = f"depth {m.depth}, D {m.hidden_size}, window {m.context_frames}, chunk {m.chunk_frames}"
        name = f"[bold]{p.name}[/]" + (" (default)" if p.name == presets.DEFAULT_PRESET else "")
        rows.append([name, "yes" if p.weights_path else "no", f"{escape(p.config.description)}\n[dim]{size}[/]"])
    output_console().print(table(["preset", "weights", ""], rows))


def show_preset(name: str, overrides: list[str]) -> None:
    """A preset with every setting resolved, as YAML that ``--preset`` reads."""
    sys.stdout.write(presets.dump_preset(presets.load_preset(name, overrides).config))
