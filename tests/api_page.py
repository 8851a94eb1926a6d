"""Writes ``docs/api.md`` from the docstrings of ``ca2vdm_cli.__all__``: ``python tests/api_page.py``.

Reads the sources without importing them, so signatures are shown as they are written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import ca2vdm_cli

PACKAGE = Path(ca2vdm_cli.__file__).parent
PAGE = PACKAGE.parent / "docs" / "api.md"
INTRODUCTION = """\
# Python API

<!-- Written by tests/api_page.py from the docstrings; do not edit. -->

Everything in `ca2vdm_cli.__all__`, as in `from ca2vdm_cli import Pipeline`. Importing `ca2vdm_cli` is instant, because
each name is loaded on first use. [Plug-ins](plugins.md) has examples of the base classes.
"""
SECTIONS = {
    "Generating": ("pipeline",),
    "Video files": ("video_io",),
    "Presets": ("presets", "config"),
    "Training": ("training", "data.source"),
    "Registries": ("plugins",),
    "Base classes of plug-ins": (
        *("hookspecs", "lazy", "model.attention", "generate.samplers", "generate.context", "autoencoder"),
        *("data.readers", "video_metrics"),
    ),
    "Errors and version": ("errors", "__init__"),
}
"""Which modules' names each section has."""
RELATED = {"pipeline": ["RunOptions"], "plugins": ["Registry"]}
"""Names outside ``__all__`` that the others refer to, by module."""
ITEMS = ("Args", "Raises")
"""Parts of a docstring that are lists of names and descriptions."""

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


def render() -> str:
    """The whole page."""
    names: dict[str, list[str]] = {}
    for name in ca2vdm_cli.__all__:
        names.setdefault(ca2vdm_cli._HOME.get(name, "__init__"), []).append(name)
    parts = [INTRODUCTION]
    for title, prefixes in SECTIONS.items():
        modules = [module for prefix in prefixes for module in names if f"{module}.".startswith(f"{prefix}.")]
        parts += [f"\n## {title}\n"] if modules else []
        for module in modules:
            for name in dict.fromkeys([*names.pop(module), *RELATED.get(module, [])]):
                parts += describe(name, module)
    assert not names, f"SECTIONS lacks these: {names}"
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)) + "\n"


@cache
def definitions(module: str) -> dict[str, tuple[Definition, str | None]]:
    """The classes, functions and variables of a module or of a package's modules, with their docstrings."""
    path = PACKAGE / module.replace(".", "/")
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return documented([node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body])


def documented(body: list[ast.stmt]) -> dict[str, tuple[Definition, str | None]]:
    """Definitions in a module or class by name, with their docstrings; a variable's is the string that follows it."""
    entries: dict[str, tuple[Definition, str | None]] = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            entries[node.name] = node, ast.get_docstring(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            text = following.value if isinstance(following, ast.Expr) else None
            docstring = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else None
            if isinstance(target, ast.Name):
                entries[target.id] = node, docstring
    return entries


def describe(name: str, module: str) -> Iterator[str]:
    """One entry of the page."""
    node, docstring = definitions(module)[name]
    yield f"\n### `{name}`\n"
    if isinstance(node, ast.FunctionDef):
        yield code(signature(node))
    elif isinstance(node, ast.ClassDef):
        yield code(class_signature(node))
    elif isinstance(node, ast.AnnAssign):
        yield code(f"{name}: {ast.unparse(node.annotation)}")
    yield markdown(docstring)
    if isinstance(node, ast.ClassDef):
        members = {key: value for key, value in documented(node.body).items() if not key.startswith("_")}
        attributes = [attribute(*item) for item in members.items() if is_attribute(item[1][0])]
        if attributes:
            yield "\nAttributes:\n\n" + "\n".join(attributes)
        for method, text in members.values():
            if isinstance(method, ast.FunctionDef) and not is_attribute(method):
                yield f"\n#### `{name}.{method.name}`\n\n{code(signature(method))}\n{markdown(text)}"


def is_attribute(node: Definition) -> bool:
    """Whether users read it without calling it."""
    if isinstance(node, ast.FunctionDef):
        return "property" in map(ast.unparse, node.decorator_list)
    return not isinstance(node, ast.ClassDef)


def attribute(name: str, entry: tuple[Definition, str | None]) -> str:
    """A line of a list of attributes."""
    node, docstring = entry
    annotation = node.returns if isinstance(node, ast.FunctionDef) else getattr(node, "annotation", None)
    kind = f": {ast.unparse(annotation)}" if annotation else ""
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    default = f" = {ast.unparse(value)}" if value else ""
    return f"- `{name}{kind}{default}`" + (f": {inline(docstring)}" if docstring else "")


def signature(node: ast.FunctionDef) -> str:
    """A function or method as it is declared, without ``self`` and ``cls``."""
    arguments = [argument for argument in split(node.args) if argument not in ("self", "cls")]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({', '.join(arguments)}){result}"
    if len(line) <= 100:
        return line
    return f"{node.name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){result}"


def split(arguments: ast.arguments) -> list[str]:
    """The arguments one by one, with annotations and defaults."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [one(*pair) for pair in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        parts.append(f"*{one(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [one(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*parts, *([f"**{one(arguments.kwarg, None)}"] if arguments.kwarg else [])]


def one(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    return argument.arg + annotation + (f"{equals}{ast.unparse(default)}" if default else "")


def class_signature(node: ast.ClassDef) -> str:
    """How an object is made, or the bases of a class that has no constructor of its own."""
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        return f"class {node.name}({', '.join(map(ast.unparse, node.bases))})".removesuffix("()")
    line = signature(init).removeprefix("__init__").removesuffix(" -> None")
    return f"class {node.name}{line}"


def code(text: str) -> str:
    return f"```python\n{text}\n```"


def inline(text: str) -> str:
    """A docstring's text on one line, with Markdown's code marks."""
    return " ".join(text.replace("``", "`").split())


def markdown(docstring: str | None) -> str:
    """A docstring as Markdown: its Args, Returns and Raises become lists."""
    if not docstring:
        return ""
    blocks = re.split(r"^(Args|Returns|Raises|Yields):\n", docstring, flags=re.MULTILINE)
    parts = ["\n" + paragraphs(blocks[0])]
    for title, text in zip(blocks[1::2], blocks[2::2], strict=True):
        if title in ITEMS:
            items = re.split(r"\n(?=    \S)", text.rstrip())
            lines = [re.sub(r"^([\w, .*]+):", r"`\1`:", inline(item), count=1) for item in items]
        else:
            lines = [inline(text)]
        parts.append(f"\n{title}:\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n".join(parts)


def paragraphs(text: str) -> str:
    """Plain paragraphs; indented examples become code blocks."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        parts.append(code(block) if block.startswith("    ") else inline(block))
    return "\n\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
