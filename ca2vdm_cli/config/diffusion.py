"""The noise process, and how it is sampled."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .base import STRICT, Count


class Prediction(str, Enum):
    """What the network's first C output channels stand for."""

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
    """The noise process that the model was trained with."""

    train_timesteps: Count = 1000
    """Timesteps of the training process."""
    beta_schedule: BetaSchedule = BetaSchedule.LINEAR
    """How noise grows over the timesteps."""
    prediction: Prediction = Prediction.EPSILON
    """What the network predicts."""
    prefix_noise: tuple[int, int] | None = None
    """Perturb clean prefix frames with noise of a timestep drawn from this range, in training and sampling alike."""
    progressive_noise: Annotated[float, Field(ge=0)] = 0.0
    """Correlate each frame's noise with that of the frame before in its chunk, by this alpha / sqrt(1 + alpha²)
    (Ge et al. 2023), in training and sampling alike; 0 leaves frames independent."""
    unconditional_start: bool = False
    """Whether the weights were trained to begin from an empty context; otherwise sampling asks for a first frame."""

    @property
    def flow(self) -> bool:
        """Whether latents and noise are mixed along straight paths."""
        return self.beta_schedule is BetaSchedule.FLOW

    @model_validator(mode="after")
    def _check(self) -> DiffusionConfig:
        if self.flow != (self.prediction is Prediction.FLOW):
            raise ValueError(
                f"prediction: {self.prediction.value} does not go with beta_schedule {self.beta_schedule.value}; flow "
                "goes with flow, and the others with each other"
            )
        if self.prefix_noise is not None:
            low, high = self.prefix_noise
            if not 0 <= low <= high < self.train_timesteps:
                raise ValueError(
                    f"prefix_noise: {[low, high]} must be two ascending timesteps from 0 to {self.train_timesteps - 1}"
                )
        return self


@dataclass(frozen=True, config=STRICT)
class SamplingConfig:
    """How the weights are best sampled."""

    sampler: str = "ancestral"
    """Name of the sampler: ancestral, ddim, dpm++, log-snr, trailing, or a diffusers scheduler's class name."""
    steps: Count = 100
    """Denoising steps N of a chunk."""
    last_timestep: Annotated[int, Field(ge=0)] = 0
    """dpm++ and log-snr: the cleanest timestep that the network is asked at; one step goes from there to the latents.
    With few steps a noisier one than 0 leaves more of them for the noise in which is decided what is to be seen."""
    frames: Count = 32
    """Frames that ``sample`` and ``extend`` make unless told otherwise."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """How strongly a prompt is followed (classifier-free guidance); 1 asks the model once a step, not twice."""
