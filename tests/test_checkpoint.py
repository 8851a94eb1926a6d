"""Weights on disk: a checksum finds damage, and what does not fit a model is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from ca2vdm_cli.checkpoint import CHECKSUM, MAX_HEADER, load_tensors, load_weights, save_tensors
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
    message = refusal(lambda: load_weights(model, {"a": torch.zeros(1)}, "mine.pt", partial=True))
    assert "are missing" in message and "another architecture (the first tensor is a)" in message


PRESET_ADVICE = "choose the preset these weights were trained with"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: {k: v for k, v in w.items() if not k.startswith("blocks.1")}, PRESET_ADVICE),
        (lambda w: {k: v for k, v in w.items() if "attn_cf" not in k}, PRESET_ADVICE),
        (lambda w: w | {"blocks.2.mlp.fc1.bias": torch.zeros(128)}, PRESET_ADVICE),
        (lambda w: {k: v for k, v in w.items() if k != "blocks.1.mlp.fc1.bias"}, "the checkpoint is incomplete"),
        (lambda w: w | {"optimizer_step": torch.zeros(1)}, "leave them out of the file (ca2vdm import does)"),
    ],
    ids=["a block", "a layer of all blocks", "one block more", "half a layer", "something else"],
)
def test_another_preset_is_advised_only_where_it_helps(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    expected: str,
    weights: dict[str, Tensor],
    make_model: MakeModel,
) -> None:
    line = refusal(lambda: load_weights(make_model(), change(weights), "mine"))
    assert line.endswith(expected) or f"; {expected}" in line
    assert expected == PRESET_ADVICE or PRESET_ADVICE not in line


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.full((128,), float("nan")), "has 128 values of 128 that are NaN or infinite"),
        (torch.tensor([float("-inf")] + [0.0] * 127).half(), "has 1 values of 128 that are NaN or infinite"),
        (torch.zeros(128, dtype=torch.int32), "has dtype int32, which is not a weight's"),
        (torch.zeros(128, dtype=torch.bool), "has dtype bool, which is not a weight's"),
        (torch.zeros(128).to_sparse(), "is not an ordinary tensor"),
        (torch.zeros(128, device="meta"), "is not an ordinary tensor"),
    ],
    ids=["nan", "infinity", "int", "bool", "sparse", "meta"],
)
def test_values_that_are_not_weights_are_refused(
    value: Tensor, expected: str, weights: dict[str, Tensor], make_model: MakeModel
) -> None:
    weights["blocks.1.mlp.fc1.bias"] = value
    line = refusal(lambda: load_weights(make_model(), weights, "mine"))
    assert line.startswith(f"mine: blocks.1.mlp.fc1.bias {expected}")


def test_entries_that_a_rope_model_does_not_read_are_ignored(make_model: MakeModel) -> None:
    model = make_model(temporal_positions="rope")
    weights = model.state_dict() | {"pos_embed_temporal": torch.zeros(1, 8, 32), "bov_token": torch.zeros(1)}
    report = load_weights(model, weights, "published")
    assert (report.left_over, set(report.unread)) == ((), {"pos_embed_temporal", "bov_token"})


# ------------------------------------------------------------------------------------------------------ damage
@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with tensors of several kinds."""
    path = tmp_path / "weights.safetensors"
    tensors = {
        "a.weight": torch.randn(3, 5),
        "a.bias": torch.randn(5).half(),
        "b": torch.tensor(3),
        "c": torch.zeros(0, 4),
        "d": torch.randn(7).bfloat16(),
    }
    save_tensors(path, tensors, {"step": "7", CHECKSUM: "of an earlier file"})
    return path


def test_a_flipped_bit_is_noticed_or_harmless(file: Path) -> None:
    intact, tensors = file.read_bytes(), load_tensors(file)[0]
    header = 8 + int.from_bytes(intact[:8], "little")
    harmless = 0
    for bit in range(0, 8 * len(intact), 5):
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with suppress(UserError):
            assert_same(load_tensors(file)[0], tensors)
            harmless += 1
            assert bit < 8 * header, "damage to tensors is always noticed"
    assert harmless < 25, "only the name of the checksum may change, and the spaces that fill up the header"


def test_damaged_and_truncated_files_are_refused_in_one_line(file: Path) -> None:
    intact, draw = file.read_bytes(), torch.Generator().manual_seed(0)
    for size in range(0, len(intact), 3):
        file.write_bytes(intact[:size])
        assert refusal(lambda: load_tensors(file)).startswith(f"{file}: not a readable safetensors file: it ")
    assert "it is cut off after" in refusal(lambda: load_tensors(file))
    for _ in range(200):
        damaged = bytearray(intact)
        for place in torch.randint(len(intact), (3,), generator=draw):
            damaged[place] = int(torch.randint(256, (), generator=draw))
        file.write_bytes(damaged)
        if damaged != intact:
            refusal(lambda: load_tensors(file))


def test_files_of_others_need_no_checksum_and_ours_have_one(
    weights: dict[str, Tensor], file: Path, tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "other.safetensors", {"format": "pt"})
    assert_same(load_tensors(tmp_path / "other.safetensors")[0], weights)
    with safe_open(file, "pt") as ours:
        assert len(ours.metadata()[CHECKSUM]) == 8
    assert load_tensors(file)[1] == {"step": "7"}


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    header = json.dumps({"__metadata__": {"x": "y" * MAX_HEADER}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"its header has {len(header)} bytes, and at most {MAX_HEADER} are read" in refusal(
        lambda: load_tensors(path)
    )
    path.write_bytes((2**60).to_bytes(8, "little") + b'{"a":' + b"x" * 100)
    assert "does not begin with a whole header" in refusal(lambda: load_tensors(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 17\n", "it is a git-lfs pointer, not the"),
        (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page, not the file itself"),
        (b"Entry not found", "it is text ('Entry not found'), not weights"),
        (b"PK\x03\x04" + bytes(100), "it is a zip archive, such as PyTorch writes; convert it with ca2vdm import"),
        (b"\x80\x02}q\x00(" + bytes(100), "it is a pickle, such as PyTorch writes"),
        (b"GGUF" + bytes(100), "it is a GGUF file"),
        (b"\x1f\x8b\x08" + bytes(100), "it is compressed with gzip; unpack it"),
    ],
    ids=["empty", "lfs", "page", "text", "zip", "pickle", "gguf", "gzip"],
)
def test_other_files_named_safetensors_are_told_what_they_are(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    line = refusal(lambda: load_tensors(path))
    assert line.startswith(f"{path}: not a readable safetensors file: {expected}")


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    """Its length may look like the beginning of another kind of file."""
    path = tmp_path / "weights.safetensors"
    for length in range(120, 384, 8):
        path.write_bytes(save({"x": torch.ones(2)}, {"fill": "x" * length}))
        assert_same(load_tensors(path)[0], {"x": torch.ones(2)})
