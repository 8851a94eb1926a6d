"""The configuration: every setting, its default and its meaning.

The sections are dataclasses that pydantic validates on creation, so an impossible combination of settings fails here
and not in the middle of a run. ``presets.py`` reads YAML files into them. Nothing in this package imports torch.
"""

from .data import (
    AutoencoderConfig,
    Crop,
    DataConfig,
    Split,
    SyntheticDataConfig,
    TextConfig,
    VideoConfig,
)
from .diffusion import BetaSchedule, DiffusionConfig, Prediction, SamplingConfig
from .model import Causality, ModelConfig, SpatialPrefix, TemporalPositions
from .preset import Preset
from .training import DistillationConfig, DistillationSampler, Optimizer, Precision, Schedule, Trainable, TrainingConfig

__all__ = [
    "AutoencoderConfig",
    "BetaSchedule",
    "Causality",
    "Crop",
    "DataConfig",
    "DiffusionConfig",
    "DistillationConfig",
    "DistillationSampler",
    "ModelConfig",
    "Optimizer",
    "Precision",
    "Prediction",
    "Preset",
    "SamplingConfig",
    "Schedule",
    "SpatialPrefix",
    "Split",
    "SyntheticDataConfig",
    "TemporalPositions",
    "TextConfig",
    "Trainable",
    "TrainingConfig",
    "VideoConfig",
]
