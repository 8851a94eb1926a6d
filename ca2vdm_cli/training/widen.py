"""Make weights of a model twice as wide that computes the same, to train on from there (Net2Net, Chen et al. 2016).

python docs/widen_weights.py --preset runs/narrow -o wide.safetensors        # says the next line's settings
ca2vdm train --preset runs/narrow --set model.hidden_size=256 --set model.num_heads=8 --checkpoint wide.safetensors

Every channel of the narrow model is there twice, every head too, and what read a channel reads both copies, each times
a share of the old weight. The shares add up to 1 and are drawn from the seed: with equal ones the copies would have
equal gradients and stay copies. A LayerNorm has the mean and the variance that it had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ca2vdm_cli.checkpoint import load_tensors, load_weights, save_tensors
from ca2vdm_cli.config import ModelConfig
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.loading import build_model, find_weights
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import choose_backend
from ca2vdm_cli.terminal import note, print_error

LEAST_SHARE = 0.25
"""Of a weight, for either copy; the other has the rest."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, widen, write; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", help="name, file or folder of the narrow model; by default moving-digits")
    parser.add_argument("--checkpoint", type=Path, help="weights to widen instead of the preset's, or a run's folder")
    parser.add_argument("--seed", type=int, default=0, help="of the shares")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the wide weights, a .safetensors file")
    args = parser.parse_args(arguments)
    try:
        preset, path = find_weights(args.preset, args.checkpoint)
        if path is None:
            raise UsageError(f"preset {preset.name} has no weights; give --checkpoint")
        narrow = make_model(preset.config.model)
        load_weights(narrow, load_tensors(path)[0], str(path))
        config = wider(preset.config.model)
        wide = widen(narrow.state_dict(), config, torch.Generator().manual_seed(args.seed))
        save_tensors(args.output, wide)
    except UserError as error:
        print_error(error)
        return error.exit_code
    note(f"{args.output}: for model.hidden_size={config.hidden_size} and model.num_heads={config.num_heads}")
    return 0


def make_model(config: ModelConfig) -> CausalVideoTransformer:
    """A model of these sizes, on the CPU in float32."""
    return build_model(config, choose_backend("eager", torch.device("cpu"), torch.float32))


def wider(config: ModelConfig) -> ModelConfig:
    """Twice the width, of heads as large as before."""
    return replace(config, hidden_size=2 * config.hidden_size, num_heads=2 * config.num_heads)


def widen(narrow: Mapping[str, Tensor], config: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """The narrow model's weights, and buffers, for the wide model of ``config``."""
    half = config.hidden_size // 2
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in make_model(config).state_dict().items()}
    wide = {}
    for name, tensor in narrow.items():
        for dim, size in enumerate(shapes[name]):
            if size == tensor.shape[dim]:
                continue
            # a dimension is one or several widths, and perhaps a channel more (of the mask) that stays as it is
            widths, rest = tensor.split([tensor.shape[dim] // half * half, tensor.shape[dim] % half], dim)
            copies = [widths.unflatten(dim, (-1, half))] * 2
            if dim == 1 and name.endswith(".weight"):  # what a layer reads
                share = LEAST_SHARE + (1 - 2 * LEAST_SHARE) * torch.rand(copies[0].shape, generator=generator)
                copies = [copies[0] * share, copies[1] * (1 - share)]
            tensor = torch.cat([torch.cat(copies, dim + 1).flatten(dim, dim + 1), rest], dim)
        wide[name] = tensor
    return wide


if __name__ == "__main__":
    sys.exit(main())
