"""The noise process, and how it is sampled."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .base import STRICT, Count, Timesteps, require


class Prediction(str, Enum):
    """What the network's first C output channels are."""

    EPSILON = "epsilon"
    """The noise that was added (published)."""
    V = "v"
    """alpha · noise - sigma · latent (Salimans & Ho 2022); better behaved with few steps."""
    FLOW = "flow"
    """noise - latent, the velocity of flow matching (Lipman et al. 2023)."""


class BetaSchedule(str, Enum):
    """How noise grows over the training timesteps."""

    LINEAR = "linear"
    """Betas evenly spaced from 1e-4 to 2e-2 (published)."""
    COSINE = "cosine"
    """Squared-cosine cumulative product (Nichol & Dhariwal 2021)."""
    FLOW = "flow"
    """Straight paths between latents and noise, as ``prediction: flow`` needs them (rectified flow)."""


@dataclass(frozen=True, config=STRICT)
class DiffusionConfig:
    """The noise process of training and sampling."""

    train_timesteps: Timesteps = 1000
    """Number of timesteps in training."""
    beta_schedule: BetaSchedule = BetaSchedule.LINEAR
    """How noise grows over the timesteps."""
    prediction: Prediction = Prediction.EPSILON
    """What the network predicts."""
    prefix_noise: tuple[int, int] | None = None
    """Add noise to clean prefix frames, at a timestep drawn from this range, in training and in sampling."""
    progressive_noise: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Alpha of noise that is correlated between the frames of a chunk (Ge et al. 2023), in training and in sampling:
    neighbours correlate by alpha / sqrt(1 + alpha²). 0 for independent noise."""
    unconditional_start: bool = False
    """Whether the model is trained to start from an empty context; if not, sampling needs a first frame."""

    @property
    def flow(self) -> bool:
        """Whether this is flow matching: straight paths between latents and noise."""
        return self.beta_schedule is BetaSchedule.FLOW

    @model_validator(mode="after")
    def _check(self) -> DiffusionConfig:
        require(
            self.flow == (self.prediction is Prediction.FLOW),
            f"prediction: {self.prediction.value} does not go with beta_schedule {self.beta_schedule.value}; flow goes "
            "with flow, the other predictions with the other schedules",
        )
        if self.prefix_noise is not None:
            low, high = self.prefix_noise
            require(
                0 <= low <= high < self.train_timesteps,
                f"prefix_noise: {[low, high]} must be two ascending timesteps from 0 to {self.train_timesteps - 1}",
            )
        return self


@dataclass(frozen=True, config=STRICT)
class SamplingConfig:
    """Default settings of sampling."""

    sampler: str = "ancestral"
    """The sampler: ancestral, ddim, dpm++, log-snr, trailing, a plug-in's, or a diffusers scheduler's class name."""
    steps: Timesteps = 100
    """N: denoising steps per chunk."""
    last_timestep: Annotated[int, Field(ge=0, le=2**20)] = 0
    """dpm++ and log-snr: timestep at which the last denoising step starts. When sampling with few steps, raise this so
    that more of them fall at the high noise levels that determine content."""
    frames: Count = 32
    """Default number of frames of ``sample`` and ``extend``."""
    guidance: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Scale of classifier-free guidance by a prompt. 1 turns guidance off, and halves the cost of a step."""
