"""Recorded runs that are damaged end in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_kit import RUN, Refused, Report, ca2vdm
from torch import Tensor

from ca2vdm_cli.bench.reference import RecordedRun
from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "text_guided.safetensors"
pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def recorded() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a recorded run."""
    tensors, metadata = load_tensors(GOLDEN)
    return tensors, json.loads(metadata["config"])


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def write(tensors: dict[str, Tensor], config: object) -> Path:
    path = Path("damaged.safetensors")
    save_tensors(path, tensors, {"config": config if isinstance(config, str) else json.dumps(config)})
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"patch_size": []}, "its config is not supported (IndexError"),
        ({"patch_size": 2}, "its config is not supported (TypeError"),
        ({"train_timesteps": float("inf")}, "its config is not supported (OverflowError"),
        ({"train_timesteps": 10**12}, "config: train_timesteps Input should be less than or equal to"),
        ({"depth": 10**9}, "config: depth Input should be less than or equal to"),
        ({"depth": 3}, "tensors are missing, the first is blocks.2."),
        ({"hidden_size": 65536, "num_heads": 4}, "the model needs (1, 16, 65536); its config does not fit"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan must be from 0 to"),
        ({"latent_height": 6}, "its config does not fit its weights"),
        ({"max_context_frames": 65_000, "temporal_positions": None}, "its config does not fit its weights"),
    ],
)
def test_damaged_settings(
    change: dict[str, Any], expected: str, recorded: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    tensors, config = recorded
    path = write(tensors, config | change)
    line = refusal(lambda: RecordedRun(path))
    assert line.startswith(f"{path}: ") and expected in line


def test_settings_that_are_no_json(recorded: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    for text in ("[" * 100_000, "{", "3", "[[1]]", '{"depth": 1e999}', '"x"'):
        path = write(recorded[0], text)
        assert refusal(partial(RecordedRun, path)).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("first_frames", lambda x: x[0, 0, 0], "has shape (8, 8); it must be (2, 4, F, 8, 8)"),
        (
            "step_noise",
            lambda x: x[:, :, :1],
            "input.step_noise has shape (5, 12, 1, 4, 4, 8, 8); it must be (5, 12, ",
        ),
        ("initial_noise", lambda x: x[:, :, :, :0], "input.initial_noise has shape"),
        ("timesteps", lambda x: x.float(), "input.timesteps has the wrong dtype, float32"),
        ("window_noisy", lambda x: x.long(), "input.window_noisy has the wrong dtype, int64"),
        ("window_clean", lambda x: x / 0, "that are NaN or infinite"),
        ("text_mask", lambda x: x[None], "input.text_mask has shape"),
    ],
)
def test_damaged_inputs(
    name: str, change: Callable[[Tensor], Tensor], expected: str, recorded: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    tensors, config = recorded
    tensors[f"input.{name}"] = change(tensors[f"input.{name}"])
    path = write(tensors, config)
    assert expected in refusal(lambda: RecordedRun(path))


def test_settings_of_any_kind(recorded: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, config = recorded
    draw = random.Random(0)
    for key in config:
        values: list[object] = [0, -1, 3, 10**30, 0.5, "x", "", None, [], [1, 0, 0], {}, True, float("nan")]
        for value in draw.sample(values, 2):
            path = write(tensors, config | {key: value})
            with suppress(UserError):
                RecordedRun(path)


def test_weights_that_the_model_does_not_read_are_ignored_and_said(
    recorded: tuple[dict[str, Tensor], dict[str, Any]], refused: Refused, report: Report, capsys: Any
) -> None:
    tensors, config = recorded
    tensors = {key: value for key, value in tensors.items() if "video" not in key}
    tensors["weights.bov_token"] = torch.zeros(1, 4)
    path = write(tensors, config)
    assert ca2vdm("verify", "--recorded", path, *RUN) == 0
    assert "ignored, because this model does not read them: bov_token" in capsys.readouterr().err
    assert report("verify", "--recorded", path, *RUN)["ok"] is True
    tensors["weights.other"] = torch.zeros(1)
    assert "the first is other; leave them out" in refused(1, "verify", "--recorded", write(tensors, config), *RUN)
