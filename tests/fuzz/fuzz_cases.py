"""Hypothesis strategies for hostile input: presets, model sizes, weights files, command lines and short videos.

A case is a command line and the files that it names. Nothing here depends on what earlier cases did, so a seed always
gives the same cases.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import typer
import yaml
from fuzz_material import Material
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from ca2vdm_cli.cli import app
from ca2vdm_cli.presets import load_preset, to_mapping
from ca2vdm_cli.training.run_folder import AUTOENCODER_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class Case:
    """A command line, and the files in the folder that it runs in."""

    arguments: tuple[str, ...]
    files: Mapping[str, bytes]

    def as_json(self) -> dict[str, Any]:
        files = {name: base64.b64encode(content).decode() for name, content in self.files.items()}
        return {"arguments": list(self.arguments), "files": files}


# --- values -----------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 48, 64, 100, 1000, 2**15, 10**8, 2**31, 2**63 - 1, 2**63, 10**30]
)
HUGE = [10**5, 10**7, 10**8, 2**31, 10**12, 2**63 - 1, 2**64, 10**400]
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "-", "--", "-1", "0", "x", "none", "null", "true", "auto", "cached", "é", "\x1b[31m", "a\nb"]
    ),
    st.text(max_size=12),
)
SCALARS = st.one_of(
    NUMBERS,
    NUMBERS.map(lambda number: -number),
    st.floats(),
    st.booleans(),
    st.none(),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
YAML_VALUES = st.one_of(
    SCALARS.map(str),
    st.sampled_from(
        [
            *("", "~", "[]", "{}", "[1, [2]]", "{a: 1}", "!!int x", '!!int ""', "!!bool maybe", "!!float z"),
            *("!!null x", "!!binary x", "!!set {a}", "!!timestamp 1", "!!omap [a]", "!x y", "&a [*a]", "*a", "&a 1"),
            *("1e400", ".inf", ".nan", "-.inf", "0x10", "0o17", "1_000", "1:30", "2024-01-01", "yes", "1e", "+1"),
            *("9" * 5000, "[" * 200, "{a: " * 50, "'", '"', "|", ">", "|\n  a", "? a", "- 1", "a: b: c", "%TAG ! x"),
        ]
    ),
    st.text(max_size=20),
)


@cache
def settings() -> tuple[str, ...]:
    """Dotted names of all settings of a preset."""

    def walk(mapping: Mapping[str, Any], section: str = "") -> list[str]:
        names = []
        for key, value in mapping.items():
            names.append(section + key)
            if isinstance(value, dict):
                names += walk(value, f"{section}{key}.")
        return names

    return tuple(walk(_all_settings()))


@cache
def counts() -> list[str]:
    """The settings that are whole numbers."""

    def value(key: str) -> Any:
        section, _, name = key.rpartition(".")
        return (_all_settings()[section] or {}).get(name) if section else _all_settings()[name]

    return [key for key in settings() if type(value(key)) is int]


@cache
def _all_settings() -> dict[str, Any]:
    return to_mapping(load_preset("tiny").config)


@cache
def _tiny() -> str:
    return load_preset("tiny").path.read_text(encoding="utf-8")


def tiny() -> dict[str, Any]:
    """The tiny preset as its file has it, without defaults."""
    loaded: dict[str, Any] = yaml.safe_load(_tiny())
    loaded["training"]["learning_rate"] = 1e-3  # YAML 1.1 would have it a text
    return loaded


def put(mapping: dict[Any, Any], key: str, value: object) -> None:
    """Set a value by its dotted name."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(mapping.get(section), dict):
            mapping[section] = {}
        mapping = mapping[section]
    mapping[name] = value


def damage(draw: DrawFn, content: bytes) -> bytes:
    """Change bytes, cut a piece off or out, repeat one, or insert one; several times."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        size = len(changed)
        where, length = draw(st.integers(0, max(0, size - 1))), draw(st.integers(1, 64))
        how = draw(st.sampled_from(["byte", "cut", "remove", "repeat", "insert", "zero"]))
        piece = changed[where : where + length]
        if how == "byte":
            changed[where : where + 1] = bytes([draw(st.integers(0, 255))])
        elif how == "cut":
            del changed[where:]
        elif how == "remove":
            del changed[where : where + length]
        elif how == "repeat":
            changed[where:where] = piece * draw(st.integers(1, 3))
        elif how == "insert":
            changed[where:where] = draw(st.binary(min_size=1, max_size=16))
        else:
            changed[where : where + length] = bytes(len(piece))
    return bytes(changed)


# --- presets ----------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    *(
        "description: x",
        "model:",
        "  depth: 2",
        "  hidden_size: 48",
        "video: null",
        "weights: ../x",
        "weights: /dev/zero",
    ),
    *("&a", "*a", "<<: *a", "- ", "? ", ": ", "---", "...", "%YAML 1.1", "!!python/object:os.system x", "{", "}", "["),
    *("]", "|", ">-", "#", "'", '"', "\t", "\r", "\0", "﻿", "  ", "{a: {b: [c]}}", "lol: &l [*l, *l]", "!!str 1"),
    *("=", "~", "1.5", "-0", "model: 3", "model: []", "text: {path: x}", "synthetic_data: {digits: 10000000000}"),
]


@st.composite
def presets(draw: DrawFn, material: Material) -> Case:
    """``presets show`` of a file that is not quite a preset, or with changes that are not quite settings."""
    show = ("presets", "show")
    ways = ["mapping", "mapping", "text", "bytes", "damaged", "override", "override", "nested", "size"]
    how = draw(st.sampled_from(ways))
    if how == "size":
        huge = draw(st.lists(st.sampled_from(counts()), min_size=1, max_size=2, unique=True))
        sizes = [f"{key}={draw(st.sampled_from(HUGE))}" for key in huge]
        sizes += draw(st.sampled_from([[], ["training.prefix_lengths="]]))
        return Case((*show, "tiny", *(part for size in sizes for part in ("--set", size))), {})
    if how == "override":
        keys = st.one_of(st.sampled_from(settings()), TEXTS, st.sampled_from(settings()).map(lambda key: key + "x"))
        changes = draw(st.lists(st.tuples(keys, YAML_VALUES), min_size=1, max_size=3))
        return Case((*show, "tiny", *(part for key, value in changes for part in ("--set", f"{key}={value}"))), {})
    if how == "mapping":
        mapping = tiny()
        for _ in range(draw(st.integers(1, 4))):
            put(mapping, draw(st.one_of(st.sampled_from(settings()), TEXTS)), draw(VALUES))
        content = yaml.safe_dump(mapping, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    elif how == "text":
        lines = draw(st.lists(st.one_of(st.sampled_from(FRAGMENTS), YAML_VALUES), max_size=12))
        content = draw(st.sampled_from(["\n", "\n  ", " "])).join(lines).encode("utf-8", "surrogatepass")
    elif how == "damaged":
        content = damage(draw, _tiny().encode())
    elif how == "nested":
        opening = draw(st.sampled_from(["[", "{a: ", "- ", "? ", "a:\n ", "[[", "!!seq [", "&a ["]))
        content = (opening * draw(st.integers(1, 30_000))).encode()
    else:
        content = draw(st.binary(max_size=300))
    return Case((*show, "case.yaml"), {"case.yaml": content})


SMALL = st.sampled_from([0, 1, 1, 2, 2, 3, 4, 5, 6, 8, 9, 12, 16])
CHOICES: dict[str, list[Any]] = {
    "model.temporal_positions": ["cyclic", "rope", "absolute"],
    "model.spatial_prefix": ["prev_frames_k", "first_frame", "none"],
    "model.causality": ["causal", "partial"],
    "diffusion.beta_schedule": ["linear", "cosine", "flow"],
    "diffusion.prediction": ["epsilon", "v", "flow"],
    "diffusion.prefix_noise": [None, [0, 1], [0, 999], [5, 2]],
    "autoencoder.kind": ["conv", "lowpass", "none"],
    "autoencoder.downsample": [1, 2, 4, 8],
    "sampling.sampler": ["ancestral", "ddim", "dpm++", "log-snr", "trailing", "EulerDiscreteScheduler"],
    "training.trainable": ["all", "temporal", "lora"],
    "training.optimizer": ["adamw", "muon"],
    "training.schedule": ["constant", "cosine"],
    "training.prefix_lengths": [None, [0], [1], [0, 4], [9], [0, 1, 4, 5, 9]],
    "training.prefix_weights": [None, [1], [0], [1, 0], [1, 1, 1, 1, 1]],
    "training.validation_metrics": [[], ["psnr"], ["ssim"], ["none"]],
    "training.clip_frames": [None, 0, 4, 8, 12, 13, 17],
    "data.stride": [1, 2, 3],
}
UNTOUCHED = ("training.steps", "autoencoder.path", "text", "data.workers", "weights", "precision", "distillation")
"""Settings that would load from elsewhere, start processes or take long."""


@st.composite
def models(draw: DrawFn, material: Material) -> Case:
    """Small models of all kinds, many of them impossible: verified, trained for a step, or measured."""
    mapping = tiny()
    changed = [key for key in settings() if not key.endswith(UNTOUCHED) and not key.startswith(UNTOUCHED)]
    for key in draw(st.lists(st.sampled_from(changed), min_size=1, max_size=4, unique=True)):
        section, _, name = key.rpartition(".")
        now = (_all_settings()[section] or {}).get(name) if section else _all_settings()[name]
        if key in CHOICES:
            put(mapping, key, draw(st.sampled_from(CHOICES[key])))
        elif isinstance(now, bool):
            put(mapping, key, draw(st.booleans()))
        elif isinstance(now, int):
            put(mapping, key, draw(SMALL) if draw(st.integers(0, 9)) else draw(st.sampled_from(HUGE)))
        elif isinstance(now, float):
            put(mapping, key, draw(st.sampled_from([0, 0.0, 1e-9, 0.5, 1, 2.5, 1e9, -1.0])))
    put(mapping, "training.autoencoder_steps", 1)
    if isinstance(mapping["video"], dict) and draw(st.booleans()):  # else few would pass the first check
        for side in ("height", "width"):
            mapping["video"][side] = mapping["model"][f"latent_{side}"] * mapping["autoencoder"]["downsample"]
        if mapping["autoencoder"]["kind"] == "none":
            mapping["video"] = mapping["synthetic_data"] = None
    run = ("--preset", "case.yaml", "--device", "cpu", "--backend", "eager")
    commands = (
        ("verify", *run, "--steps", "1"),
        ("bench", *run, "--steps", "1", "--frames", "8", "--compare", "cached", "-q"),
        ("train", *run, "--steps", "1", "--out", "run", "-q"),
    )
    return Case(draw(st.sampled_from(commands)), {"case.yaml": yaml.safe_dump(mapping).encode()})


# --- weights ----------------------------------------------------------------------------------------------------------

DTYPES = ["F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", 3, None]


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file, and its data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: str, data: bytes) -> bytes:
    """A safetensors file with this header, true or not."""
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def headers(draw: DrawFn, material: Material) -> Case:
    """A safetensors file with another header, given to every command that reads one."""
    run = ("--device", "cpu", "--backend", "eager")
    short = (*run, "--steps", "1", "--frames", "1", "-q")
    importing = ("import", "case.safetensors", "--preset", "tiny", "-o", "out.safetensors")
    file, command = draw(
        st.sampled_from(
            [
                ("case.safetensors", ("verify", "--preset", "tiny", "--checkpoint", "case.safetensors", *run)),
                ("case.safetensors", importing),
                ("case.safetensors", (*importing, "--partial")),
                ("recorded.safetensors", ("verify", "--recorded", "recorded.safetensors", *run)),
                (f"run/{WEIGHTS_FILE}", ("sample", "--checkpoint", f"run/{WEIGHTS_FILE}", *short)),
                (f"run/{AUTOENCODER_FILE}", ("sample", "--checkpoint", "run", *short)),
            ]
        )
    )
    originals = {f"run/{name}": content for name, content in material.run.items()}
    originals |= {"case.safetensors": material.run[WEIGHTS_FILE], "recorded.safetensors": material.recorded}
    original = originals[file]
    how = draw(st.sampled_from(["tensor", "tensor", "metadata", "length", "damaged", "json", "bytes"]))
    if how == "damaged":
        content = damage(draw, original)
    elif how == "bytes":
        content = draw(st.binary(max_size=200))
    elif how == "length":
        lengths = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 4000), st.just(100_000_001))
        content = struct.pack("<Q", draw(lengths)) + original[8:]
    elif how == "json":
        text = draw(st.one_of(VALUES.map(_json), st.text(max_size=40), st.integers(1, 5000).map(lambda n: '{"a":' * n)))
        content = with_header(text, original[-64:])
    else:
        header, data = split_header(original)
        if how == "metadata":
            _change_metadata(draw, header)
        else:
            _change_tensors(draw, header)
        content = with_header(_json(header), data)
    return Case(command, {**(material.run_folder if file.startswith("run/") else {}), file: content})


def _change_metadata(draw: DrawFn, header: dict[str, Any]) -> None:
    metadata = header.setdefault("__metadata__", {})
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.one_of(st.sampled_from([*metadata, "x"]), TEXTS))
        value = metadata.get(key, "")
        texts = [VALUES, VALUES.map(_json), st.integers(1, 5000).map(lambda n: "[" * n)]
        if isinstance(value, str) and value:
            texts += [st.just(damage(draw, value.encode()).decode("latin-1"))] * 2
        metadata[key] = draw(st.one_of(texts))
    if draw(st.integers(0, 9)) == 0:
        header["__metadata__"] = draw(VALUES)


def _change_tensors(draw: DrawFn, header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        entry = header.get(name)
        how = draw(st.sampled_from(["dtype", "shape", "offsets", "rename", "delete", "value", "alias"]))
        if how == "delete" or not isinstance(entry, dict):
            header.pop(name, None)
        elif how == "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif how == "shape":
            sizes = st.one_of(SMALL, NUMBERS, st.integers(-3, 3))
            entry["shape"] = draw(st.one_of(st.lists(sizes, max_size=5), st.permutations(entry["shape"]), VALUES))
        elif how == "offsets":
            offsets = st.one_of(st.integers(-8, 2**64), st.integers(0, 10_000))
            entry["data_offsets"] = draw(st.one_of(st.lists(offsets, max_size=3), VALUES))
        elif how == "rename":
            header[draw(TEXTS)] = header.pop(name)
        elif how == "alias":
            header[draw(TEXTS)] = dict(entry)
        else:
            header[name] = draw(VALUES)


def _json(value: object) -> str:
    return json.dumps(value, skipkeys=True)


# --- command lines ----------------------------------------------------------------------------------------------------

FLAG_VALUES = st.one_of(
    NUMBERS.map(str),
    st.sampled_from(
        [
            *(
                "",
                "-1",
                "-0",
                "0",
                "1",
                "2",
                "1.5",
                "nan",
                "inf",
                "1e3",
                "٣",
                "x",
                "tiny",
                "none",
                "cpu",
                "meta",
                "cuda:99",
            ),
            *("eager", "sdpa", "eager,sdpa", "eager,", ",", "cached", "recompute", "fixed-window", "float32", "ddim"),
            *("missing", "missing/x", "clip.npz", "clip.mp4", "text.txt", "folder", "folder/", ".", "run", "a\x1b[2Jb"),
            *("out.npz", "out.mp4", "out.gif", "out.y4m", "out.xyz", "out.html", "out.csv", "out/", "x\0y", "é.npz"),
            *(
                "x" * 300,
                "9,5",
                "64x48",
                "0x0",
                "1x",
                "model",
                "crop",
                "pad",
                "1GiB",
                "-5GiB",
                "1 EiB",
                "model.depth=1",
            ),
            *(
                "model.depth=0",
                "model.depht=1",
                "=",
                "model",
                "sampling.frames=-1",
                "model.context_frames=12",
                "\ud800",
            ),
        ]
    ),
    TEXTS,
)
ENDINGS = {
    "sample": "--preset run --device cpu --backend eager --steps 1 --frames 2 --num-videos 1 --sampler ddim",
    "extend": "--preset run --device cpu --backend eager --steps 1 --frames 2 --num-videos 1 --sampler ddim",
    "train": "--preset tiny --device cpu --backend eager --steps 1 --set training.autoencoder_steps=1 --out new",
    "bench": "--preset tiny --device cpu --backend eager --steps 1 --frames 8 --repeat 1",
    "plan": "--preset tiny --device cpu --backend eager --steps 1",
    "verify": "--preset tiny --device cpu --backend eager --steps 1",
}
"""Arguments that keep a command short; a case leaves out or repeats a few of them."""


@cache
def flags() -> dict[str, list[tuple[str, bool]]]:
    """Each command's flags, and whether they take a value; commands of groups as ``presets show``."""
    root: Any = typer.main.get_command(app)
    commands = dict(root.commands)
    for name, command in root.commands.items():
        commands |= {f"{name} {inner}": group for inner, group in getattr(command, "commands", {}).items()}
    return {
        name: [
            (flag, not getattr(parameter, "is_flag", False))
            for parameter in command.params
            if parameter.param_type_name == "option"
            for flag in parameter.opts
        ]
        for name, command in commands.items()
    }


@st.composite
def commands(draw: DrawFn, material: Material) -> Case:
    """A command with some of its flags, and with values that may suit other flags."""
    command = draw(st.sampled_from(sorted(flags())))
    own = flags()[command]
    words: list[str] = []
    for _ in range(draw(st.integers(0, 2 if command in ENDINGS else 3))):
        flag, takes_value = draw(st.sampled_from(own)) if own else ("--json", False)
        words.append(flag)
        if takes_value and draw(st.integers(0, 19)):
            words.append(draw(FLAG_VALUES))
    if command == "extend":
        words.insert(
            0, draw(st.sampled_from(["clip.npz", "clip.npz", "clip.mp4", "text.txt", "missing", "folder", "-", "."]))
        )
    elif draw(st.integers(0, 5)) == 0 or command in ("presets show", "import"):
        words.insert(draw(st.integers(0, len(words))), draw(FLAG_VALUES))
    if draw(st.integers(0, 30)) == 0:
        words.append(draw(st.sampled_from(["--", "--help", "-h", "--debugx", "-", "--frames=", "-qq", "--version"])))
    ending = ENDINGS.get(command, "").split()
    given = {word.partition("=")[0] for word in words}
    for i in range(0, len(ending), 2):  # a flag that was given bounds the work itself only if its value is refused
        if ending[i] in ("--backend", "--device") and ending[i] in given and draw(st.booleans()):
            continue
        if ending[i] == "--preset" and {"--checkpoint", "--recorded", "--preset"} & given and draw(st.booleans()):
            continue
        words += ending[i : i + 2]
    return Case((*command.split(), *words), material.surroundings)


# --- videos -----------------------------------------------------------------------------------------------------------


@st.composite
def videos(draw: DrawFn, material: Material) -> Case:
    """A damaged or unusual short video, image, archive or folder, to extend, begin from, or train on."""
    name = draw(st.sampled_from(sorted(material.videos)))
    suffix = name.rpartition(".")[2]
    how = draw(st.sampled_from(["damaged", "damaged", "damaged", "archive", "bytes", "renamed", "folder"]))
    files = {f"case.{suffix}": material.videos[name]}
    if how == "damaged":
        files = {f"case.{suffix}": damage(draw, material.videos[name])}
    elif how == "archive":
        files = {"case.npz": _archive(draw)}
    elif how == "bytes":
        files = {f"case.{suffix}": draw(st.binary(max_size=300))}
    elif how == "renamed":
        files = {
            f"case.{draw(st.sampled_from(['npz', 'mp4', 'png', 'txt', 'gif', 'safetensors']))}": material.videos[name]
        }
    (source,) = files
    if how == "folder":
        images = [
            material.videos[image] for image in sorted(material.videos) if image.endswith((".png", ".jpg", ".webp"))
        ]
        suffixes = st.sampled_from(["png", "jpg", "webp", "gif", "txt"])
        contents = st.one_of(st.sampled_from(images), st.sampled_from(images).map(lambda image: damage(draw, image)))
        parts = draw(st.lists(st.tuples(suffixes, contents), max_size=4))
        files = {f"case/{i}.{ending}": content for i, (ending, content) in enumerate(parts)} or {"case/empty.txt": b""}
        source = "case"
    run = ("--device", "cpu", "--backend", "eager")
    short = (*run, "--preset", "run", "--steps", "1", "--sampler", "ddim", "--frames", "1", "-q")
    out = draw(st.sampled_from(["out.npz", "out.npz", "out.y4m", "out.mp4", "out/", "out.gif"]))
    fit = ("--aspect", draw(st.sampled_from(["crop", "pad", "stretch"])))
    commands = (
        ("extend", source, *short, *fit, "-o", out),
        ("extend", source, *short, *fit, "-o", out, "--only-new"),
        ("extend", source, *short, "--size", draw(st.sampled_from(["model", "1x1", "33x7", "100x2"])), "-o", out),
        ("sample", "--first-frame", source, *short, "-o", out),
        ("train", "--preset", "tiny", "--data", source, "--check-data", "--device", "cpu"),
    )
    return Case(draw(st.sampled_from(commands)), files | material.run_folder)


def _archive(draw: DrawFn) -> bytes:
    """An npz of any shape and type, perhaps under another key."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 32, 33]), max_size=5))
    if np.prod(shape, dtype=np.int64) > 100_000:
        shape = shape[:2]
    dtype = draw(st.sampled_from(["u1", "u1", "u1", "i4", "f4", "?", "U3", "O", "c8", "M8[s]"]))
    array = np.zeros(shape, dtype)
    file = io.BytesIO()
    arrays: dict[str, Any] = {draw(st.sampled_from(["frames", "frames", "frames", "video", "frames.npy"])): array}
    np.savez_compressed(file, **arrays)
    return file.getvalue() if draw(st.integers(0, 2)) else damage(draw, file.getvalue())


KINDS: dict[str, Callable[[Material], SearchStrategy[Case]]] = {
    "presets": presets,
    "models": models,
    "headers": headers,
    "commands": commands,
    "videos": videos,
}
"""Strategies by name."""
SHARES = {"presets": 0.3, "models": 0.15, "headers": 0.2, "commands": 0.15, "videos": 0.2}
"""Shares of the cases of a long run."""
