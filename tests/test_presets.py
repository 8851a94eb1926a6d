"""Presets: the built-in ones, overrides, error messages, and writing a preset and reading it back."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ca2vdm_cli.config import Preset, SpatialPrefix, TemporalPositions
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.presets import (
    DEFAULT_PRESET,
    MAX_BYTES,
    PRESET_FILE,
    dump_preset,
    list_presets,
    load_preset,
    preset_from_mapping,
    preset_names,
    to_mapping,
)

SMALL = """\
description: small
model: {depth: 2, hidden_size: 48, num_heads: 4, latent_height: 8, latent_width: 8}
"""


def refusal(name: str | Path, *overrides: str) -> str:
    """The error of loading a preset, which must be a usage error of one line."""
    with pytest.raises(UsageError) as error:
        load_preset(name, overrides)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL)
    return path


# The shipped presets


def test_shipped_presets_are_valid() -> None:
    packaged = ["bench-small", "ca2-vdm-base", "ca2-vdm-xl", DEFAULT_PRESET, "one-clip", "real-clips", "tiny"]
    assert preset_names() == packaged
    for loaded in list_presets():
        assert loaded.name in (loaded.path.stem, loaded.path.parent.name)
        assert loaded.config.description


def test_the_papers_preset_has_the_papers_settings() -> None:
    config = load_preset("ca2-vdm-xl").config
    model = config.model
    assert (model.depth, model.hidden_size, model.num_heads, model.tokens_per_frame) == (28, 1152, 16, 256)
    assert (model.context_frames, model.chunk_frames, model.table_length) == (25, 8, 33)
    assert (model.spatial_prefix, model.spatial_prefix_frames) == (SpatialPrefix.PREV_FRAMES, 3)
    assert model.temporal_positions is TemporalPositions.CYCLIC
    assert config.video is not None
    assert (config.video.height, config.video.width) == (256, 256)
    assert config.autoencoder.kind == "diffusers"
    base = load_preset("ca2-vdm-base").config
    assert replace(base, description=config.description, model=replace(base.model, depth=28)) == config


def test_benchmark_preset_works_on_latents_only() -> None:
    config = load_preset("bench-small").config
    assert (config.model.depth, config.model.hidden_size, config.model.num_heads) == (12, 384, 6)
    assert config.model.tokens_per_frame == 256
    assert config.video is None
    assert config.autoencoder.kind == "none"


# Overrides


def test_overrides_apply_in_order() -> None:
    config = load_preset(
        "bench-small",
        [
            "model.depth=4",
            "model.depth=3",
            "training.learning_rate=2e-5",
            "diffusion.prefix_noise=[50, 100]",
            "weights=",
        ],
    ).config
    assert config.model.depth == 3
    assert config.training.learning_rate == 2e-5
    assert config.diffusion.prefix_noise == (50, 100)
    assert config.weights is None


def test_override_opens_a_section(file: Path) -> None:
    overrides = ["video.height=64", "video.width=64", "autoencoder.kind=conv"]
    assert load_preset(file, overrides).config.video is not None
    assert refusal(file, *overrides[::2]).endswith("video.width: missing, and it has no default")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dept=4", "overrides: 'model.dept' is not a key of a preset; did you mean model.depth?"),
        ("depth=4", "overrides: 'depth' is not a key of a preset; did you mean model.depth?"),
        ("frob=4", "allowed: description, model, diffusion"),
        ("video.frob=4", "allowed in video: height, width, channels, fps"),
        ("model.depth.x=1", "'model.depth.x' is not a key of a preset; did you mean model.depth?"),
        ("model.depth", "overrides: model.depth must be a key and a value, such as model.depth=4"),
        ("model.depth=[", "overrides: model.depth=[: line 1: "),
        ("model.depth=0", "with model.depth=0: model.depth: 0 must be greater than or equal to 1"),
        ("model.depth=4.0", "model.depth: 4.0 must be a valid integer"),
        ("model.mask_channel=yes", 'model.mask_channel: "yes" must be a valid boolean'),
        ("model.causality=none", "model.causality: \"none\" must be 'causal' or 'partial'"),
        ("video.fps=.inf", 'video.fps: ".inf" must be a valid number'),
        ("video.fps=1e999", "must be text, a finite number"),
        ('model.depth=!!int ""', "overrides: model.depth=!!int \"\": line 1: '' is not of type int"),
        ("model.depth=!!int [1]", "line 1: a list or section is not of type int"),
        ("model.depth=!!int 0x10", "line 1: '0x10' is not of type int"),
        ("model.mask_channel=!!bool maybe", "line 1: 'maybe' is not of type bool"),
        ("video.fps=!!float .", "line 1: '.' is not of type float"),
        ("video=!!null 3", "line 1: '3' is not of type null"),
        ("video=!!map [1]", "line 1: expected a mapping node, but found sequence"),
        ("video=!!map 3", "line 1: expected a mapping node, but found scalar"),
        ("model.depth=!!timestamp x", "could not determine a constructor for the tag"),
        ("model.context_frames=100000000", "context_frames: 100000000 must be less than or equal to 65536"),
        ("model.mlp_ratio=1e-9", "model.mlp_ratio: 1e-09 must leave the MLP at least one of hidden_size 48 channels"),
        ("weights='a\0b'", "not valid YAML"),
        ('weights="a\\0b"', "weights: 'a\\x00b' does not exist"),
        (f"weights={'x' * 5000}", "does not exist; put the file there"),
        (f"model.depth={'9' * 4000}", "model.depth: 9"),
        (f"model.depth={'9' * 5000}", "not valid YAML"),
        (f"description={'[' * 500 + ']' * 500}", "line 1: nested more than 8 deep"),
        ('description="\\ud800"', "a value is not text that can be written as UTF-8"),
    ],
)
def test_refused_overrides(override: str, expected: str) -> None:
    assert expected in refusal("tiny", override)


# What a file may contain


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "depth: 2",
            "dept: 2",
            "model.dept: there is no such key (its value is 2); did you mean model.depth? (and 1 more)",
        ),
        ("depth: 2", "depth: two", 'model.depth: "two" must be a valid integer'),
        ("depth: 2", "depth: '2'", 'model.depth: "2" must be a valid integer'),
        ("depth: 2", "depth: true", "model.depth: true must be a valid integer"),
        ("depth: 2, ", "", "model.depth: missing, and it has no default"),
        ("depth: 2", "depth: 2, chunk_frames: 26", "model.chunk_frames: 26 must be at most context_frames 25"),
        ("latent_height: 8", "latent_height: 9", "model.latent_height: 9 must be a multiple of patch_size 2"),
        (
            "depth: 2",
            "depth: 2, temporal_positions: absolute, position_table: 32",
            "model.position_table: 32 must hold context_frames + chunk_frames = 33 frames with absolute positions",
        ),
        ("depth: 2", "depth: 2, depth: 3", "line 2: duplicate key 'depth'"),
        ("depth: 2", "[depth]: 2", "line 2: a key must be a word"),
        ("small", "small\nvideo: 3", "video: 3 must be a section with the keys height, width, channels, fps"),
        ("small", "&a small\nweights: *a", "line 2: aliases are not allowed"),
        ("small", "!!python/name:os.system", "line 1: could not determine a constructor for the tag"),
        ("small", "!!binary aGVsbG8=", "line 1: could not determine a constructor for the tag"),
        (SMALL, "", "contains null; a preset has keys"),
        (SMALL, "- 1", "contains [1]; a preset has keys"),
        (SMALL, "a: b: c", "line 1: mapping values are not allowed here"),
        (SMALL, "\0", "not valid YAML"),
        (SMALL, "[" * 60_000, "line 1: nested more than 8 deep"),
        (SMALL, "- " * 30_000, "line 1: nested more than 8 deep"),
        (SMALL, "? " * 30_000, "line 1: nested more than 8 deep"),
        (SMALL, "{a: " * 15_000, "line 1: nested more than 8 deep"),
        (SMALL, "# " + MAX_BYTES * "x", "larger than 64 KiB, so not a preset"),
    ],
)
def test_refused_files(file: Path, old: str, new: str, expected: str) -> None:
    file.write_text(SMALL.replace(old, new))
    line = refusal(file)
    assert line.startswith(f"{file}: ")
    assert expected in line


def test_words_and_numbers_are_what_they_look_like(file: Path) -> None:
    file.write_text(SMALL.replace("small", "1:30") + "training: {learning_rate: 2e-5, weight_decay: 1}\n")
    config = load_preset(file).config
    assert config.description == "1:30"
    assert (config.training.learning_rate, config.training.weight_decay) == (2e-5, 1.0)


def test_unknown_preset_lists_the_known_ones(tmp_path: Path) -> None:
    known = "bench-small, ca2-vdm-base, ca2-vdm-xl, moving-digits, one-clip, real-clips, tiny"
    assert refusal("something-else").endswith(f"is neither built in nor a file; built in: {known}")
    assert refusal("moving-digit").endswith("is neither built in nor a file; did you mean moving-digits?")
    assert refusal("tin").endswith("did you mean tiny?")
    assert "is neither built in nor a file" in refusal("x" * 5000)
    assert "is neither built in nor a file" in refusal("a\0b")
    assert f"is a folder without {PRESET_FILE}" in refusal(tmp_path)


# To a file and back


@pytest.mark.parametrize("name", preset_names())
def test_dump_can_be_loaded_again(name: str, tmp_path: Path) -> None:
    config = load_preset(name, ["weights=", "autoencoder_weights=", "description='2e-5'"]).config
    path = tmp_path / f"{name}.yaml"
    path.write_text(dump_preset(config))
    assert load_preset(path).config == config
    assert preset_from_mapping(to_mapping(config)) == config


def test_dump_names_and_explains_every_value() -> None:
    text = dump_preset(load_preset("tiny").config)
    assert text.splitlines()[1:3] == [
        "model:                              # The network.",
        "  depth: 2                          # Number of transformer blocks.",
    ]
    assert "One of: cyclic, rope, absolute." in text
    for section, value in to_mapping(load_preset("tiny").config).items():
        assert all(f"{key}: " in text for key in (value if isinstance(value, dict) else [section]))


def test_weights_are_beside_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config: Preset = replace(load_preset("tiny").config, weights="model.safetensors")
    (run / PRESET_FILE).write_text(dump_preset(config))
    line = refusal(run)
    assert f"weights: {run / 'model.safetensors'} does not exist" in line
    assert f"ca2vdm train --preset {run} --set weights=null" in line
    assert load_preset(run, ["weights=null"]).weights_path is None

    (run / "model.safetensors").touch()
    loaded = load_preset(run)
    assert (loaded.name, loaded.path) == ("run", run / PRESET_FILE)
    assert loaded.weights_path == run / "model.safetensors"
    assert loaded.autoencoder_weights_path is None
    monkeypatch.chdir(run)
    assert load_preset(".").name == "run"
    assert load_preset(PRESET_FILE).weights_path == Path("model.safetensors")


def test_importing_presets_leaves_torch_out() -> None:
    script = "import sys, ca2vdm_cli.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1]).returncode == 0


def test_lengths_of_training_clips() -> None:
    def config(*overrides: str) -> Preset:
        return load_preset("tiny", ["training.prefix_lengths=", *overrides]).config

    start, parallel = "diffusion.unconditional_start=false", "training.parallel_chunks=true"
    assert (config().clip_frames, config().chunks(5)) == (13, 1)
    assert config(parallel).prefixes == (0,) and config(start, parallel).prefixes == (1,)
    for overrides, frames, chunks in (((parallel,), 16, 4), ((parallel, start), 13, 3)):  # the last after a full window
        settings = config(*overrides)
        assert (settings.clip_frames, settings.chunks(settings.prefixes[0])) == (frames, chunks)
    absolute = "model.temporal_positions=absolute"  # 13 of them
    assert config(parallel, absolute).clip_frames == 12 and config(parallel, absolute, start).clip_frames == 13
    with pytest.raises(UsageError, match="must be at least 5, a whole chunk"):
        config(parallel, start, "training.clip_frames=4")
    with pytest.raises(UsageError, match="clip_frames: 20 must be at most the 13 absolute positions"):
        config(parallel, absolute, "training.clip_frames=20")


HOSTILE: tuple[object, ...] = (
    *(0, -1, 1, 2, 3, 7, 100, 65_536, 65_537, 10**8, 10**9, 10**18, 10**30, -(10**18)),
    *(0.0, -0.5, 1e-30, 1e300, 0.5, "", "x", "cyclic", "none", "\u202e\n\x9b", True, None, [], [1], [0, 10**9]),
    *({}, {"depth": 1}, [[1]], ["x"], {"": {}}),
)
"""Values for every setting: of all types, of all sizes."""


def test_no_value_hangs_takes_memory_or_ends_in_a_traceback() -> None:
    """Every setting of two presets, with values of all kinds; reading a preset takes a few milliseconds."""
    keys = [
        f"{section}.{key}" if isinstance(values, dict) else section
        for section, values in to_mapping(load_preset("moving-digits").config).items()
        for key in (values if isinstance(values, dict) else [""])
    ]
    keys += [f"text.{key}" for key in ("path", "encoder_folder")]
    began, memory, refusals = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    draw = random.Random(0)
    for key in keys:
        for i, value in enumerate(draw.sample(HOSTILE, 4)):
            preset, other = (("moving-digits", []), ("tiny", ["training.parallel_chunks=true"]))[i % 2]
            try:
                config = load_preset(preset, [*other, f"{key}={json.dumps(value)}"]).config
            except UsageError as error:
                refusals.append(str(error))
            else:
                assert len(config.trained_prefixes) <= config.model.context_frames + 1
    assert len(refusals) > 200 and all(line.isprintable() for line in refusals)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000, "kilobytes"
    assert time.process_time() - began < 60


def test_the_shortest_prefix_needs_no_list_of_all() -> None:
    for overrides in ([], ["diffusion.unconditional_start=false"], ["training.parallel_chunks=true"]):
        for lengths in ("null", "[0, 3]", "[4, 0, 9]"):
            config = load_preset("tiny", [*overrides, f"training.prefix_lengths={lengths}"]).config
            assert config.first_prefix == min(config.prefixes)
