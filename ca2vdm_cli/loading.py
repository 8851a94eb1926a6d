"""From a preset and a checkpoint to a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import load_tensors, load_weights
from .config import ModelConfig, Preset
from .errors import UsageError
from .memory import parameter_count
from .model.attention import Backend
from .model.transformer import CausalVideoTransformer
from .plugins import backends
from .presets import DEFAULT_PRESET, PRESET_FILE, LoadedPreset, Overrides, load_preset

LARGE = 10**7
"""Parameters of a model that takes longer to build than the meta device to load."""


def find_weights(
    preset: str | Path | Preset | LoadedPreset | None, checkpoint: str | Path | None, overrides: Overrides = ()
) -> tuple[LoadedPreset, Path | None]:
    """Resolve a preset and a checkpoint to the preset and weights file to use.

    Args:
        preset: name, file or folder; by default the ``preset.yaml`` beside the checkpoint, else the default preset.
        checkpoint: weights to use instead of the preset's, or the folder of a training run.
        overrides: settings such as ``model.context_frames=9``.

    Raises:
        UsageError: something does not exist, or a folder is given together with a preset.
    """
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.is_dir():
        if not (path / PRESET_FILE).is_file():
            raise UsageError(f"checkpoint: {path} is a folder without {PRESET_FILE}; name the weights file itself")
        if preset is not None:
            raise UsageError(f"checkpoint: the folder {path} has its own preset; leave out `preset`")
        loaded = load_preset(path, overrides)
        return loaded, loaded.weights_path
    if path is not None and not path.is_file():
        raise UsageError(f"checkpoint: {path}: no such file")
    if preset is None and path is not None and (path.parent / PRESET_FILE).is_file():
        preset = path.parent
    loaded = load_preset(preset or DEFAULT_PRESET, overrides)
    return loaded, path or loaded.weights_path


def build_model(
    config: ModelConfig,
    backend: Backend,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    weights: Path | None = None,
    trainable: bool = False,
) -> CausalVideoTransformer:
    """A model with new weights or those of a file.

    Args:
        config: sizes and options.
        backend: how attention is computed and blocks are compiled.
        device: device to move it to.
        dtype: dtype to convert it to.
        weights: a safetensors file.
        trainable: in training mode, with gradients; otherwise it is frozen and in evaluation mode.

    Raises:
        UserError: the weights can't be read or do not fit.
    """
    model = CausalVideoTransformer(config, backend)
    if weights is not None:
        load_weights(model, load_tensors(weights)[0], str(weights))
    return model.to(device=device, dtype=dtype).train(trainable).requires_grad_(trainable)


def model_state(config: ModelConfig) -> dict[str, Tensor]:
    """A new model's state dict, to compare another one with; on the meta device if the model is large.

    The meta device needs no memory, but PyTorch takes seconds to load what it needs for it.
    """
    with torch.device("meta" if parameter_count(config) > LARGE else "cpu"):
        return CausalVideoTransformer(config, backends["eager"]).state_dict()


@torch.no_grad()
def randomize(model: CausalVideoTransformer) -> None:
    """Replace parameters that start at zero by random ones, so that checks of exactness test every branch."""
    for parameter in model.parameters():
        if parameter.count_nonzero() == 0:
            if parameter.ndim > 1:
                torch.nn.init.xavier_uniform_(parameter, gain=0.5)  # a gain of 1 saturates attention in deep models
            else:
                torch.nn.init.normal_(parameter, std=0.02)
