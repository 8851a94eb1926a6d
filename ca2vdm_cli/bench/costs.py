"""What a forward costs, by formula: floating-point operations, and bytes of the cache.

A multiplication and an addition count as two operations; only matrix products are counted (convolutions, linear layers,
attention), as ``torch.utils.flop_counter`` does. All numbers are for one video; a batch multiplies them.

Letters: T frames of the forward (P clean, L noisy), S tokens a frame, D width, K keys that a temporal query is
multiplied with (T without a cache, the R slots of the ring with one), k frames of the spatial prefix, M text tokens.
"""

from __future__ import annotations

from ca2vdm_cli.config import ModelConfig, SpatialPrefix

_TIMESTEP_FEATURES = 256


def step_flops(config: ModelConfig, context_frames: int) -> int:
    """A denoising step with the cache: the noisy chunk, and a ring of ``context_frames + chunk_frames`` slots."""
    slots = context_frames + config.chunk_frames
    return _forward(config, clean=0, noisy=config.chunk_frames, keys=slots, looked_at=_prefix(config, None))


def per_step_cache_flops(config: ModelConfig, context_frames: int) -> int:
    """A denoising step whose keys and values are kept: spatial ones of the chunk's last k frames come on top."""
    kept = min(_prefix(config, None), config.chunk_frames)
    spatial = config.depth * 2 * kept * config.tokens_per_frame * config.hidden_size * 2 * config.hidden_size
    return step_flops(config, context_frames) + spatial


def write_flops(config: ModelConfig, context_frames: int, frames: int) -> int:
    """The clean forward that writes ``frames`` frames to the cache; the last block stops at its keys and values."""
    slots = context_frames + config.chunk_frames
    return _forward(config, clean=frames, noisy=0, keys=slots, looked_at=0, writes_only=True)


def recompute_flops(config: ModelConfig, seen_frames: int) -> int:
    """A denoising step that is fed ``seen_frames`` clean frames with the noisy chunk; a causal mask saves nothing."""
    frames = seen_frames + config.chunk_frames
    looked_at = _prefix(config, seen_frames)
    return _forward(config, clean=seen_frames, noisy=config.chunk_frames, keys=frames, looked_at=looked_at)


def cache_bytes(
    config: ModelConfig, context_frames: int, itemsize: int, *, sink_frames: int | None = None, slid: bool = False
) -> int:
    """Bytes of the cache for one video: the ring, the spatial prefix and the caption's keys and values.

    Args:
        config: the model's sizes.
        context_frames: window in frames.
        itemsize: bytes of a number.
        sink_frames: the model's own by default.
        slid: whether the window has slid, after which rope sinks' keys are kept as first written as well.
    """
    sinks = config.sink_frames if sink_frames is None else sink_frames
    frames = context_frames + config.chunk_frames + _prefix(config, None)
    numbers = config.depth * config.tokens_per_frame * 2 * config.hidden_size * frames
    if slid and sinks and config.temporal_positions.value == "rope":
        numbers += config.depth * config.tokens_per_frame * config.hidden_size * sinks
    return numbers * itemsize + text_bytes(config, itemsize)


def text_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of the caption's keys and values in the cache, and of its mask, a byte a token."""
    return config.depth * config.text_tokens * 2 * config.hidden_size * itemsize + config.text_tokens


def largest_window(config: ModelConfig, budget: int, itemsize: int) -> int:
    """The longest window, in frames, whose cache takes at most ``budget`` bytes; 0 where none fits."""
    frame = cache_bytes(config, 1, itemsize, slid=True) - cache_bytes(config, 0, itemsize, slid=True)
    return max(0, (budget - cache_bytes(config, 0, itemsize, slid=True)) // frame)


def _prefix(config: ModelConfig, clean: int | None) -> int:
    """Frames that prefix-enhanced attention looks at: all slots of the cache, or those it sees of ``clean`` frames."""
    return config.spatial_slots if clean is None else min(config.spatial_slots, clean)


def _forward(
    config: ModelConfig, *, clean: int, noisy: int, keys: int, looked_at: int, writes_only: bool = False
) -> int:
    """One forward. ``looked_at``: clean frames that the noisy ones look at in prefix-enhanced attention."""
    frames, s, d = clean + noisy, config.tokens_per_frame, config.hidden_size
    tokens, hidden = frames * s, int(d * config.mlp_ratio)
    patch = config.patch_size**2

    embed = 2 * tokens * config.in_channels * patch * d
    timesteps = (clean > 0) + (noisy > 0)
    embed += timesteps * 2 * d * (_TIMESTEP_FEATURES + d) + frames * 2 * d * 6 * d

    spatial = 2 * tokens * 4 * d * d + 4 * tokens * s * d
    if config.spatial_prefix is not SpatialPrefix.NONE:
        spatial += clean * s * (2 * 4 * d * d + 4 * s * d)  # a clean frame: its own tokens, or those of the first frame
        if looked_at:
            spatial += noisy * s * (2 * 2 * d * d + 4 * looked_at * s * d)  # queries and output projection
    temporal = 2 * tokens * 4 * d * d + 4 * tokens * keys * d
    merge = 2 * tokens * (d + 1) * d if config.mask_channel else 0

    def rest(count: int) -> int:
        """Text and MLP of so many tokens."""
        text = 2 * 2 * d * d + 4 * config.text_tokens * d if config.text_channels else 0
        return count * (text + 2 * 2 * d * hidden)

    total = embed + merge + (config.depth - 1) * (spatial + temporal + rest(tokens)) + spatial
    if writes_only:
        return total + 2 * tokens * 2 * d * d
    last = noisy * s  # tokens that go on to the end; of the clean ones the last block needs temporal keys and values
    final = 2 * last * d * patch * config.out_channels
    return total + 2 * (tokens + last) * 2 * d * d + 4 * last * keys * d + rest(last) + final
