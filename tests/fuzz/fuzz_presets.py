"""Presets that are not quite ones, and small models of all kinds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml
from fuzz_material import Material
from fuzz_values import HUGE, SMALL, TEXTS, VALUES, YAML_VALUES, Case, damage
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from ca2vdm_cli.presets import load_preset, to_mapping

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
