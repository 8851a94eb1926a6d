"""The script that makes weights of a model twice as wide."""

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_kit import ROOT

from ca2vdm_cli.checkpoint import load_tensors, load_weights
from ca2vdm_cli.config import ModelConfig
from ca2vdm_cli.loading import randomize
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.presets import load_preset

SCRIPT = ROOT / "ca2vdm_cli" / "training" / "widen.py"
SMALL = ModelConfig(
    depth=2, hidden_size=16, num_heads=2, latent_height=4, latent_width=4, context_frames=3, chunk_frames=2
)


@pytest.fixture(scope="module")
def script() -> dict[str, Callable[..., Any]]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    "changes", [{}, {"temporal_positions": "rope"}, {"text_channels": 8, "text_tokens": 3}, {"mask_channel": True}]
)
def test_the_wide_model_computes_the_same(script: dict[str, Callable[..., Any]], changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    narrow = script["make_model"](replace(SMALL, **changes))
    randomize(narrow)
    wide = script["make_model"](script["wider"](narrow.config))
    load_weights(wide, script["widen"](narrow.state_dict(), wide.config, torch.Generator().manual_seed(0)), "wide")
    latents, timestep = torch.randn(2, narrow.config.in_channels, 5, 4, 4), torch.tensor([300, 900])
    outputs = []
    for model in (narrow.eval(), wide.eval()):
        caption = model.unconditional_caption(2)
        text = model.text_keys_values(*caption) if caption else None
        plan = model.parallel_plan(3, 1, TemporalWindow(model.config))
        outputs.append(model(latents, timestep, plan, text=text))
    assert outputs[0].abs().max() > 0.1
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    first, second = wide.blocks[0].mlp.fc1.weight.chunk(2, dim=1)
    assert (first / (first + second)).std() > 0.1  # or the copies would train alike


def test_the_command_writes_weights_for_the_settings_that_it_names(
    script: dict[str, Callable[..., Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "wide.safetensors"
    assert script["main"](["--preset", "moving-digits", "-o", str(output)]) == 0
    assert "model.hidden_size=512 and model.num_heads=16" in capsys.readouterr().err
    wide = load_preset("moving-digits", ["model.hidden_size=512", "model.num_heads=16"]).config.model
    load_weights(script["make_model"](wide), load_tensors(output)[0], str(output))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "bench-small"], "preset bench-small has no weights; give --checkpoint"),
        (["--checkpoint", "none.safetensors"], "checkpoint none.safetensors: no such file"),
        (["--checkpoint", str(SCRIPT)], "not a readable safetensors file"),
    ],
)
def test_what_can_not_be_widened_is_said(
    script: dict[str, Callable[..., Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    output = tmp_path / "wide.safetensors"
    assert script["main"]([*arguments, "-o", str(output)]) != 0
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not output.exists()
