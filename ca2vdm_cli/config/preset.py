"""A preset: everything that belongs to one set of weights."""

from __future__ import annotations

from functools import cached_property

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .base import STRICT, require
from .data import AutoencoderConfig, DataConfig, SyntheticDataConfig, TextConfig, VideoConfig
from .diffusion import DiffusionConfig, SamplingConfig
from .model import ModelConfig, TemporalPositions
from .training import DistillationConfig, Optimizer, Trainable, TrainingConfig


@dataclass(frozen=True, config=STRICT)
class Preset:
    """Everything that belongs to one set of weights: the model, its data, and how to train and sample it."""

    description: str
    """One line for ``ca2vdm presets``."""
    model: ModelConfig
    """The network."""
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    """The noise process."""
    video: VideoConfig | None = None
    """Format of the frames; null for presets that work on latents only."""
    autoencoder: AutoencoderConfig = Field(default_factory=AutoencoderConfig)
    """The autoencoder, which converts between frames and latents."""
    text: TextConfig | None = None
    """The text encoder; without it, a text-conditioned model has only its stored unconditional caption."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """Default settings of sampling."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """How to train."""
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    """Distillation of a trained model into one that needs few steps."""
    synthetic_data: SyntheticDataConfig | None = None
    """Training data generated on the fly; if null, training needs a data set."""
    data: DataConfig = Field(default_factory=DataConfig)
    """How clips are drawn from a data set."""
    weights: str | None = None
    """The model's weights: a safetensors file, relative to the preset's folder."""
    autoencoder_weights: str | None = None
    """Weights of a conv or lowpass autoencoder: a safetensors file, relative to the preset's folder."""

    @cached_property
    def prefixes(self) -> tuple[int, ...]:
        """Prefix lengths, of which each training step draws one."""
        start, window, chunk = self.diffusion.unconditional_start, self.model.context_frames, self.model.chunk_frames
        if self.training.prefix_lengths:
            return self.training.prefix_lengths
        if self.training.parallel_chunks:
            return (0,) if start else (1,)
        published = set(range(1, window + 1, chunk))
        return tuple(sorted(published | {*range(0, window + 1, chunk), window} if start else published))

    @property
    def first_prefix(self) -> int:
        """The shortest of ``prefixes``."""
        return min(self.training.prefix_lengths or (0 if self.diffusion.unconditional_start else 1,))

    @property
    def clip_frames(self) -> int:
        """Frames of the longest training clip: with parallel chunks, at least a full window and a chunk by default."""
        chunk, first = self.model.chunk_frames, self.first_prefix
        if not self.training.parallel_chunks:
            return self.model.window_frames
        frames = self.training.clip_frames or first - (first - self.model.window_frames) // chunk * chunk
        if self.model.temporal_positions is TemporalPositions.ABSOLUTE:  # limit a clip's length
            return min(frames, first + (self.model.table_length - first) // chunk * chunk)
        return frames

    def chunks(self, prefix: int) -> int:
        """Number of chunks that one forward trains, the first after ``prefix`` clean frames."""
        if not self.training.parallel_chunks:
            return 1
        return max(1, (self.clip_frames - prefix) // self.model.chunk_frames)

    @property
    def trained_prefixes(self) -> tuple[int, ...]:
        """Prefix lengths after which some chunk is trained: ``prefixes``, and those of a clip's later chunks."""
        window, chunk = self.model.context_frames, self.model.chunk_frames
        lengths = {window for p in self.prefixes if p + (self.chunks(p) - 1) * chunk >= window}
        for p in self.prefixes:
            lengths.update(range(p, min(window, p + self.chunks(p) * chunk), chunk))
        return tuple(sorted(lengths))

    @model_validator(mode="after")
    def _check(self) -> Preset:
        self._check_pixels()
        self._check_prefixes()
        self._check_optimizer()
        self._check_sampling()
        self._check_clips()
        return self

    def _check_pixels(self) -> None:
        """Video, autoencoder, text and data against the model and its noise process."""
        model, video, autoencoder = self.model, self.video, self.autoencoder
        require(
            (video is None) == (autoencoder.kind == "none"), "video: needed exactly when autoencoder.kind is not none"
        )
        if video is not None:
            for side in ("height", "width"):
                pixels, latent = getattr(video, side), getattr(model, f"latent_{side}")
                require(
                    pixels == latent * autoencoder.downsample,
                    f"video.{side}: {pixels} must be model.latent_{side} {latent} times "
                    f"autoencoder.downsample {autoencoder.downsample} = {latent * autoencoder.downsample}",
                )
            require(
                autoencoder.kind != "lowpass" or model.in_channels == video.channels,
                f"model.in_channels: {model.in_channels} must be video.channels {video.channels} with the lowpass "
                "autoencoder",
            )
        require(
            self.text is None or model.text_channels > 0,
            "text: needs a text-conditioned model; set model.text_channels and model.text_tokens",
        )
        require(self.synthetic_data is None or video is not None, "synthetic_data: needs a video section")
        require(
            not (self.diffusion.flow and model.learn_variance),
            "model.learn_variance: true needs a variance-preserving process, not beta_schedule flow",
        )

    def _check_prefixes(self) -> None:
        lengths, weights = self.training.prefix_lengths or (), self.training.prefix_weights
        require(
            not lengths or 0 in lengths or not self.diffusion.unconditional_start,
            f"training.prefix_lengths: {list(lengths)} must have 0, the empty context, when "
            "diffusion.unconditional_start is true",
        )
        require(
            weights is None or (len(weights) == len(lengths) and sum(weights) > 0),
            f"training.prefix_weights: {list(weights or ())} must have one number for each of training.prefix_lengths "
            f"{list(lengths)}, and not be all 0",
        )
        for length in lengths:
            require(
                length <= self.model.context_frames,
                f"training.prefix_lengths: {length} must be at most model.context_frames = {self.model.context_frames}",
            )

    def _check_optimizer(self) -> None:
        training = self.training
        if training.trainable is Trainable.LORA:
            require(
                training.lora_rank <= self.model.hidden_size,
                f"training.lora_rank: {training.lora_rank} must be at most model.hidden_size {self.model.hidden_size}",
            )
            require(
                training.optimizer is not Optimizer.MUON,
                "training.optimizer: muon does not go with training.trainable lora; it takes adamw",
            )

    def _check_sampling(self) -> None:
        """Timesteps of sampling and distillation."""
        train_timesteps, steps = self.diffusion.train_timesteps, self.sampling.steps
        latest = train_timesteps - steps
        require(
            self.sampling.last_timestep <= max(0, latest),
            f"sampling.last_timestep: {self.sampling.last_timestep} must be at most {latest}, to leave {steps} "
            "timesteps to sampling.steps",
        )
        require(
            self.distillation.teacher_steps <= train_timesteps,
            f"distillation.teacher_steps: {self.distillation.teacher_steps} must be at most "
            f"diffusion.train_timesteps {train_timesteps}",
        )

    def _check_clips(self) -> None:
        """Lengths of clips, and settings that need ``training.parallel_chunks``."""
        training = self.training
        for key in ("rollout_share", "first_chunk_share", "clip_frames"):
            value = getattr(training, key)
            require(training.parallel_chunks or not value, f"training.{key}: {value} needs training.parallel_chunks")
        if training.clip_frames is None:
            return
        shortest = max(self.prefixes) + self.model.chunk_frames
        require(
            training.clip_frames >= shortest,
            f"training.clip_frames: {training.clip_frames} must be at least {shortest}, a whole chunk",
        )
        require(
            self.model.temporal_positions is not TemporalPositions.ABSOLUTE
            or training.clip_frames <= self.model.table_length,
            f"training.clip_frames: {training.clip_frames} must be at most the {self.model.table_length} absolute "
            "positions",
        )
