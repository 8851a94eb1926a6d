"""Training and distillation."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .base import STRICT, Count, Share


class DistillationSampler(str, Enum):
    """Samplers that a few-step student may be made for; both are DDIM."""

    TRAILING = "trailing"
    """The parts of the noise range are of equal length in time (Lin et al. 2024, Heek et al. 2024)."""
    LOG_SNR = "log-snr"
    """They are equal in log SNR, down to ``sampling.last_timestep``; a last one goes from there to the latents."""


class Schedule(str, Enum):
    """What the learning rate does after the warm-up."""

    CONSTANT = "constant"
    """It stays (published)."""
    COSINE = "cosine"
    """It falls to zero along half a cosine, at the last step."""


class Optimizer(str, Enum):
    """What turns gradients into steps."""

    ADAMW = "adamw"
    """AdamW for every parameter (published)."""
    MUON = "muon"
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest."""


class Trainable(str, Enum):
    """Which weights training changes."""

    ALL = "all"
    """All of them."""
    TEMPORAL = "temporal"
    """Those that video adds to an image model: temporal and prefix-enhanced attention."""
    LORA = "lora"
    """Low-rank adapters on the blocks' matrices (Hu et al. 2021), which are merged into the weights that are saved."""


class Precision(str, Enum):
    """What training computes in; weights and moments are float32 always."""

    AUTO = "auto"
    """bfloat16 where the processor multiplies it natively, else float32."""
    FLOAT32 = "float32"
    """Single precision."""
    BFLOAT16 = "bfloat16"
    """Matrix products in bfloat16 (autocast); where the processor has to convert it, many times slower."""


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """The clean-prefix objective and its optimizer."""

    steps: Count = 10_000
    """Optimizer steps."""
    batch_size: Count = 8
    """Clips per step, over all processes and gradient accumulation together."""
    accumulation: Count = 1
    """Parts that each process's share of a step's clips is worked through in (gradient accumulation)."""
    gradient_checkpointing: bool = False
    """Keep the blocks' inputs only and compute the rest again for the gradient: less memory, a third more time."""
    trainable: Trainable = Trainable.ALL
    """Which weights training changes."""
    lora_rank: Count = 16
    """lora: rank of the adapters."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """lora: an adapter's product is multiplied by this over its rank."""
    optimizer: Optimizer = Optimizer.ADAMW
    """What turns gradients into steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """AdamW's peak learning rate."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Muon's peak learning rate, scaled to AdamW's size of step (Liu et al. 2025); a few times AdamW's is a start."""
    precision: Precision = Precision.FLOAT32
    """What training computes in."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    schedule: Schedule = Schedule.CONSTANT
    """What the learning rate does after the warm-up."""
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    ema_decay: Share = 0.9999
    """Decay of the exponential moving average of the weights."""
    prefix_lengths: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Prefix lengths that each step draws one from; by default 1, 1+l, 1+2l, … (published), and with
    ``diffusion.unconditional_start`` 0, l, 2l, … and the full window too."""
    prefix_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """How often each of the prefix lengths is drawn, relative to the others; by default all alike. The share of the
    empty prefix is what others call image dropout."""
    parallel_chunks: bool = False
    """Train every chunk of a clip in one forward that shares the clean frames; ``prefix_lengths`` then says where the
    first chunk begins, by default 1, or 0 with ``diffusion.unconditional_start``."""
    clip_frames: Count | None = None
    """Frames of a clip with ``parallel_chunks``; by default the fewest whole chunks that hold a window and a chunk. In
    a longer one clean frames leave the window as they do when a long video is generated (window eviction)."""
    first_chunk_share: Share = 0.0
    """Share of the steps with ``parallel_chunks`` that train a clip's first chunk alone. A video's first chunk is the
    hardest to make, with nothing before it, and only one of a clip's many."""
    rollout_share: Share = 0.0
    """Share of the steps whose clean frames are the model's own: the chunks before the last are noised and made again
    through the cache, so that training meets the errors that sampling makes. Needs ``parallel_chunks``."""
    rollout_steps: Count = 8
    """Denoising steps of a whole chunk in such a rollout, with the preset's sampler."""
    rollout_strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How far the true chunk is noised before it is made again, as a share of the noise range; 1 keeps none of it."""
    text_dropout: Share = 0.1
    """Share of the clips whose caption is replaced by the stored unconditional one, as guidance needs (published)."""
    timestep_shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, noisier timesteps are drawn more often (Esser et al. 2024); 1 draws all alike (published)."""
    variance_weight: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the variational term that trains the variance channels."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the last checkpoints stay."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations: held-out loss, and a video and contact sheet from fixed seeds; 0 for none."""
    validation_clips: Count = 16
    """Clips that the held-out loss is measured on."""
    autoencoder_steps: Annotated[int, Field(ge=0)] = 0
    """conv and lowpass autoencoders: steps of their own training, before the model's, where they have no weights."""
    autoencoder_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """conv and lowpass autoencoders: peak learning rate."""
    autoencoder_batch_size: Count = 32
    """conv and lowpass autoencoders: pictures per step."""


@dataclass(frozen=True, config=STRICT)
class DistillationConfig:
    """Few-step distillation (``train --distill``): multistep consistency (Heek et al. 2024)."""

    steps: Count = 4
    """Denoising steps N of the student: the noise range is cut into N parts, and it learns to cross each in one."""
    sampler: DistillationSampler = DistillationSampler.TRAILING
    """What the student is to be sampled with, which says where the parts begin."""
    teacher_steps: Count = 32
    """Steps that the teacher would take over the whole range; a multiple of ``steps``."""

    @model_validator(mode="after")
    def _check(self) -> DistillationConfig:
        if self.teacher_steps % self.steps:
            raise ValueError(f"teacher_steps: {self.teacher_steps} must be a multiple of steps {self.steps}")
        return self
