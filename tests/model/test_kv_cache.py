"""The cache: reading it equals recomputing, nothing in it moves or grows, and frames are evicted on time.

Window of 6 frames, chunks of 2 (see conftest.py). Shapes: latents (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from command_kit import STRATEGIES
from torch import Tensor

from ca2vdm_cli.config import Causality, ModelConfig, SpatialPrefix, TemporalPositions
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import CachedContext, Context, make_context
from ca2vdm_cli.model.kv_cache import KVCache
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., CausalVideoTransformer]

VARIANTS = [
    pytest.param(
        {
            "temporal_positions": positions,
            "spatial_prefix": prefix,
            "causality": causality,
            "mask_channel": mask,
            "text_channels": text,
            "text_tokens": text,
        },
        id="-".join([positions.value, prefix.value, causality.value, *["mask"] * mask, *["text"] * (text > 0)]),
    )
    for positions, prefix, causality, mask, text in product(
        TemporalPositions, SpatialPrefix, Causality, (False, True), (0, 5)
    )
]
TOLERANCE = 1e-5
"""Largest difference between two orders of summation in float32. Outputs are about 1; a wrong frame costs 0.01."""


def latents(frames: int, videos: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(videos, 4, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


def context_of(model: CausalVideoTransformer, strategy: str, videos: int = 2, **window: Any) -> Context:
    """An empty context; for models with text, with a caption that has one token of padding."""
    context = make_context(model, strategy, videos, **window)
    if model.config.text_channels:
        generator = torch.Generator().manual_seed(1)
        caption = torch.randn(videos, model.config.text_tokens, model.config.text_channels, generator=generator)
        mask = torch.ones(caption.shape[:2])
        mask[0, -1] = 0
        context.set_text(model.text_keys_values(caption, mask))
    return context


def predict(context: Context, videos: int = 2) -> Tensor:
    """The model's output for a fixed noisy chunk after this context."""
    context.open_chunk()
    return context.predict(latents(2, videos, seed=2), torch.tensor([700, 20])[:videos])


def append_in(context: Context, frames: Tensor, pieces: Sequence[int]) -> None:
    assert sum(pieces) == frames.shape[2]
    for piece in frames.split(list(pieces), dim=2):
        context.append(piece)


def cached_keys(context: Context) -> list[Tensor]:
    """Copies of every buffer of a cached context."""
    assert isinstance(context, CachedContext)
    return [t.clone() for layer in context.cache.layers for t in layer]


# ---------------------------------------------------------------------------------------- cached equals recomputed
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_recomputed_until_the_window_slides(variant: dict[str, Any], make_model: MakeModel) -> None:
    """After 0, 1, 2, 5 and 6 frames: from an empty context to a full window."""
    model = make_model(**variant)
    cached, recomputed = context_of(model, "cached"), context_of(model, "recompute")
    before = None
    for piece in latents(6).split([0, 1, 1, 3, 1], dim=2):
        if piece.shape[2]:
            cached.append(piece)
            recomputed.append(piece)
        ours = predict(cached)
        assert (ours - predict(recomputed)).abs().max() < TOLERANCE
        assert before is None or (ours - before).abs().max() > 1e-2, "the context made no difference"
        before = ours


@pytest.mark.parametrize("prefix", SpatialPrefix)
@pytest.mark.parametrize("pieces", [(5,), (1, 1, 1, 1, 1), (2, 3), (4, 1), (1, 2, 2)])
def test_it_does_not_matter_how_a_context_is_split_into_writes(
    prefix: SpatialPrefix, pieces: tuple[int, ...], make_model: MakeModel
) -> None:
    model = make_model(spatial_prefix=prefix, temporal_positions="rope")
    whole, cut = context_of(model, "cached"), context_of(model, "cached")
    append_in(whole, latents(6), [6])
    append_in(cut, latents(6), [*pieces, 1])
    for a, b in zip(cached_keys(whole), cached_keys(cut), strict=True):
        assert torch.allclose(a, b, atol=TOLERANCE)
    assert torch.allclose(predict(whole), predict(cut), atol=TOLERANCE)


@pytest.mark.parametrize("positions", TemporalPositions)
@pytest.mark.parametrize(
    ("prefix", "window"),
    [
        *product(("none", "prev_frames_k"), ({}, {"context_frames": 4}, {"sink_frames": 2}, {"sink_frames": 3})),
        ("first_frame", {"sink_frames": 2}),  # without sinks, recomputing loses it when the window slides
        ("first_frame", {"sink_frames": 1, "context_frames": 4}),
    ],
)
def test_with_one_layer_cached_always_equals_recomputed(
    prefix: str, window: dict[str, int], positions: TemporalPositions, make_model: MakeModel
) -> None:
    """In a model with one layer, a frame's keys depend on that frame alone, so both strategies see the same even after
    the window has slid, and any error in slots, positions, sinks or masks shows. (With more layers, cached frames
    remember frames that have left the window.)"""
    model = make_model(depth=1, spatial_prefix=prefix, temporal_positions=positions, position_table=40)
    cached, recomputed = (context_of(model, strategy, **window) for strategy in STRATEGIES)
    for piece in latents(36).split([1, 2, 2, 1, 2, 1, 1, 2, 2, 2, 1, 1, 2, 1, 2, 2, 2, 1, 2, 2, 2, 2], dim=2):
        cached.append(piece)
        recomputed.append(piece)
        assert (predict(cached) - predict(recomputed)).abs().max() < TOLERANCE
    assert cached.frames == recomputed.frames == 36


def test_a_chunk_sees_the_window_and_nothing_else(make_model: MakeModel) -> None:
    """A frame matters to the next chunk if and only if it is a sink or one of the last frames."""
    model = make_model(depth=1, spatial_prefix="none")
    for strategy, (sinks, expected) in product(STRATEGIES, [(0, {5, 6, 7, 8, 9, 10}), (2, {0, 1, 7, 8, 9, 10})]):

        def answer(frames: Tensor, strategy: str = strategy, sinks: int = sinks) -> Tensor:
            context = context_of(model, strategy, sink_frames=sinks)
            append_in(context, frames, [1, 2, 2, 2, 2, 2])
            return predict(context)

        seen, usual = set(), answer(latents(11))
        for frame in range(11):
            changed = latents(11)
            changed[:, :, frame] += 1
            if not torch.equal(answer(changed), usual):
                seen.add(frame)
        assert seen == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_first_frame_mode_sees_the_first_frame(strategy: str, make_model: MakeModel) -> None:
    """Every frame looks at it, and later writes still fill the temporal cache."""
    model = make_model(spatial_prefix="first_frame")

    def answer(changed_frame: int | None = None) -> Tensor:
        frames, context = latents(6), context_of(model, strategy)
        if changed_frame is not None:
            frames[:, :, changed_frame] += 1
        append_in(context, frames, [1, 2, 2, 1])
        return predict(context)

    usual = answer()
    assert all((answer(frame) - usual).abs().max() > 1e-3 for frame in range(6))


@pytest.mark.parametrize("text", [0, 5])
def test_a_video_in_a_batch_equals_the_same_video_alone(text: int, make_model: MakeModel) -> None:
    model = make_model(text_channels=text, text_tokens=text)
    together = context_of(model, "cached")
    append_in(together, latents(9), [1, 2, 2, 2, 2])
    for video in range(2):
        alone = make_context(model, "cached", 1)
        assert isinstance(together, CachedContext)
        alone.set_text([type(t)(*(part[video : video + 1] for part in t)) for t in together.cache.text])
        append_in(alone, latents(9)[video : video + 1], [1, 2, 2, 2, 2])
        alone.open_chunk()
        one = alone.predict(latents(2, seed=2)[video : video + 1], torch.tensor([[700], [20]][video]))
        assert torch.allclose(one, predict(together)[video : video + 1], atol=TOLERANCE)


# --------------------------------------------------------------------------------------------------- a fixed queue
def test_nothing_moves_or_grows(make_model: MakeModel) -> None:
    """Buffers stay in place, and a cached frame's keys are unchanged until its slot is reused."""
    context = context_of(make_model(temporal_positions="rope"), "cached")
    assert isinstance(context, CachedContext)
    layer, window = context.cache.layers[1], context.cache.window
    addresses = [t.data_ptr() for each in context.cache.layers for t in each]
    written: dict[int, Tensor] = {}
    for start in range(0, 40, 2):
        predict(context)
        context.append(latents(2, seed=start))
        for frame in (start, start + 1):
            written[frame] = layer.temporal_k[:, :, window.slot(frame)].clone()
        seen = window.context(start + 2)
        assert seen == list(range(max(0, start - 4), start + 2))
        assert len({window.slot(frame) for frame in seen}) == len(seen)
        for frame in seen:
            assert torch.equal(layer.temporal_k[:, :, window.slot(frame)], written[frame])
    assert [t.data_ptr() for each in context.cache.layers for t in each] == addresses


@pytest.mark.parametrize("positions", TemporalPositions)
def test_sinks_are_never_evicted(positions: TemporalPositions, make_model: MakeModel) -> None:
    model = make_model(temporal_positions=positions, position_table=40, sink_frames=2)
    context = context_of(model, "cached")
    assert isinstance(context, CachedContext)
    append_in(context, latents(6), [1, 2, 2, 1])
    before = [
        (layer.temporal_k[:, :, :2].clone(), layer.temporal_v[:, :, :2].clone()) for layer in context.cache.layers
    ]
    for seed in range(10):
        context.append(latents(2, seed=seed))
    for layer, (k, v) in zip(context.cache.layers, before, strict=True):
        assert torch.equal(layer.temporal_v[:, :, :2], v)
        shifted = positions is TemporalPositions.ROPE  # along with the window
        assert torch.equal(layer.temporal_k[:, :, :2], k) != shifted
        assert torch.allclose(layer.temporal_k[:, :, :2].norm(dim=-1), k.norm(dim=-1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prefix", "prefix_frames"), [("none", 0), ("first_frame", 1), ("prev_frames_k", 3)])
def test_bytes_equal_the_storage_and_the_formula(
    prefix: str, prefix_frames: int, dtype: torch.dtype, make_config: MakeConfig
) -> None:
    config = make_config(spatial_prefix=prefix)
    cache = KVCache(config, 3, dtype=dtype)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for layer in cache.layers for t in layer}
    assert cache.nbytes == sum(storage.nbytes() for storage in storages.values())
    # depth × B × frames × S × 2D × bytes per value
    frame = 2 * 3 * 4 * 2 * 32 * dtype.itemsize
    assert cache.nbytes == frame * (6 + prefix_frames + config.chunk_frames)  # the window, the prefix, a chunk's slots
    assert KVCache(config, 3, context_frames=4, dtype=dtype).nbytes == cache.nbytes - 2 * frame


def test_bytes_include_the_caption(make_model: MakeModel) -> None:
    model = make_model(text_channels=5, text_tokens=5)
    keys_values = 2 * 2 * 5 * 2 * 32 * 4  # depth × B × M × 2D × bytes
    mask = 2 * 5  # one for all blocks
    without_text = make_context(model, "cached", 2).nbytes
    assert context_of(model, "cached").nbytes == without_text + keys_values + mask


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("prefix", SpatialPrefix)
def test_unused_slots_have_no_effect(prefix: SpatialPrefix, backend: str, make_model: MakeModel) -> None:
    """Old values in slots outside the window get no weight. They must be finite, since 0 · nan is nan, so new buffers
    are zeroed."""
    model = make_model(backend, spatial_prefix=prefix)
    clean, dirty = context_of(model, "cached"), context_of(model, "cached")
    assert isinstance(dirty, CachedContext)
    for layer in dirty.cache.layers:
        for buffer in layer:
            buffer.fill_(1e4)
    for frames in (0, 1, 1, 2, 2, 2, 2):
        if frames:
            for context in (clean, dirty):
                context.append(latents(frames))
        assert torch.allclose(predict(dirty), predict(clean), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- positions
@pytest.mark.parametrize("positions", TemporalPositions)
def test_the_order_of_frames_matters(positions: TemporalPositions, make_model: MakeModel) -> None:
    """With one layer and no spatial prefix, cached frames differ only by their positions."""
    model = make_model(depth=1, spatial_prefix="none", temporal_positions=positions)
    answers = []
    for order in ([0, 1, 2, 3], [3, 1, 2, 0]):
        context = context_of(model, "cached")
        context.append(latents(4)[:, :, order])
        answers.append(predict(context))
    assert (answers[0] - answers[1]).abs().max() > 1e-2


def test_rope_depends_only_on_differences_however_long_the_video(make_model: MakeModel) -> None:
    """The output at frame 100000 equals that at frame 0; float32 angles would be off by up to 0.008."""
    model = make_model(depth=1, spatial_prefix="none", temporal_positions="rope")
    answers = []
    for first in (0, 100_000):
        context = context_of(model, "cached")
        assert isinstance(context, CachedContext)
        context.cache.frames = first
        append_in(context, latents(6), [2, 2, 2])
        answers.append(predict(context))
    assert (answers[0] - answers[1]).abs().max() < TOLERANCE


def test_cyclic_positions_repeat_with_the_table(make_config: MakeConfig) -> None:
    plain = TemporalWindow(make_config())
    assert [plain.position(frame, frame) for frame in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert [plain.slot(frame) for frame in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    sinks = TemporalWindow(make_config(), sink_frames=2)
    assert [sinks.position(frame, frame) for frame in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 2, 3]
    for start in range(30):
        for window in (plain, sinks):
            chunk = [*window.context(start), start, start + 1]
            assert len({window.position(frame, start) for frame in chunk}) == len(chunk)


def test_rope_sinks_stay_directly_before_the_window(make_config: MakeConfig) -> None:
    window = TemporalWindow(make_config(temporal_positions="rope"), sink_frames=2)
    for start in range(2, 30, 3):
        positions = [window.position(frame, start) for frame in [*window.context(start), start, start + 1]]
        assert positions == list(range(start + 2 - len(positions), start + 2))


# ------------------------------------------------------------------------------------------------------------- errors
def test_impossible_windows_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UsageError, match="context_frames: 7 is more than the 6 of the model's position table"):
        TemporalWindow(make_config(), context_frames=7)
    with pytest.raises(UsageError, match="context_frames: 0 must be at least 1"):
        TemporalWindow(make_config(), context_frames=0)
    with pytest.raises(UsageError, match="context_frames: 6 must leave room, beside 5 sink frames"):
        TemporalWindow(make_config(), sink_frames=5)
    TemporalWindow(make_config(temporal_positions="rope"), context_frames=60)


def test_frames_that_do_not_fit_are_refused(make_model: MakeModel) -> None:
    context = context_of(make_model(), "cached")
    with pytest.raises(UsageError, match="9 frames do not fit a cache of 8 slots that holds 0"):
        context.append(latents(9))
    context.append(latents(6))
    with pytest.raises(UsageError, match="3 frames do not fit a cache of 8 slots that holds 6"):
        context.append(latents(3))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_absolute_positions_end(strategy: str, make_model: MakeModel) -> None:
    context = context_of(make_model(temporal_positions="absolute"), strategy)
    append_in(context, latents(6), [6])
    predict(context)
    context.append(latents(2))
    with pytest.raises(UsageError, match="absolute positions allow at most 8 frames in whole chunks of 2"):
        context.open_chunk()
