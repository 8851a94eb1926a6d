"""What can be configured, and what each setting means.

Plain dataclasses that pydantic validates when they are made, so that an impossible combination fails here and not deep
inside a run. Presets (``presets.py``) are read into them; nothing in this package imports torch.
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
