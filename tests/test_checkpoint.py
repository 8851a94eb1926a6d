"""Weights on disk: published formats are read, mismatches are named, and no code in a file is ever run."""

from __future__ import annotations

import io
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

from ca2vdm_cli.checkpoint import load_tensors, load_weights, read_published, save_tensors
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.model.transformer import CausalVideoTransformer

MakeModel = Callable[..., CausalVideoTransformer]


@pytest.fixture
def weights(make_model: MakeModel) -> dict[str, Tensor]:
    """A state dict that differs from that of ``make_model``."""
    return {key: value + 1 for key, value in make_model().state_dict().items()}


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def refusal(call: Callable[[], object]) -> str:
    """The one-line error that a call raises."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"ema": weights, "model": {"wrong": torch.zeros(1)}, "opt": {}, "epoch": 3},
        lambda weights: {"model": weights, "args": {"lr": 1e-4}},
        lambda weights: {"state_dict": weights},
        lambda weights: {"state_dict": {"model": weights}},
        lambda weights: {"model": {f"module.{key}": value for key, value in weights.items()}},
    ],
    ids=["bare", "ema", "model", "state_dict", "nested", "module"],
)
def test_published_checkpoints_are_read_wrapped_or_not(
    wrap: Callable[[dict[str, Tensor]], dict[str, Any]],
    suffix: str,
    weights: dict[str, Tensor],
    make_model: MakeModel,
    tmp_path: Path,
) -> None:
    path, model = tmp_path / f"published{suffix}", make_model()
    torch.save(wrap(weights), path)
    report = load_weights(model, read_published(path), str(path))
    assert (set(report.matched), report.missing, report.left_over) == (set(weights), (), ())
    assert_same(model.state_dict(), weights)


def test_safetensors_and_the_old_torch_format_are_read(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "published.safetensors")
    assert_same(read_published(tmp_path / "published.safetensors"), weights)
    torch.save({"ema": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(read_published(tmp_path / "old.pt"), weights)


def test_half_precision_weights_are_converted(weights: dict[str, Tensor], make_model: MakeModel) -> None:
    model = make_model()
    load_weights(model, {key: value.half() for key, value in weights.items()}, "half")
    assert model.dtype == torch.float32
    assert_same(model.state_dict(), {key: value.half().float() for key, value in weights.items()})


def test_saved_tensors_and_metadata_are_loaded(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "model.safetensors"
    save_tensors(path, weights, {"step": "7"})
    save_tensors(path, weights, {"step": "8"})  # an existing file is replaced
    tensors, metadata = load_tensors(path)
    assert_same(tensors, weights)
    assert metadata == {"step": "8"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------------------------- errors
def test_a_mismatch_names_the_tensor_and_both_shapes(weights: dict[str, Tensor], make_model: MakeModel) -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights["blocks.1.mlp.fc1.weight"] = torch.zeros(64, 32)
    message = refusal(lambda: load_weights(model, weights, "mine.pt"))
    assert message.startswith("mine.pt: blocks.1.mlp.fc1.weight has shape (64, 32), the model needs (128, 32)")
    assert_same(model.state_dict(), before)


def test_missing_and_left_over_keys_are_reported(weights: dict[str, Tensor], make_model: MakeModel) -> None:
    model, missing = make_model(), ("blocks.0.attn_cf.proj.weight", "final_layer.linear.bias")
    before = model.state_dict()["final_layer.linear.bias"].clone()
    for key in missing:
        del weights[key]
    weights |= {"other.weight": torch.zeros(1), "bov_token": torch.zeros(1, 4)}
    message = refusal(lambda: load_weights(model, weights, "mine.pt"))
    assert "2 of " in message and "tensors are missing, the first is blocks.0.attn_cf.proj.weight" in message
    message = refusal(lambda: load_weights(model, weights, "mine.pt", partial=True))
    assert "1 tensors are not in the model, the first is other.weight" in message
    report = load_weights(model, weights, "mine.pt", partial=True, extra=True)
    assert report.missing == missing and set(report.matched) == set(model.state_dict()) - set(missing)
    assert report.left_over == ("other.weight",), "bov_token is in published checkpoints but never read"
    assert torch.equal(model.state_dict()["final_layer.linear.bias"], before)
    assert "are missing" in refusal(lambda: load_weights(model, {"a": torch.zeros(1)}, "mine.pt", partial=True))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["zip", "old", "bare"])
def test_a_file_that_would_run_code_is_refused(kind: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"model": {"weight": torch.zeros(2)}, "extra": Payload(mark)}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    assert refusal(lambda: read_published(path)).startswith(f"{path}: not a plain checkpoint of tensors")
    assert not mark.exists()
    if kind == "bare":  # unpickling it does run code
        pickle.loads(path.read_bytes())
        assert mark.exists()


def saved(weights: dict[str, Tensor], kind: str) -> bytes:
    if kind == ".safetensors":
        from safetensors.torch import save

        return save(weights)
    file = io.BytesIO()
    torch.save({"ema": weights}, file, _use_new_zipfile_serialization=kind == ".pt")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", [".pt", ".pth", ".safetensors"])  # here .pth is the old format
def test_truncated_and_damaged_files_are_refused_in_one_line(
    kind: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"damaged{kind}"
    small = {key: weights[key] for key in ("final_layer.linear.weight", "blocks.0.attn.qkv.bias")}
    whole = saved(small, kind)
    cuts = {0, 1, 2, 7, 8, 20, 50, *range(100, len(whole), len(whole) // 40), len(whole) - 1}
    for size in cuts:
        path.write_bytes(whole[:size])
        assert refusal(lambda: read_published(path)).startswith(f"{path}: not a ")
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):  # damage in the header is either noticed or harmless
        damaged = bytearray(whole)
        for place in torch.randint(min(600, len(whole)), (3,), generator=draw):
            damaged[place] = int(torch.randint(256, (), generator=draw))
        path.write_bytes(damaged)
        with suppress(UserError):
            read_published(path)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, {"model": {}}, {}],
    ids=["tensor", "list", "no", "empty", "{}"],
)
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    assert "no state dict of tensors, neither at the top level nor under ema, model, state_dict" in refusal(
        lambda: read_published(path)
    )


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    assert refusal(lambda: read_published(tmp_path / name)) == f"{tmp_path / name}: no such file"
