"""How much memory a run needs, from formulas, and how much there is. Nothing is allocated to find out.

The formulas are those of the layers' largest tensors: a forward holds a few tokens' worth of activations at a time,
whatever the depth. ``plan`` reports them, and commands refuse what the machine cannot hold.

Shape letters: B videos, T frames, S tokens per frame, D width, H heads, R frames that a temporal query sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .config import AutoencoderConfig, ModelConfig, Preset, SpatialPrefix, TemporalPositions, Trainable
from .errors import UsageError
from .runtime import available_memory

TIMESTEP_FEATURES = 256
HEAP = 1.5
"""Memory of a forward on a CPU, as a multiple of the tensors alive at a time: the system's allocator keeps fragments of
freed memory. Measured: 1.1 to 2.3."""
GELU_BYTES = 2 * 4 * 2**18
"""Float32 copies that the GELU of half-precision tensors makes, part by part."""
FRAMES_AT_ONCE = 64
"""Frames that are decoded together, as in ``video_codec``."""
TRAINED_KINDS = ("conv", "lowpass")
"""Autoencoders whose memory is known."""


def parameter_count(config: ModelConfig) -> int:
    """Numbers in a model's state dict, buffers included."""
    d, patch = config.hidden_size, config.patch_size**2
    hidden = int(d * config.mlp_ratio)
    attention = 4 * d * d + 4 * d
    spatial = 1 if config.spatial_prefix is SpatialPrefix.NONE else 2
    block = 6 * d + (spatial + 1 + bool(config.text_channels)) * attention + 2 * d * hidden + hidden + d
    total = config.depth * block
    total += config.in_channels * patch * d + d  # patches
    total += TIMESTEP_FEATURES * d + d + d * d + d + 6 * d * d + 6 * d  # timesteps
    total += 2 * d + (d + 1) * patch * config.out_channels  # the final layer
    total += config.tokens_per_frame * d  # positions
    if config.temporal_positions is not TemporalPositions.ROPE:
        total += config.table_length * d
    if config.mask_channel:
        total += (d + 2) * d
    if config.text_channels:
        total += (config.text_channels + d + 2) * d + config.text_tokens * config.text_channels
    return total


def cache_bytes(
    config: ModelConfig, context_frames: int, itemsize: int, *, sink_frames: int | None = None, slid: bool = False
) -> int:
    """Bytes of the cache for one video: the ring, the spatial prefix and the caption's keys and values.

    Args:
        config: the model's sizes.
        context_frames: window in frames.
        itemsize: bytes per element.
        sink_frames: first frames that are never evicted; by default the model's.
        slid: whether the window has slid; rope sinks' keys are then kept as first written too.
    """
    sinks = config.sink_frames if sink_frames is None else sink_frames
    frames = context_frames + config.chunk_frames + config.spatial_slots
    elements = config.depth * config.tokens_per_frame * 2 * config.hidden_size * frames
    if slid and sinks and config.temporal_positions is TemporalPositions.ROPE:
        elements += config.depth * config.tokens_per_frame * config.hidden_size * sinks
    return elements * itemsize + text_bytes(config, itemsize)


def cache_parts(config: ModelConfig, context_frames: int, itemsize: int, *, slid: bool = False) -> dict[str, int]:
    """``cache_bytes`` by what they hold: context, the slots of a chunk, spatial prefix, rope sinks and caption."""
    frame = config.depth * config.tokens_per_frame * 2 * config.hidden_size * itemsize
    parts = {
        "context": context_frames * frame,
        "chunk": config.chunk_frames * frame,
        "prefix": config.spatial_slots * frame,
        "caption": text_bytes(config, itemsize),
    }
    return parts | {"sinks": cache_bytes(config, context_frames, itemsize, slid=slid) - sum(parts.values())}


def text_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of the caption's keys and values in the cache, and of its mask, one byte per token."""
    return config.depth * config.text_tokens * 2 * config.hidden_size * itemsize + config.text_tokens


def forward_bytes(config: ModelConfig, itemsize: int, frames: int, seen: int, *, scores: bool) -> int:
    """Bytes of the tensors that are alive at the peak of a forward of one video.

    Args:
        config: the model's sizes.
        itemsize: bytes per element.
        frames: frames that go through the network.
        seen: frames that a temporal query sees, R.
        scores: whether the backend writes out the scores of attention.
    """
    tokens, width, heads = config.tokens_per_frame, config.hidden_size, config.num_heads
    hidden = int(width * config.mlp_ratio)
    unit = frames * tokens * width  # elements of x
    rope = config.temporal_positions is TemporalPositions.ROPE
    peak = max(2 * frames * tokens * hidden + 4 * unit, (10 if rope else 9) * unit) * itemsize
    if itemsize < 4:
        peak += min(8 * frames * tokens * hidden, GELU_BYTES)
    if scores:
        spatial = 2 * frames * tokens**2 * max(1, config.spatial_slots)
        temporal = 3 * tokens * frames * seen
        text = 3 * frames * tokens * config.text_tokens
        peak = max(peak, (4 * unit + heads * max(spatial, temporal, text)) * itemsize)
    return peak + 14 * frames * width * itemsize  # modulation


def decode_bytes(config: AutoencoderConfig, model: ModelConfig, channels: int, frames: int) -> int:
    """Bytes at the peak of the small autoencoders' decoder, which runs in float32; 0 for other autoencoders."""
    if config.kind not in TRAINED_KINDS:
        return 0
    frames = min(frames, FRAMES_AT_ONCE)
    latents = model.latent_height * model.latent_width
    features = 4 * latents * config.base_channels  # at twice the latents' resolution
    pixels = latents * config.downsample**2 * channels
    return 4 * frames * (6 * features + 2 * pixels)


def autoencoder_bytes(config: AutoencoderConfig, model: ModelConfig, channels: int) -> int:
    """Bytes of a small autoencoder's state dict in float32; 0 for other autoencoders."""
    if config.kind not in TRAINED_KINDS:
        return 0
    latent, width, wide = model.in_channels, config.base_channels, 2 * config.base_channels
    pixels = channels * (config.downsample // 2) ** 2

    def conv(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + outputs

    def residual(size: int) -> int:
        return size + 2 * conv(size, size)

    decoder = conv(latent, wide) + 3 * residual(wide) + 4 * width * (wide + 1)
    decoder += 3 * residual(width) + width + conv(width, pixels)
    encoder = conv(pixels, width) + 2 * residual(width) + wide * (4 * width + 1)
    encoder += 2 * residual(wide) + wide + conv(wide, latent)
    return 4 * (decoder + (encoder if config.kind == "conv" else 0) + 2 * latent) + 8  # 8: a count of batches


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that generation needs. ``step``, ``write`` and ``decode`` are peaks above what was there before."""

    weights: int
    autoencoder: int
    cache: int
    step: int
    write: int
    decode: int
    loading: int
    """The model in float32, as it is built, with the file of its weights."""

    @property
    def working(self) -> int:
        return max(self.step, self.write, self.decode)

    @property
    def running(self) -> int:
        return self.weights + self.autoencoder + self.cache + self.working

    @property
    def peak(self) -> int:
        """On a CPU; a model for a GPU is built on the CPU too."""
        return max(self.running, self.loading)


def generation_needs(
    preset: Preset,
    dtype: torch.dtype,
    device: torch.device,
    *,
    scores: bool,
    videos: int = 1,
    context_frames: int | None = None,
    slid: bool = True,
    contexts: Iterable[str] = ("cached",),
    weights_file_bytes: int = 0,
) -> MemoryNeeds:
    """What it takes to generate videos together.

    Args:
        preset: the settings.
        dtype: dtype of weights, activations and cache.
        device: where the model runs.
        scores: whether the backend writes out the scores of attention.
        videos: videos that are generated together; twice as many under guidance.
        context_frames: window in frames; the model's own by default.
        slid: whether the window slides.
        contexts: names of the contexts that are in memory together. Those that are not known count as ``cached``.
        weights_file_bytes: size of the weights file.
    """
    config, itemsize, names = preset.model, dtype.itemsize, tuple(contexts)
    window, length = context_frames or config.context_frames, config.chunk_frames
    count, channels = parameter_count(config), 3 if preset.video is None else preset.video.channels
    heap = HEAP if device.type == "cpu" else 1.0

    def forward(frames: int) -> int:
        return int(heap * videos * forward_bytes(config, itemsize, frames, window + length, scores=scores))

    recomputed = any(name.startswith(("recompute", "bidirectional", "fixed-window")) for name in names)
    caches = sum(not name.startswith(("recompute", "bidirectional", "fixed-window")) for name in names)
    decoded = decode_bytes(preset.autoencoder, config, channels, videos * length)
    return MemoryNeeds(
        weights=count * itemsize,
        autoencoder=autoencoder_bytes(preset.autoencoder, config, channels),
        cache=videos * caches * cache_bytes(config, window, itemsize, slid=slid),
        step=forward(window + length if recomputed else length),
        write=forward(length),
        decode=int(heap * decoded),
        loading=4 * count + weights_file_bytes,
    )


def training_needs(
    preset: Preset,
    dtype: torch.dtype,
    *,
    scores: bool,
    processes: int = 1,
    sharded: bool = False,
    teacher: bool = False,
) -> dict[str, int]:
    """Bytes of training in one process, by part: float32 weights, gradients, moments and average, and activations.

    Args:
        preset: the settings.
        dtype: dtype of matrix products.
        scores: whether the backend writes out the scores of attention.
        processes: processes that share a batch.
        sharded: whether they share the weights and moments too.
        teacher: whether another model is distilled.
    """
    config, training = preset.model, preset.training
    count, width = parameter_count(config), config.hidden_size
    hidden = int(width * config.mlp_ratio)
    trainable = {
        Trainable.ALL: count,
        Trainable.TEMPORAL: min(count, config.depth * 8 * (width + 1) * width),
        Trainable.LORA: min(count, config.depth * training.lora_rank * (27 * width + 2 * hidden)),
    }[training.trainable]
    clips = -(-training.batch_size // (processes * training.accumulation))
    frames = preset.clip_frames
    if training.parallel_chunks:  # clean frames, and the noisy ones beside them
        frames += preset.chunks(preset.first_prefix) * config.chunk_frames
    tokens = frames * config.tokens_per_frame
    block = tokens * (25 * width + 2 * hidden) * (4 if dtype.itemsize == 4 else 3)
    if scores:
        seen = max(config.tokens_per_frame * max(1, config.spatial_slots), frames)
        block += 2 * config.num_heads * tokens * seen * 4
    blocks = config.depth * block
    if training.gradient_checkpointing:
        blocks = block + config.depth * 4 * tokens * width
    share = processes if sharded else 1
    pixels = 0 if preset.video is None else preset.video.height * preset.video.width * preset.video.channels
    return {
        "weights": 4 * count * (3 if teacher else 2) // share,  # with their average
        "gradients and moments": 12 * trainable // share,
        "activations": clips * blocks,
        "clips": 3 * 4 * training.batch_size * preset.clip_frames * pixels // processes,
    }


def check_memory(parts: Mapping[str, int], device: torch.device, *, force: bool | None) -> None:
    """Refuse what the machine cannot hold.

    Args:
        parts: bytes that are needed in addition to those in use now, by what needs them.
        device: where they are needed.
        force: try it all the same; None if that is not offered.

    Raises:
        UsageError: more is needed than is available.
    """
    needed, available = sum(parts.values()), None if force else available_memory(device)
    if available is None or needed <= available:
        return
    listed = ", ".join(f"{name} {_size(count)}" for name, count in parts.items() if count)
    trying = "" if force is None else ", or try it all the same with `force`"
    raise UsageError(
        f"memory: about {_size(needed)} are needed on {device} ({listed}), and {_size(available)} are available; "
        f"choose a smaller model, window, batch or frame{trying}"
    )


def check_generation(needs: MemoryNeeds, device: torch.device, *, force: bool | None, loaded: bool = False) -> None:
    """Refuse a generation that the machine cannot hold, before its model is built or (``loaded``) afterwards."""
    weights = needs.weights + needs.autoencoder
    parts = {"weights": 0 if loaded else weights, "cache": needs.cache, "activations": needs.working}
    check_memory(parts, device, force=force)
    if not loaded:  # models are built on the CPU
        check_memory({"weights in float32, while loading": needs.loading}, torch.device("cpu"), force=force)


def _size(count: int) -> str:
    """A number of bytes with its unit: 1.5 GiB, 12 TiB."""
    amount: Any = count
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.3g} {unit}" if amount < 10**4 else f"{amount:.0e} {unit}"
