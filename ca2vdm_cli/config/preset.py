"""A preset: everything that belongs to one set of weights."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .base import STRICT
from .data import AutoencoderConfig, DataConfig, SyntheticDataConfig, TextConfig, VideoConfig
from .diffusion import DiffusionConfig, SamplingConfig
from .model import ModelConfig, TemporalPositions
from .training import DistillationConfig, Optimizer, Trainable, TrainingConfig


@dataclass(frozen=True, config=STRICT)
class Preset:
    """Everything that belongs to one set of weights: a model, its data, how it was trained and how to sample it."""

    description: str
    """One line for ``ca2vdm presets``."""
    model: ModelConfig
    """The network."""
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    """The noise process."""
    video: VideoConfig | None = None
    """Pixels; absent for presets that work on latents only."""
    autoencoder: AutoencoderConfig = Field(default_factory=AutoencoderConfig)
    """Between pixels and latents."""
    text: TextConfig | None = None
    """The text encoder of a model with text; without it such a model has its stored unconditional caption only."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How to sample."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """How to train."""
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    """How to make a few-step student of a trained model."""
    synthetic_data: SyntheticDataConfig | None = None
    """Training data made on the fly; without it ``train`` needs ``--data``."""
    data: DataConfig = Field(default_factory=DataConfig)
    """How clips are drawn from a data set."""
    weights: str | None = None
    """The model's safetensors file, beside the preset's own."""
    autoencoder_weights: str | None = None
    """The safetensors file of a conv or lowpass autoencoder, beside the preset's own."""

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Prefix lengths that a training step draws from."""
        start, window, chunk = self.diffusion.unconditional_start, self.model.context_frames, self.model.chunk_frames
        if self.training.prefix_lengths:
            return self.training.prefix_lengths
        if self.training.parallel_chunks:
            return (0,) if start else (1,)
        published = set(range(1, window + 1, chunk))
        return tuple(sorted(published | {*range(0, window + 1, chunk), window} if start else published))

    @property
    def clip_frames(self) -> int:
        """Frames of the longest clip that training asks for: with parallel chunks up to a chunk after a full window."""
        chunk, first = self.model.chunk_frames, min(self.prefixes)
        if not self.training.parallel_chunks:
            return self.model.window_frames
        frames = self.training.clip_frames or first - (first - self.model.window_frames) // chunk * chunk
        if self.model.temporal_positions is TemporalPositions.ABSOLUTE:  # which a clip can't outgrow
            return min(frames, first + (self.model.table_length - first) // chunk * chunk)
        return frames

    def chunks(self, prefix: int) -> int:
        """Chunks that one forward trains after so many clean frames."""
        if not self.training.parallel_chunks:
            return 1
        return max(1, (self.clip_frames - prefix) // self.model.chunk_frames)

    @model_validator(mode="after")
    def _check(self) -> Preset:
        if (self.video is None) != (self.autoencoder.kind == "none"):
            raise ValueError("video: needed exactly when autoencoder.kind is not none")
        if self.video is not None and self.autoencoder.kind != "none":
            for side in ("height", "width"):
                pixels, latent = getattr(self.video, side), getattr(self.model, f"latent_{side}")
                if pixels != latent * self.autoencoder.downsample:
                    raise ValueError(
                        f"video.{side}: {pixels} must be model.latent_{side} {latent} times "
                        f"autoencoder.downsample {self.autoencoder.downsample} = {latent * self.autoencoder.downsample}"
                    )
        lowpass = self.autoencoder.kind == "lowpass"
        if lowpass and self.video is not None and self.model.in_channels != self.video.channels:
            raise ValueError(
                f"model.in_channels: {self.model.in_channels} must be video.channels {self.video.channels} with the "
                "lowpass autoencoder"
            )
        if self.text is not None and not self.model.text_channels:
            raise ValueError("text: needs a model with text; set model.text_channels and model.text_tokens")
        if self.synthetic_data is not None and self.video is None:
            raise ValueError("synthetic_data: needs a video section")
        if self.diffusion.flow and self.model.learn_variance:
            raise ValueError("model.learn_variance: true needs a variance-preserving process, not beta_schedule flow")
        prefixes = self.training.prefix_lengths or ()
        if prefixes and 0 not in prefixes and self.diffusion.unconditional_start:
            raise ValueError(
                f"training.prefix_lengths: {list(prefixes)} must have 0, the empty context, when "
                "diffusion.unconditional_start is true"
            )
        weights = self.training.prefix_weights
        if weights is not None and (len(weights) != len(prefixes) or not sum(weights)):
            raise ValueError(
                f"training.prefix_weights: {list(weights)} must have one number for each of training.prefix_lengths "
                f"{list(prefixes)}, and not be all 0"
            )
        for prefix in prefixes:
            if prefix > self.model.context_frames:
                raise ValueError(
                    f"training.prefix_lengths: {prefix} must be at most model.context_frames = "
                    f"{self.model.context_frames}"
                )
        if self.training.trainable is Trainable.LORA:
            if self.training.lora_rank > self.model.hidden_size:
                raise ValueError(
                    f"training.lora_rank: {self.training.lora_rank} must be at most model.hidden_size "
                    f"{self.model.hidden_size}"
                )
            if self.training.optimizer is Optimizer.MUON:
                raise ValueError("training.optimizer: muon does not go with training.trainable lora; it takes adamw")
        if self.training.rollout_share and not self.training.parallel_chunks:
            raise ValueError(f"training.rollout_share: {self.training.rollout_share} needs training.parallel_chunks")
        latest = self.diffusion.train_timesteps - self.sampling.steps
        if self.sampling.last_timestep > max(0, latest):
            raise ValueError(
                f"sampling.last_timestep: {self.sampling.last_timestep} must be at most {latest}, to leave "
                f"{self.sampling.steps} timesteps to sampling.steps"
            )
        if self.training.first_chunk_share and not self.training.parallel_chunks:
            raise ValueError(
                f"training.first_chunk_share: {self.training.first_chunk_share} needs training.parallel_chunks"
            )
        if self.distillation.teacher_steps > self.diffusion.train_timesteps:
            raise ValueError(
                f"distillation.teacher_steps: {self.distillation.teacher_steps} must be at most "
                f"diffusion.train_timesteps {self.diffusion.train_timesteps}"
            )
        training, longest = self.training, max(self.prefixes) + self.model.chunk_frames
        if training.clip_frames is not None and not training.parallel_chunks:
            raise ValueError(f"training.clip_frames: {training.clip_frames} needs training.parallel_chunks")
        if training.clip_frames is not None and training.clip_frames < longest:
            raise ValueError(f"training.clip_frames: {training.clip_frames} must be at least {longest}, a whole chunk")
        absolute = self.model.temporal_positions is TemporalPositions.ABSOLUTE
        if absolute and training.clip_frames is not None and training.clip_frames > self.model.table_length:
            raise ValueError(
                f"training.clip_frames: {training.clip_frames} must be at most the {self.model.table_length} absolute "
                "positions"
            )
        return self
