"""Imports run one way, between packages and inside each of them.

The table says what each top-level package or module may import from this project; any other import fails. Imports
inside functions count, and so do those that only the type checker sees.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_kit import ROOT

FOLDERS = {"ca2vdm_cli": "ca2vdm_cli", "ca2vdm_backends": "backends", "ca2vdm_presets": "presets"}

BASE = {"errors", "config"}
METHOD = BASE | {"model", "plugins"}
GENERATE = METHOD | {"checkpoint", "files", "generate", "runtime"}
VIDEO = BASE | {"interrupts", "options", "video_io", "video_codec", "data", "checkpoint", "plugins"}
PIPELINE = GENERATE | VIDEO | {"arguments", "memory", "presets", "loading", "autoencoder", "text_encoder", "pipeline"}

# What each package (or top-level module) may import, besides itself.
ALLOWED: dict[str, set[str]] = {
    "atomic": set(),
    "errors": set(),
    "files": {"atomic", "errors"},
    "lazy": set(),
    "options": set(),
    "hookspecs": set(),
    "interrupts": set(),
    "builtins": {"hookspecs", "lazy"},
    "config": set(),
    "model": BASE,
    "plugins": {"builtins", "errors", "hookspecs", "lazy", "model", "runtime"},
    "presets": BASE | {"plugins"},
    "runtime": {"errors", "options"},
    "checkpoint": {"atomic", "errors"},
    "memory": BASE | {"runtime"},
    "published": {"checkpoint", "errors"},
    "terminal": {"errors"},
    "text_encoder": BASE | {"checkpoint"},
    "generate": GENERATE,
    "video_io": {"atomic", "errors", "interrupts", "options"},
    "video_metrics": {"errors", "plugins", "video_io"},
    "data": VIDEO,
    "autoencoder": BASE | {"checkpoint", "plugins"},
    "video_codec": {"autoencoder", "errors"},
    "arguments": {"errors"},
    "loading": METHOD | {"checkpoint", "memory", "presets"},
    "pipeline": PIPELINE,
    "runs": PIPELINE | {"__init__"},
    "processes": BASE | {"runtime"},
    "training": PIPELINE | {"atomic", "interrupts", "processes", "video_metrics"},
    "bench": PIPELINE | {"__init__"},
    "__init__": {
        *("autoencoder", "config", "data", "errors", "generate", "hookspecs", "model", "pipeline", "plugins"),
        *("presets", "training", "video_io", "video_metrics"),
    },  # imported when they are used
    "commands": PIPELINE
    | {"__init__", "atomic", "bench", "interrupts", "processes", "published", "runs", "terminal", "training"},
    "cli": {"__init__", "commands", "errors", "options", "plugins", "presets"},
    "__main__": {"cli", "errors", "plugins", "terminal"},
}
# Only metadata: the version, and when the process began.
LEAF_OF_THE_ROOT = {"__version__", "STARTED"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS[package]).rglob("*.py"))


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Dotted names that a module of ``package`` imports; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def used(path: Path, package: str) -> Iterator[tuple[str, list[str]]]:
    """What a file imports from the project: the top-level package, and the dotted rest."""
    inside = [package, *path.parent.relative_to(ROOT / FOLDERS[package]).parts]
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), inside):
        top, *rest = name.split(".")
        if top in FOLDERS:
            yield top, rest


def place(rest: list[str]) -> str:
    """The top-level package or module of ca2vdm_cli that an import refers to."""
    folder = ROOT / "ca2vdm_cli"
    known = bool(rest) and ((folder / f"{rest[0]}.py").exists() or (folder / rest[0]).is_dir())
    return rest[0] if known else "__init__"


@pytest.mark.parametrize("path", modules("ca2vdm_cli"), ids=lambda path: str(path.relative_to(ROOT / "ca2vdm_cli")))
def test_imports_of_the_tool(path: Path) -> None:
    own = path.relative_to(ROOT / "ca2vdm_cli").parts[0].removesuffix(".py")
    assert own in ALLOWED, f"{path.name}: say in ALLOWED what it may import"
    for package, rest in used(path, "ca2vdm_cli"):
        assert package == "ca2vdm_cli", "backends are loaded by name, and presets are data"
        assert place(rest) in ALLOWED[own] | {own}, f"{'.'.join(rest)} is not among what {own} may import"


@pytest.mark.parametrize("path", modules("ca2vdm_backends"), ids=lambda path: path.stem)
def test_imports_of_backends(path: Path) -> None:
    """A backend sees the attention protocol, and may build on another backend."""
    for package, rest in used(path, "ca2vdm_backends"):
        assert package == "ca2vdm_backends" or rest[:2] == ["model", "attention"]


def test_presets_are_data() -> None:
    """The package has no code; scripts beside a preset are run by hand and not installed."""
    assert (ROOT / "presets" / "__init__.py").exists()
    assert list((ROOT / "presets").glob("*.py")) == [ROOT / "presets" / "__init__.py"]
    assert not list((ROOT / "presets").glob("*/__init__.py"))


def test_imports_are_read_correctly() -> None:
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
    assert sorted(names) == ["a.b", "h", "i.j", "top.f.g", "top.sub.c", "top.sub.d.e"]


def cycle(graph: dict[str, set[str]]) -> set[str]:
    """Nodes on a cycle or leading to one; empty if there is no cycle."""
    left = {node: set(needs) - {node} for node, needs in graph.items()}
    while ready := {node for node, needs in left.items() if not needs & left.keys()}:
        left = {node: needs for node, needs in left.items() if node not in ready}
    return set(left)


def test_packages_import_each_other_one_way() -> None:
    assert not cycle({package: needs - {"__init__"} for package, needs in ALLOWED.items()})


def test_modules_import_each_other_one_way() -> None:
    """The same between all files, where a package stands for its ``__init__``."""
    graph: dict[str, set[str]] = {}
    for path in modules("ca2vdm_cli"):
        name = ".".join(path.relative_to(ROOT / "ca2vdm_cli").with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set()
        for _, rest in used(path, "ca2vdm_cli"):
            if rest and rest[0] in LEAF_OF_THE_ROOT:
                continue
            for end in range(len(rest), 0, -1):
                target = ROOT / "ca2vdm_cli" / "/".join(rest[:end])
                if target.with_suffix(".py").exists() or (target / "__init__.py").exists():
                    graph[name].add(".".join(rest[:end]))
                    break
    graph.pop("__init__")
    assert not cycle(graph)
    assert cycle({"a": {"b"}, "b": {"a"}, "c": set()}) == {"a", "b"}
