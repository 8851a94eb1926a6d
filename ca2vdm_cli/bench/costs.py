"""Formulas for the cost of a forward (floating-point operations) and for the size of the cache (bytes).

As in ``torch.utils.flop_counter``, a multiplication and an addition count as two operations, and only matrix products
are counted: convolutions, linear layers, attention. All values are for one video; multiply them by the batch size.
"""

from __future__ import annotations

from ca2vdm_cli.config import ModelConfig, SpatialPrefix

_TIMESTEP_FEATURES = 256


def step_flops(config: ModelConfig, context_frames: int) -> int:
    """A denoising step with the cache: a noisy chunk attends to a ring of ``context_frames + chunk_frames`` slots."""
    slots = context_frames + config.chunk_frames
    return _forward(config, clean=0, noisy=config.chunk_frames, keys=slots, prefix=_prefix(config, None))


def per_step_cache_flops(config: ModelConfig, context_frames: int) -> int:
    """A denoising step that also projects the spatial keys and values of the chunk's last frames, to cache them."""
    frames = min(_prefix(config, None), config.chunk_frames)
    spatial = config.depth * 2 * frames * config.tokens_per_frame * config.hidden_size * 2 * config.hidden_size
    return step_flops(config, context_frames) + spatial


def write_flops(config: ModelConfig, context_frames: int, frames: int) -> int:
    """The clean forward that writes ``frames`` frames to the cache; the last block stops at its keys and values."""
    slots = context_frames + config.chunk_frames
    return _forward(config, clean=frames, noisy=0, keys=slots, prefix=0, writes_only=True)


def recompute_flops(config: ModelConfig, seen_frames: int) -> int:
    """A denoising step on ``seen_frames`` clean frames and the noisy chunk. A causal mask saves no operations."""
    frames = seen_frames + config.chunk_frames
    prefix = _prefix(config, seen_frames)
    return _forward(config, clean=seen_frames, noisy=config.chunk_frames, keys=frames, prefix=prefix)


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
    frames = context_frames + config.chunk_frames + _prefix(config, None)
    elements = config.depth * config.tokens_per_frame * 2 * config.hidden_size * frames
    if slid and sinks and config.temporal_positions.value == "rope":
        elements += config.depth * config.tokens_per_frame * config.hidden_size * sinks
    return elements * itemsize + text_bytes(config, itemsize)


def cache_parts(config: ModelConfig, context_frames: int, itemsize: int, *, slid: bool = False) -> dict[str, int]:
    """``cache_bytes`` by what they hold: context, the slots of a chunk, spatial prefix, rope sinks and caption."""
    frame = config.depth * config.tokens_per_frame * 2 * config.hidden_size * itemsize
    parts = {
        "context": context_frames * frame,
        "chunk": config.chunk_frames * frame,
        "prefix": _prefix(config, None) * frame,
        "caption": text_bytes(config, itemsize),
    }
    return parts | {"sinks": cache_bytes(config, context_frames, itemsize, slid=slid) - sum(parts.values())}


def text_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of the caption's keys and values in the cache, and of its mask, one byte per token."""
    return config.depth * config.text_tokens * 2 * config.hidden_size * itemsize + config.text_tokens


def largest_window(config: ModelConfig, budget: int, itemsize: int) -> int:
    """The longest window, in frames, whose cache takes at most ``budget`` bytes; 0 if none fits."""
    frame = cache_bytes(config, 1, itemsize, slid=True) - cache_bytes(config, 0, itemsize, slid=True)
    return max(0, (budget - cache_bytes(config, 0, itemsize, slid=True)) // frame)


def _prefix(config: ModelConfig, clean: int | None) -> int:
    """Frames that prefix-enhanced attention looks at: all slots of the cache, or as many as ``clean`` frames fill."""
    return config.spatial_slots if clean is None else min(config.spatial_slots, clean)


def _forward(config: ModelConfig, *, clean: int, noisy: int, keys: int, prefix: int, writes_only: bool = False) -> int:
    """One forward.

    Args:
        clean, noisy: frames that go through the network.
        keys: frames that a temporal query attends to: those of the forward, or the slots of the ring.
        prefix: clean frames that noisy ones attend to in prefix-enhanced spatial attention.
        writes_only: stop at the last block's keys and values.
    """
    frames, s, d = clean + noisy, config.tokens_per_frame, config.hidden_size
    tokens, hidden = frames * s, int(d * config.mlp_ratio)
    patch = config.patch_size**2

    embed = 2 * tokens * config.in_channels * patch * d
    timesteps = (clean > 0) + (noisy > 0)
    embed += timesteps * 2 * d * (_TIMESTEP_FEATURES + d) + frames * 2 * d * 6 * d

    spatial = 2 * tokens * 4 * d * d + 4 * tokens * s * d
    if config.spatial_prefix is not SpatialPrefix.NONE:
        spatial += clean * s * (2 * 4 * d * d + 4 * s * d)  # to its own tokens, or to the first frame
        if prefix:
            spatial += noisy * s * (2 * 2 * d * d + 4 * prefix * s * d)  # queries and output projection
    temporal = 2 * tokens * 4 * d * d + 4 * tokens * keys * d
    merge = 2 * tokens * (d + 1) * d if config.mask_channel else 0

    def rest(count: int) -> int:
        """Text attention and MLP for ``count`` tokens."""
        text = 2 * 2 * d * d + 4 * config.text_tokens * d if config.text_channels else 0
        return count * (text + 2 * 2 * d * hidden)

    total = embed + merge + (config.depth - 1) * (spatial + temporal + rest(tokens)) + spatial
    if writes_only:
        return total + 2 * tokens * 2 * d * d
    last = noisy * s  # tokens that reach the end: the last block needs only temporal keys and values of clean ones
    final = 2 * last * d * patch * config.out_channels
    return total + 2 * (tokens + last) * 2 * d * d + 4 * last * keys * d + rest(last) + final
