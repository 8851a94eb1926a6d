"""Widening: a model of twice the width computes the same, and can be trained further."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_kit import RUN, Refused, ca2vdm

from ca2vdm_cli.checkpoint import load_tensors, load_weights
from ca2vdm_cli.config import ModelConfig
from ca2vdm_cli.loading import randomize
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.training.run_folder import WEIGHTS_FILE
from ca2vdm_cli.training.widen import make_model, widen, widened, wider

SMALL = ModelConfig(
    depth=2, hidden_size=16, num_heads=2, latent_height=4, latent_width=4, context_frames=3, chunk_frames=2
)


@pytest.mark.parametrize(
    "changes", [{}, {"temporal_positions": "rope"}, {"text_channels": 8, "text_tokens": 3}, {"mask_channel": True}]
)
def test_the_wide_model_computes_the_same(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    narrow = make_model(replace(SMALL, **changes))
    randomize(narrow)
    wide = make_model(wider(narrow.config))
    load_weights(wide, widen(narrow.state_dict(), wide.config, torch.Generator().manual_seed(0)), "wide")
    latents, timestep = torch.randn(2, narrow.config.in_channels, 5, 4, 4), torch.tensor([300, 900])
    outputs = []
    for model in (narrow.eval(), wide.eval()):
        caption = model.unconditional_caption(2)
        text = model.text_keys_values(*caption) if caption else None
        plan = model.parallel_plan(3, 1, TemporalWindow(model.config))
        outputs.append(model(latents, timestep, plan, text=text))
    assert outputs[0].abs().max() > 0.1
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    fc1: torch.nn.Linear = wide.blocks[0].mlp.fc1  # type: ignore[union-attr,assignment]
    first, second = fc1.weight.chunk(2, dim=1)
    assert (first / (first + second)).std() > 0.1  # otherwise the copies would train alike


def test_the_command_trains_the_wider_model(weights: Path, tmp_path: Path) -> None:
    run, slow = tmp_path / "wide", ["--set", "training.learning_rate=1e-9", "--seed", 3, "--steps", 1]
    assert ca2vdm("train", "--checkpoint", weights, "--widen", "--out", run, *slow, *RUN, "-q") == 0
    narrow, config = load_preset(weights).config.model, load_preset(run).config.model
    assert (config.hidden_size, config.num_heads) == (2 * narrow.hidden_size, 2 * narrow.num_heads)
    expected = widened(load_tensors(weights / WEIGHTS_FILE)[0], narrow, 3, "weights")
    trained, _ = load_tensors(run / WEIGHTS_FILE)
    assert all(torch.allclose(trained[key], expected[key], atol=1e-6) for key in expected)
    assert ca2vdm("train", "--resume", "--out", run, "--steps", 2, *RUN, "-q") == 0
    assert load_preset(run).config.model == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny"], "preset tiny: it has no weights to widen; give some with --checkpoint"),
        (["--checkpoint", "none.safetensors"], "none.safetensors: no such file"),
        (["--checkpoint", __file__], "not a readable safetensors file"),
        (["--preset", "tiny", "--distill", "."], "widen: this starts a new run; leave out --resume and --distill"),
    ],
)
def test_models_that_cannot_be_widened(arguments: list[str], message: str, refused: Refused, tmp_path: Path) -> None:
    code = 1 if "safetensors file" in message else 2
    settings = ["--set", "training.autoencoder_steps=1", "--set", "model.depth=2"]
    assert message in refused(code, "train", *arguments, "--widen", "--out", tmp_path / "run", *RUN, *settings)
