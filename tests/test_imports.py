"""Imports run one way. The table says what each module may import of this project; nothing else passes.

Imports inside functions count. Those for the type checker only (``if TYPE_CHECKING``) do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"ca2vdm_cli": "ca2vdm_cli", "ca2vdm_backends": "backends", "ca2vdm_presets": "presets"}

CONFIG = {"errors", "config"}
PRESETS = CONFIG | {"presets"}
METHOD = CONFIG | {"attention", "frame_plan", "kv_cache", "layers", "model", "diffusion", "sampler", "generation"}
VIDEO = CONFIG | {"video_io", "data"}
WEIGHTS = PRESETS | METHOD | {"runtime", "plugins", "autoencoder", "checkpoint", "text_encoder"}
PIPELINE = WEIGHTS | VIDEO | {"pipeline"}
TRAINING = {
    "distillation",
    "lora",
    "zero",
    "objective",
    "optimizers",
    "processes",
    "rollout",
    "run_folder",
    "training_log",
    "validation",
}
COMMANDS = PIPELINE | {
    "__init__",
    "interrupts",
    "recorded",
    "processes",
    "run_folder",
    "trainer",
    "validation",
    "opponents",
    "compare",
    "bench",
    "bench_report",
    "figures",
    "forecast",
    "verify",
    "terminal",
}

# A module of ca2vdm_cli (a subpackage counts as one) and which others it may import.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),  # the API is imported when it is used
    "errors": set(),
    "interrupts": set(),
    "config": {"errors"},
    "presets": CONFIG,
    "hookspecs": set(),
    "plugins": {"errors", "hookspecs"},
    "attention": CONFIG,
    "frame_plan": CONFIG,
    "kv_cache": CONFIG | {"frame_plan"},
    "layers": CONFIG | {"attention", "frame_plan", "kv_cache"},
    "model": CONFIG | {"attention", "frame_plan", "kv_cache", "layers"},
    "diffusion": CONFIG,
    "objective": CONFIG | {"frame_plan", "model", "diffusion"},
    "sampler": CONFIG | {"diffusion"},
    "distillation": CONFIG | {"diffusion", "model", "objective", "sampler"},
    "lora": set(),
    "zero": CONFIG | {"processes"},
    "rollout": CONFIG | {"generation", "kv_cache", "model", "sampler"},
    "generation": METHOD - {"generation"} | {"runtime"},
    "optimizers": CONFIG | {"runtime"},
    "video_io": CONFIG | {"interrupts"},
    "data": VIDEO - {"data"} | {"checkpoint"},
    "autoencoder": VIDEO | {"checkpoint"},
    "text_encoder": CONFIG,
    "checkpoint": CONFIG,
    "recorded": METHOD | {"checkpoint"},
    "pipeline": WEIGHTS | VIDEO,
    "processes": CONFIG | {"runtime"},
    "run_folder": CONFIG | {"checkpoint"},
    "validation": PIPELINE | {"objective"},
    "training_log": CONFIG | {"run_folder"},
    "trainer": PIPELINE | TRAINING | {"interrupts"},
    "opponents": METHOD,
    "compare": PIPELINE | {"opponents"},
    "verify": PIPELINE | {"compare"},
    "costs": {"config"},
    "growth": set(),
    "bench": PIPELINE | {"__init__", "opponents", "compare", "costs", "growth", "verify"},
    "bench_report": {"errors"},
    "figures": {"errors"},
    "forecast": PIPELINE | {"__init__", "costs"},
    "runtime": CONFIG,
    "terminal": CONFIG,
    "commands": COMMANDS,
    "cli": COMMANDS | {"commands"},
    "__main__": {"__init__", "errors", "cli", "terminal"},
}
MAY_IMPORT_BACKENDS = {"plugins"}
# A backend sees the hook markers and the attention protocol, and may build on another backend.
ALLOWED_TO_BACKENDS = {"hookspecs", "attention"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS[package]).rglob("*.py"))


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Dotted names that running a module of ``package`` may import; ``from a import b`` counts as ``a.b``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch in node.orelse:
                yield from imported(ast.Module([branch], []), package)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        else:
            yield from imported(node, package)


def used(path: Path, package: str) -> dict[str, set[str]]:
    """For each package of the project, the modules of it that a file imports."""
    found: dict[str, set[str]] = {name: set() for name in FOLDERS}
    inside = [package, *path.parent.relative_to(ROOT / FOLDERS[package]).parts]
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), inside):
        top, *rest = name.split(".")
        if top in FOLDERS:
            folder = ROOT / FOLDERS[top]
            is_module = bool(rest) and ((folder / f"{rest[0]}.py").exists() or (folder / rest[0]).is_dir())
            found[top].add(rest[0] if is_module else "__init__")
    return found


@pytest.mark.parametrize("path", modules("ca2vdm_cli"), ids=lambda path: path.stem)
def test_imports_of_the_tool(path: Path) -> None:
    module = path.relative_to(ROOT / "ca2vdm_cli").parts[0].removesuffix(".py")
    assert module in ALLOWED, f"{path.name}: say in ALLOWED what it may import"
    found = used(path, "ca2vdm_cli")
    assert found["ca2vdm_cli"] - {module} <= ALLOWED[module]
    assert not found["ca2vdm_backends"] or module in MAY_IMPORT_BACKENDS
    assert not found["ca2vdm_presets"]  # data: read through importlib.resources


@pytest.mark.parametrize("path", modules("ca2vdm_backends"), ids=lambda path: path.stem)
def test_imports_of_backends(path: Path) -> None:
    found = used(path, "ca2vdm_backends")
    assert found["ca2vdm_cli"] <= ALLOWED_TO_BACKENDS
    assert not found["ca2vdm_presets"]


def test_presets_are_data() -> None:
    assert [path.name for path in modules("ca2vdm_presets")] == ["__init__.py"]
    assert not any(used(ROOT / "presets" / "__init__.py", "ca2vdm_presets").values())


def test_imports_are_read_right() -> None:
    code = """
import a.b
from . import c
from .d import e
from ..f import g
if TYPE_CHECKING:
    import h
def function():
    try:
        from i import j
    except ImportError:
        pass
"""
    names = list(imported(ast.parse(code), ["top", "sub"]))
    assert names == ["a.b", "top.sub.c", "top.sub.d.e", "top.f.g", "i.j"]


def test_table_has_no_cycle() -> None:
    placed: set[str] = set()
    while len(placed) < len(ALLOWED):
        ready = {module for module, needs in ALLOWED.items() if module not in placed and needs - {module} <= placed}
        assert ready, f"these import each other: {', '.join(sorted(set(ALLOWED) - placed))}"
        placed |= ready
