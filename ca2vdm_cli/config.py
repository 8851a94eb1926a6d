"""What can be configured, and what each setting means.

These are plain dataclasses that pydantic validates when they are made, so that an impossible combination fails here and
not deep inside a run. Presets (``presets.py``) are read into them; nothing in this module imports torch.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class TemporalPositions(str, Enum):
    """How a frame's place in time enters temporal attention."""

    CYCLIC = "cyclic"
    """A table that wraps: frame f uses entry f modulo the table's length (the paper's choice)."""
    ROPE = "rope"
    """Rotary embedding of queries and keys at the frame number."""
    ABSOLUTE = "absolute"
    """A table that does not wrap; the video cannot outgrow it."""


class SpatialPrefix(str, Enum):
    """What a noisy frame sees of the clean frames in prefix-enhanced spatial attention."""

    PREV_FRAMES = "prev_frames_k"
    """The tokens of the last ``spatial_prefix_frames`` clean frames; a clean frame sees its own tokens."""
    FIRST_FRAME = "first_frame"
    """Every frame, clean or noisy, sees the first frame."""
    NONE = "none"
    """The layer is absent."""


class Causality(str, Enum):
    """Who sees whom in temporal attention."""

    CAUSAL = "causal"
    """A frame sees itself and earlier frames."""
    PARTIAL = "partial"
    """Clean frames are causal; the noisy frames of one chunk also see each other."""


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


class AutoencoderKind(str, Enum):
    """What turns frames into latents."""

    NONE = "none"
    """Nothing: the preset works on latents only (benchmarks)."""
    CONV = "conv"
    """The small convolutional autoencoder of this package."""
    LOWPASS = "lowpass"
    """Latents are the frames themselves, smoothed and made smaller; a small network learns to draw them sharp again."""
    DIFFUSERS = "diffusers"
    """An ``AutoencoderKL`` of the diffusers library (extra ``latent``)."""

    @property
    def trained_here(self) -> bool:
        """Whether ``train`` makes its weights."""
        return self in (AutoencoderKind.CONV, AutoencoderKind.LOWPASS)


class DataFormat(str, Enum):
    """How a data set lies on disk."""

    AUTO = "auto"
    """Guessed from the files."""
    VIDEOS = "videos"
    """Video files in nested folders, or one video file."""
    FRAMES = "frames"
    """Folders of images, each a video (SkyTimelapse, BAIR as images)."""
    UCF101 = "ucf101"
    """UCF-101: class folders and the official lists."""
    BAIR = "bair"
    """BAIR robot pushing: TFRecords."""
    MOVING_MNIST = "moving-mnist"
    """Moving MNIST: an ``.npy`` of shape (T, N, H, W)."""
    JSONL = "jsonl"
    """A file whose lines have ``path`` and perhaps ``text`` (MSR-VTT and the like)."""
    MOVING_DIGITS = "moving-digits"
    """Made on the fly by the preset's ``synthetic_data``."""


class Split(str, Enum):
    """Which part of a data set is read."""

    TRAIN = "train"
    """What is meant for training; everything where the data set has no parts."""
    TEST = "test"
    """What is meant for testing."""
    ALL = "all"
    """Everything."""


class Crop(str, Enum):
    """How a training frame of another shape is brought to the model's."""

    STRETCH = "stretch"
    """The whole frame, distorted."""
    CROP = "crop"
    """The largest centred region of the model's shape."""
    PAD = "pad"
    """The whole frame between black bars."""
    RANDOM = "random"
    """As ``crop``, at a random place that is the same for all frames of a clip."""


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The causal video diffusion transformer: sizes, context, positions and options."""

    depth: Count
    """Number of transformer blocks."""
    hidden_size: Count
    """Width D of a token."""
    num_heads: Count
    """Attention heads; they divide ``hidden_size``."""
    latent_height: Count
    """Height of a latent frame."""
    latent_width: Count
    """Width of a latent frame."""
    in_channels: Count = 4
    """Channels C of a latent frame."""
    patch_size: Count = 2
    """Side of the square of latent pixels that becomes one token."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Width of the MLP's hidden layer, as a multiple of ``hidden_size``."""
    context_frames: Count = 25
    """P_max: how many clean frames a chunk sees at most (the window, the capacity of the cache)."""
    chunk_frames: Count = 8
    """l: how many frames are denoised together."""
    sink_frames: Annotated[int, Field(ge=0)] = 0
    """How many of the video's first frames are never evicted from the cache; they count against ``context_frames``."""
    temporal_positions: TemporalPositions = TemporalPositions.CYCLIC
    """How frames are told apart in time."""
    position_table: Annotated[int, Field(ge=0)] = 0
    """Entries of the temporal position table; 0 means ``context_frames + chunk_frames``."""
    spatial_prefix: SpatialPrefix = SpatialPrefix.PREV_FRAMES
    """What prefix-enhanced spatial attention looks at."""
    spatial_prefix_frames: Count = 3
    """k: clean frames that prefix-enhanced spatial attention looks at (``prev_frames_k`` only)."""
    causality: Causality = Causality.CAUSAL
    """Whether the noisy frames of a chunk see each other."""
    mask_channel: bool = False
    """Tell the first temporal attention which frames are clean through an extra input channel."""
    text_channels: Annotated[int, Field(ge=0)] = 0
    """Width of the text encoder's embeddings; 0 leaves out text cross-attention."""
    text_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of a caption, padding included."""
    learn_variance: bool = True
    """Predict C further channels that interpolate the variance of the ancestral sampler."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        need(
            self.hidden_size % self.num_heads == 0,
            f"num_heads: {self.num_heads} must divide hidden_size {self.hidden_size}",
        )
        need(
            self.hidden_size % 4 == 0,
            f"hidden_size: {self.hidden_size} must be a multiple of 4 (2-D sin-cos positions)",
        )
        for side in ("latent_height", "latent_width"):
            size = getattr(self, side)
            need(size % self.patch_size == 0, f"{side}: {size} must be a multiple of patch_size {self.patch_size}")
        need(
            self.chunk_frames <= self.context_frames,
            f"chunk_frames: {self.chunk_frames} must be at most context_frames {self.context_frames}",
        )
        need(
            self.sink_frames <= self.context_frames - self.chunk_frames,
            f"sink_frames: {self.sink_frames} must be at most context_frames - chunk_frames = "
            f"{self.context_frames - self.chunk_frames}",
        )
        need(
            self.spatial_prefix is not SpatialPrefix.PREV_FRAMES
            or self.spatial_prefix_frames <= self.context_frames - self.sink_frames,
            f"spatial_prefix_frames: {self.spatial_prefix_frames} must be at most context_frames - sink_frames = "
            f"{self.context_frames - self.sink_frames}",
        )
        need(
            self.table_length >= self.context_frames + self.chunk_frames
            or self.temporal_positions is TemporalPositions.ROPE,
            f"position_table: {self.table_length} must hold context_frames + chunk_frames = "
            f"{self.context_frames + self.chunk_frames} frames with {self.temporal_positions.value} positions",
        )
        need(
            self.temporal_positions is not TemporalPositions.ROPE or self.head_size % 2 == 0,
            f"num_heads: rope positions need an even head size, not {self.head_size}",
        )
        need(
            (self.text_channels > 0) == (self.text_tokens > 0),
            f"text_tokens: {self.text_tokens} must be positive exactly when text_channels ({self.text_channels}) is",
        )
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def tokens_per_frame(self) -> int:
        """S: tokens of one latent frame."""
        return (self.latent_height // self.patch_size) * (self.latent_width // self.patch_size)

    @property
    def window_frames(self) -> int:
        """Frames of a full window and a chunk: P_max + l."""
        return self.context_frames + self.chunk_frames

    @property
    def table_length(self) -> int:
        """Entries of the temporal position table (33 in the paper)."""
        return self.position_table or self.window_frames

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: the prediction and, with ``learn_variance``, the variance."""
        return self.in_channels * (2 if self.learn_variance else 1)


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class VideoConfig:
    """The pixels that go in and come out."""

    height: Count
    """Height of a frame in pixels."""
    width: Count
    """Width of a frame in pixels."""
    channels: Literal[1, 3] = 3
    """1 for gray, 3 for RGB."""
    fps: Annotated[float, Field(gt=0)] = 8.0
    """Frames per second of generated video."""


@dataclass(frozen=True, config=_STRICT)
class AutoencoderConfig:
    """What turns frames into latents and back."""

    kind: AutoencoderKind = AutoencoderKind.NONE
    """Which autoencoder."""
    path: str | None = None
    """diffusers: a local folder or a hub name."""
    scale_factor: Annotated[float, Field(gt=0)] = 1.0
    """Latents are multiplied by this so that their standard deviation is near 1 (0.18215 for the SD autoencoder)."""
    downsample: Annotated[int, Field(ge=2)] = 8
    """Pixels per latent pixel along each side (conv, lowpass: an even number)."""
    base_channels: Count = 48
    """conv, lowpass: width of the feature maps at twice the latents' size; at the latents' size they are twice as
    wide."""
    latent_noise: Annotated[float, Field(ge=0)] = 0.15
    """conv, lowpass: standard deviation of the noise on latents (whose own is 1) in training, so that the decoder
    learns to forgive a diffusion model's errors."""

    @model_validator(mode="after")
    def _check(self) -> AutoencoderConfig:
        if self.kind.trained_here and self.downsample % 2:
            raise ValueError(f"downsample: {self.downsample} must be even for the {self.kind.value} autoencoder")
        if self.kind is AutoencoderKind.DIFFUSERS and self.path is None:
            raise ValueError("path: the diffusers autoencoder needs a local folder or a hub name")
        return self


@dataclass(frozen=True, config=_STRICT)
class TextConfig:
    """The T5 encoder that turns captions and prompts into embeddings (extra ``latent``)."""

    path: str
    """A local folder or a hub name; its weights are safetensors."""
    encoder_folder: str = ""
    """Folder of the encoder in it (``text_encoder`` in a pipeline of diffusers)."""
    tokenizer_folder: str = ""
    """Folder of the tokenizer in it (``tokenizer`` in a pipeline of diffusers)."""


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class SyntheticDataConfig:
    """The moving-digits generator: handwritten digits that drift and bounce off the borders."""

    digits: Count = 1
    """Digits in a frame."""
    images_per_class: Count = 10
    """How many handwritten images of each class are used, of those shipped with the package."""
    digit_size: Count = 28
    """Side of a digit's image in pixels; the strokes' width grows with it."""
    min_speed: Annotated[float, Field(gt=0)] = 1.5
    """Slowest speed in pixels per frame."""
    max_speed: Annotated[float, Field(gt=0)] = 4.0
    """Fastest speed in pixels per frame."""
    directions: Annotated[int, Field(ge=0)] = 0
    """How many directions digits move in, evenly spread, none along a border (4 are the diagonals); 0 for any."""

    @model_validator(mode="after")
    def _check(self) -> SyntheticDataConfig:
        if self.max_speed < self.min_speed:
            raise ValueError(f"max_speed: {self.max_speed} must be at least min_speed {self.min_speed}")
        return self


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """How clips are drawn from a data set."""

    format: DataFormat = DataFormat.AUTO
    """How the data set lies on disk."""
    split: Split = Split.TRAIN
    """Which part of the data set is read."""
    split_list: Literal[1, 2, 3] = 1
    """UCF-101: which of the three official train/test lists."""
    stride: Count = 1
    """Frames of the video from one frame of a clip to the next."""
    crop: Crop = Crop.STRETCH
    """How a frame of another shape is brought to the model's; ``train --aspect`` overrides it."""
    flip: bool = False
    """Mirror half of the clips, left to right."""
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """Processes that make batches ahead, 0 for none; by default 2 where frames are decoded, else none."""


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
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
        if (self.video is None) != (self.autoencoder.kind is AutoencoderKind.NONE):
            raise ValueError("video: needed exactly when autoencoder.kind is not none")
        if self.video is not None and self.autoencoder.kind is not AutoencoderKind.NONE:
            for side in ("height", "width"):
                pixels, latent = getattr(self.video, side), getattr(self.model, f"latent_{side}")
                if pixels != latent * self.autoencoder.downsample:
                    raise ValueError(
                        f"video.{side}: {pixels} must be model.latent_{side} {latent} times "
                        f"autoencoder.downsample {self.autoencoder.downsample} = {latent * self.autoencoder.downsample}"
                    )
        lowpass = self.autoencoder.kind is AutoencoderKind.LOWPASS
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
