"""Presets: YAML files with all settings that belong to one set of weights. Reads, checks, changes and writes them.

A preset is identified by the name of a built-in one, by a YAML file, or by a folder with a ``preset.yaml``, such as the
folder of a training run. Files that it names lie beside it. Nothing in this module imports torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from importlib import resources
from pathlib import Path
from re import compile as regex
from typing import Any, ClassVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from .config import Preset
from .errors import UsageError, first_line
from .plugins import Registry, autoencoders, metrics, readers

DEFAULT_PRESET = "moving-digits"
"""The preset that commands use by default."""
PRESET_FILE = "preset.yaml"
"""File name of a preset that has its own folder."""
MAX_BYTES = 64 * 1024
"""Size limit of a preset; a larger file is not one."""

MAX_NESTING = 8
"""How deeply lists and sections may be nested in one."""


@dataclass(frozen=True)
class LoadedPreset:
    """A preset, and the files that belong to it."""

    name: str
    """Name of the built-in preset, of the file without suffix, or of the folder."""
    path: Path
    """The YAML file."""
    config: Preset
    """Its settings, with overrides applied."""
    weights_path: Path | None
    """The model's weights, an existing file; None if the preset must be trained first."""
    autoencoder_weights_path: Path | None
    """The conv autoencoder's weights, an existing file, or None."""


Overrides = Mapping[str, Any] | Sequence[str]
"""Changes to a preset: ``{"model.depth": 4}``, nested or not, or ``["model.depth=4"]``."""


def listed_overrides(overrides: Overrides, section: str = "") -> list[str]:
    """Overrides in the form ``model.depth=4``; values of a mapping are written as JSON, which is YAML too."""
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return list(overrides)
    changes = []
    for key, value in overrides.items():
        nested = isinstance(value, Mapping)
        change = f"{section}{key}={json.dumps(value, default=str)}"
        changes += listed_overrides(value, f"{section}{key}.") if nested else [change]
    return changes


def load_preset(name_or_path: str | Path | Preset | LoadedPreset, overrides: Overrides = ()) -> LoadedPreset:
    """Read a preset and check it.

    Args:
        name_or_path: a built-in preset's name, a YAML file, or a folder with a ``preset.yaml``; or what
            ``load_preset`` returned; or a ``Preset``, whose files are relative to the working directory.
        overrides: changes such as ``model.depth=4``, applied in order, or a mapping of them. Values are YAML; an empty
            value means null.

    Raises:
        UsageError: the preset does not exist, is not valid, or names weights that do not exist.
    """
    if isinstance(name_or_path, LoadedPreset):
        path, mapping = name_or_path.path, to_mapping(name_or_path.config)
    elif isinstance(name_or_path, Preset):
        path, mapping = Path(PRESET_FILE), to_mapping(name_or_path)
    else:
        path = _find(name_or_path)
        mapping = _read(path)
    given = path if isinstance(name_or_path, (Preset, LoadedPreset)) else name_or_path
    changes = listed_overrides(overrides)
    source = " ".join([str(path), *(["with"] if changes else []), *map(_clip, changes)])
    for override in changes:
        _apply(override, mapping)
    config = preset_from_mapping(mapping, source)
    name = path.parent.resolve().name if path.name == PRESET_FILE else path.stem

    def beside(key: str) -> Path | None:
        file: str | None = getattr(config, key)
        if file is None:
            return None
        if not _exists(path.parent / file):
            shown = _clip(repr(file)) if len(file) > 60 or not file.isprintable() else path.parent / file
            raise UsageError(
                f"{path}: {key}: {shown} does not exist; put the file there, or train new weights: "
                f"ca2vdm train --preset {given} --set {key}=null"
            )
        return path.parent / file

    return LoadedPreset(name, path, config, beside("weights"), beside("autoencoder_weights"))


def list_presets() -> list[LoadedPreset]:
    """The built-in presets, by name."""
    return [load_preset(name) for name in preset_names()]


def preset_names() -> list[str]:
    """Names of the built-in presets."""
    return sorted(_builtin_presets())


def preset_from_mapping(mapping: object, source: str = "preset") -> Preset:
    """Check settings that were read from YAML, JSON or a checkpoint's metadata.

    Args:
        mapping: sections and values, of plain types.
        source: where they came from, for error messages.

    Raises:
        UsageError: a setting is not valid; the message names the source, the key, its value and what is allowed.
    """
    try:
        # through JSON: strict about types, but accepts a name for an enum and a list for a tuple
        text = json.dumps(mapping, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source}: a value must be text, a finite number, true, false or null: {error}") from error
    try:
        preset = _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        raise UsageError(f"{source}: {_first_problem(error)}") from error
    checks: tuple[tuple[Registry[Any], str, str], ...] = (
        (autoencoders, "autoencoder.kind", preset.autoencoder.kind),
        (readers, "data.format", preset.data.format),
        *((metrics, "training.validation_metrics", name) for name in preset.training.validation_metrics),
    )
    for registry, key, name in checks:
        if name not in registry.reserved:
            registry.check(name, f"{source}: {key}")
    return preset


def to_mapping(preset: Preset) -> dict[str, Any]:
    """All settings of a preset, defaults included, as plain types in the order of the fields."""
    mapping: dict[str, Any] = _ADAPTER.dump_python(preset, mode="json")
    return mapping


def dump_preset(preset: Preset) -> str:
    """All settings of a preset as YAML, each with a comment that explains it. ``load_preset`` reads it back."""
    return "\n".join(_lines(preset, to_mapping(preset))) + "\n"


def _lines(section: Any, values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in values.items():
        nested = getattr(section, name)
        comment = " ".join((section.__pydantic_fields__[name].description or "").split())
        if isinstance(nested, Enum):
            comment += f" One of: {', '.join(choice.value for choice in type(nested))}."
        is_section = is_dataclass(nested)
        text = f"{name}:" if is_section else yaml.dump({name: value}, Dumper=_Dumper, allow_unicode=True, width=10**6)
        yield f"{indent + text.strip():<34}  # {comment}"
        if is_section:
            yield from _lines(nested, value, indent + "  ")


# Finding and reading


def _builtin_presets() -> dict[str, Path]:
    """The YAML file of each built-in preset: ``NAME.yaml``, or ``NAME/preset.yaml`` if there are more files."""
    root = Path(str(resources.files("ca2vdm_presets")))
    files = {path.stem: path for path in root.glob("*.yaml")}
    return files | {path.parent.name: path for path in root.glob(f"*/{PRESET_FILE}")}


def _find(name_or_path: str | Path) -> Path:
    builtin = _builtin_presets()
    if str(name_or_path) in builtin:
        return builtin[str(name_or_path)]
    path = Path(name_or_path)
    if _exists(path):
        return path
    if _exists(path / PRESET_FILE):
        return path / PRESET_FILE
    reason = f"is a folder without {PRESET_FILE}" if _exists(path, Path.is_dir) else "is neither built in nor a file"
    near = difflib.get_close_matches(str(name_or_path), sorted(builtin), n=3)
    advice = f"did you mean {' or '.join(near)}?" if near else f"built in: {', '.join(sorted(builtin))}"
    raise UsageError(f"preset {_clip(repr(str(name_or_path)))} {reason}; {advice}")


def _exists(path: Path, check: Callable[[Path], bool] = Path.is_file) -> bool:
    """Whether there is such a file or folder; also False for a name that no file can have."""
    try:
        return check(path)
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({first_line(error)})") from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: larger than {MAX_BYTES // 1024} KiB, so not a preset")
    mapping = _parse(data, str(path))
    if not isinstance(mapping, dict):
        raise UsageError(f"{path}: contains {_shown(mapping)}; a preset has keys such as description and model")
    return mapping


def _parse(text: str | bytes, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UsageError(f"{source}: {line}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


# Only the plain values of YAML 1.2: 2e-5 is a number, while yes, 1:30 and 2024-01-01 are text.
_PLAIN_VALUES = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}


def _plain_value(name: str) -> Any:
    """The constructor of a plain value, which checks its form: an explicit tag (``!!int x``) may claim anything."""
    tag, pattern = f"tag:yaml.org,2002:{name}", regex(_PLAIN_VALUES[name])

    def construct(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode) or not pattern.fullmatch(node.value):
            value = repr(_clip(node.value)) if isinstance(node, yaml.ScalarNode) else "a list or section"
            raise yaml.constructor.ConstructorError(None, None, f"{value} is not of type {name}", node.start_mark)
        return yaml.SafeLoader.yaml_constructors[tag](loader, node)

    return construct


class _Loader(yaml.SafeLoader):
    """Only the plain values of YAML 1.2; aliases, duplicate keys and deep nesting are rejected."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (*(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")), None)
    } | {f"tag:yaml.org,2002:{name}": _plain_value(name) for name in _PLAIN_VALUES}

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.get_mark())
        if self.depth == MAX_NESTING:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_NESTING} deep", self.get_mark())
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                problem = f"duplicate key {key.value!r}" if isinstance(key, yaml.ScalarNode) else "a key must be a word"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads: quotes text only if it would be read as something else; lists on one line."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


for _tag, _pattern in _PLAIN_VALUES.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", regex(rf"(?:{_pattern})\Z"), None)
_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


# Overriding and explaining

_ADAPTER = TypeAdapter(Preset)


@cache
def _keys() -> dict[str, list[str]]:
    """The keys of each section, by the section's dotted name ("" for the preset itself)."""

    def walk(section: type, name: str) -> Iterator[tuple[str, list[str]]]:
        yield name, [field.name for field in fields(section)]
        for key, hint in get_type_hints(section).items():
            for part in (hint, *get_args(hint)):
                if isinstance(part, type) and is_dataclass(part):
                    yield from walk(part, f"{name}.{key}".lstrip("."))

    return dict(walk(Preset, ""))


def _split(key: str) -> tuple[str, str]:
    section, _, name = key.rpartition(".")
    return section, name


def _is_known(key: str) -> bool:
    section, name = _split(key)
    return name in _keys().get(section, [])


def _allowed(key: str) -> str:
    """The keys closest to an unknown one, or all keys of its section if none is close."""
    section, name = _split(key)
    known = [f"{section}.{name}".lstrip(".") for section, names in _keys().items() for name in names]
    near = [k for k in known if _split(k)[1] == name] + difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    if near:
        return f"did you mean {' or '.join(dict.fromkeys(near))}?"
    while section not in _keys():
        section = _split(section)[0]
    return f"allowed{f' in {section}' if section else ''}: {', '.join(_keys()[section])}"


def _apply(override: str, mapping: dict[str, Any]) -> None:
    """Set one value in the mapping of a preset, in place."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"overrides: {_clip(override)} must be a key and a value, such as model.depth=4")
    key = key.strip()
    if not _is_known(key):
        raise UsageError(f"overrides: {key!r} is not a key of a preset; {_allowed(key)}")
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(mapping.get(section), dict):
            mapping[section] = {}
        mapping = mapping[section]
    mapping[name] = _parse(text, f"overrides: {_clip(override)}")


def _first_problem(error: ValidationError) -> str:
    """One line for a failed validation: the first problem, and the number of further ones."""
    problems = error.errors(include_url=False)
    unknown = [problem for problem in problems if problem["type"] == "unexpected_keyword_argument"]
    problem = (unknown or problems)[0]  # a misspelt key also counts as a missing one: report the misspelling
    key = ".".join(map(str, problem["loc"]))
    value = _shown(problem["input"])
    if unknown:
        line = f"{key}: there is no such key (its value is {value}); {_allowed(key)}"
    elif problem["type"] == "json_invalid":  # text with half a surrogate pair
        line = f"a value is not text that can be written as UTF-8 ({problem['ctx']['error']})"
    elif problem["type"] == "missing":
        line = f"{key}: missing, and it has no default"
    elif problem["type"] == "value_error":  # the message of config names the field, but not its section
        line = f"{key}.".lstrip(".") + problem["msg"].removeprefix("Value error, ")
    elif problem["type"] == "dataclass_type":
        line = f"{key}: {value} must be a section with the keys {', '.join(_keys()[key])}"
    else:
        line = f"{key}: {value} {problem['msg'].replace('Input should be', 'must be', 1)}"
    return line + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return _clip(text if text.isprintable() else json.dumps(value))


def _clip(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
