"""``backends``, ``plugins`` and ``presets``: list what is available."""

from __future__ import annotations

import sys

from rich.markup import escape

from ca2vdm_cli import presets
from ca2vdm_cli.options import Dtype
from ca2vdm_cli.plugins import REGISTRIES, backends, choose_backend, why_unavailable
from ca2vdm_cli.terminal import output_console, print_json, table


def list_backends(*, device: str, dtype: Dtype, as_json: bool) -> None:
    """List every backend, whether it is available on the device, and if not, why."""
    from ca2vdm_cli.runtime import dtype_name, resolve_device, resolve_dtype

    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    auto = choose_backend("auto", torch_device, torch_dtype).name
    entries = [
        {
            "name": backend.name,
            "description": backend.description,
            "available": (reason := why_unavailable(backend, torch_device, torch_dtype)) is None,
            "reason": reason,
            "auto": backend.name == auto,
        }
        for backend in sorted(backends.values(), key=lambda backend: -backend.priority)
    ]
    precision = dtype_name(torch_dtype)
    if as_json:
        print_json({"device": str(torch_device), "dtype": precision, "backends": entries})
        return
    rows = []
    for e in entries:
        state = "[green]auto picks it[/]" if e["auto"] else "available" if e["available"] else "[red]unavailable[/]"
        rows.append([f"[bold]{escape(str(e['name']))}[/]", state, escape(str(e["reason"] or e["description"]))])
    output_console().print(table(["backend", f"{torch_device}, {precision}", ""], rows))


def list_plugins(*, as_json: bool) -> None:
    """List every entry of every registry, and who registered it."""
    entries = [
        {
            "kind": registry.kind,
            "name": name,
            "description": registry[name].description,
            "registered_by": registry.owner(name),
        }
        for registry in REGISTRIES
        for name in registry
    ]
    if as_json:
        print_json({"plugins": entries})
        return
    columns = ["kind", "name", "registered by", ""]
    rows = [
        [e["kind"], f"[bold]{escape(e['name'])}[/]", escape(e["registered_by"]), escape(e["description"])]
        for e in entries
    ]
    output_console().print(table(columns, rows))


def list_presets(*, as_json: bool) -> None:
    """List the built-in presets."""
    loaded = presets.list_presets()
    if as_json:
        print_json(
            {p.name: {"description": p.config.description, "weights": p.weights_path is not None} for p in loaded}
        )
        return
    rows = []
    for preset in loaded:
        model = preset.config.model
        size = (
            f"depth {model.depth}, width {model.hidden_size}, window {model.context_frames}, chunk {model.chunk_frames}"
        )
        name = f"[bold]{preset.name}[/]" + (" (default)" if preset.name == presets.DEFAULT_PRESET else "")
        description = f"{escape(preset.config.description)}\n[dim]{size}[/]"
        rows.append([name, "yes" if preset.weights_path else "no", description])
    output_console().print(table(["preset", "weights", ""], rows))


def show_preset(name: str, *, overrides: list[str]) -> None:
    """Print a preset with every setting resolved, as YAML that ``--preset`` reads."""
    sys.stdout.write(presets.dump_preset(presets.load_preset(name, overrides).config))
