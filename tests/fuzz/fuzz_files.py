"""Weights files with other headers; damaged and unusual videos."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
from fuzz_material import Material
from fuzz_values import NUMBERS, SMALL, TEXTS, VALUES, Case, damage
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from ca2vdm_cli.training.run_folder import AUTOENCODER_FILE, WEIGHTS_FILE

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
