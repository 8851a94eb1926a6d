"""Checkpoints of other training scripts are read wherever the weights are in them, and no code in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ca2vdm_cli.errors import UserError
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.published import read_published

MakeModel = Callable[..., CausalVideoTransformer]


@pytest.fixture
def weights(make_model: MakeModel) -> dict[str, Tensor]:
    """A state dict that differs from that of ``make_model``."""
    return {key: value + 1 for key, value in make_model().state_dict().items()}


def assert_read(path: Path, weights: dict[str, Tensor]) -> None:
    read = read_published(path, weights.keys()).tensors
    assert weights.keys() <= read.keys()
    assert all(torch.equal(read[key], value) for key, value in weights.items())


def refusal(call: Callable[[], object]) -> str:
    """The one-line error that a call raises."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def plus(weights: dict[str, Tensor], number: float) -> dict[str, Tensor]:
    return {key: value + number for key, value in weights.items()}


WRAPPERS = ["ema", "model", "state_dict", "ema_model", "model_ema", "module", "generator", "generator_ema", "net"]
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "generator_ema.", "diffusion_model.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_are_found_behind_any_prefix_and_in_any_wrapper(
    prefix: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path, state = tmp_path / "published.pt", {f"{prefix}{key}": value for key, value in weights.items()}
    torch.save(state, path)
    assert_read(path, weights)
    for wrapper in WRAPPERS:
        torch.save({"epoch": 3, wrapper: state, "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, path)
        assert_read(path, weights)
    torch.save({"state_dict": {"model": state}}, path)
    assert_read(path, weights)


@pytest.mark.parametrize("name", ["ema", "ema_model", "model_ema", "generator_ema", "state_dict_ema", "averaged"])
def test_averaged_weights_are_preferred(name: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path, raw = tmp_path / "published.pt", plus(weights, 1)
    torch.save({"model": raw, "generator": plus(weights, 2), name: weights}, path)
    read = read_published(path, weights.keys())
    assert (read.place, set(read.others)) == (f"{name}.", {"model.", "generator."})
    assert_read(path, weights)
    torch.save({f"{name}.{k}": v for k, v in weights.items()} | {f"model.{k}": v for k, v in raw.items()}, path)
    assert_read(path, weights)
    torch.save({"model": weights, name: {"decay": torch.ones(1)}}, path)  # no weights under it
    assert_read(path, weights)


def test_wrapped_blocks_are_read(weights: dict[str, Tensor], tmp_path: Path) -> None:
    state = {key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in weights.items()}
    torch.save({"model": state}, tmp_path / "compiled.pt")
    assert_read(tmp_path / "compiled.pt", weights)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_a_file_is_read_by_what_it_is(suffix: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    save_file(weights, path)
    assert_read(path, weights)
    for zipped in (True, False):
        torch.save({"ema": weights}, path, _use_new_zipfile_serialization=zipped)
        assert_read(path, weights)


# ------------------------------------------------------------------------------------------------------ shards
@pytest.fixture(params=["safetensors", "bin"])
def sharded(request: pytest.FixtureRequest, weights: dict[str, Tensor], tmp_path: Path) -> Path:
    """The index of three shards."""
    where: dict[str, str] = {}
    for shard in range(3):
        name = f"model-{shard + 1:05d}-of-00003.{request.param}"
        part = {f"model.{key}": value for i, (key, value) in enumerate(weights.items()) if i % 3 == shard}
        (save_file if request.param == "safetensors" else torch.save)(part, tmp_path / name)
        where |= dict.fromkeys(part, name)
    index = tmp_path / f"model.{request.param}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


def test_shards_are_read_from_an_index_or_a_folder(sharded: Path, weights: dict[str, Tensor]) -> None:
    assert_read(sharded, weights)
    assert_read(sharded.parent, weights)
    one = next(sharded.parent.glob("model-00002-*"))
    assert "this is shard 2 of 3; name the folder" in refusal(lambda: read_published(one, weights.keys()))
    one.unlink()
    assert f"the shard {one.name} is not beside it" in refusal(lambda: read_published(sharded, weights.keys()))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[" * 100_000, "not an index of shards"),
        ("{}", "not an index of shards"),
        ('{"weight_map": [1]}', "not an index of shards"),
        ('{"weight_map": {"a": "../a.pt"}}', "the shard ../a.pt is not beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "the shard /etc/passwd is not beside it"),
        ('{"weight_map": {}}', "no state dict of tensors"),
    ],
)
def test_damaged_indexes_are_refused(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    assert expected in refusal(lambda: read_published(path, ["a"]))


def test_an_index_that_names_absent_tensors_is_refused(sharded: Path, weights: dict[str, Tensor]) -> None:
    index = json.loads(sharded.read_text())
    index["weight_map"]["model.absent"] = next(iter(index["weight_map"].values()))
    sharded.write_text(json.dumps(index))
    assert "are in none of the shards, the first is model.absent" in refusal(
        lambda: read_published(sharded, weights.keys())
    )


def test_a_folder_needs_one_checkpoint(weights: dict[str, Tensor], tmp_path: Path) -> None:
    assert "a folder without a checkpoint" in refusal(lambda: read_published(tmp_path, weights.keys()))
    torch.save(weights, tmp_path / "a.pt")
    assert_read(tmp_path, weights)
    torch.save(weights, tmp_path / "b.pt")
    assert "has several checkpoints (a.pt, b.pt); name one" in refusal(lambda: read_published(tmp_path, ["a"]))


# ---------------------------------------------------------------------------------------------------- errors
class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize("kind", ["zip", "old", "bare"])
def test_a_file_that_would_run_code_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path, mark = tmp_path / f"evil{suffix}", tmp_path / "ran"
    content = {"model": {"weight": torch.zeros(2)}, "extra": Payload(mark)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    line = refusal(lambda: read_published(path, ["weight"]))
    assert line.startswith(f"{path}: not a plain checkpoint of tensors")
    assert not mark.exists()
    if kind == "bare":  # unpickling it does run code
        pickle.loads(path.read_bytes())
        assert mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_and_damaged_files_are_refused_in_one_line(
    zipped: bool, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "damaged.pt"
    small = {key: weights[key] for key in ("final_layer.linear.weight", "blocks.0.attn.qkv.bias")}
    torch.save({"ema": small}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    cuts = {0, 1, 2, 7, 8, 20, 50, *range(100, len(whole), len(whole) // 40), len(whole) - 1}
    for size in cuts:
        path.write_bytes(whole[:size])
        assert refusal(lambda: read_published(path, weights.keys())).startswith(f"{path}: not a ")
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):  # damage in the header is either noticed or harmless
        damaged = bytearray(whole)
        for place in torch.randint(min(600, len(whole)), (3,), generator=draw):
            damaged[place] = int(torch.randint(256, (), generator=draw))
        path.write_bytes(damaged)
        with suppress(UserError):
            read_published(path, weights.keys())


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, {"model": {}}, {}],
    ids=["tensor", "list", "no", "empty", "{}"],
)
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert "no state dict of tensors" in refusal(lambda: read_published(path, ["weight"]))


def test_a_file_that_contains_itself_is_read(tmp_path: Path) -> None:
    content: dict[str, Any] = {"weight": torch.zeros(3)}
    content |= {str(i): content for i in range(20)}
    torch.save(content, tmp_path / "loop.pt")
    assert read_published(tmp_path / "loop.pt", ["weight"]).place == ""


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    assert refusal(lambda: read_published(tmp_path / name, [])) == f"{tmp_path / name}: no such file"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("start", "expected"), [(b"version https://git-lfs.x/v1", "git-lfs"), (b"<html>", "web page")])
def test_a_pointer_or_a_web_page_is_told(suffix: str, start: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / f"download{suffix}"
    path.write_bytes(start + b"\n")
    line = refusal(lambda: read_published(path, ["weight"]))
    assert expected in line and "preset" not in line
