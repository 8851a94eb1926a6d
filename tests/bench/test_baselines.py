"""The benchmark's baselines: each sees and stores the right frames.

Window of 6 frames, chunks of 2 (see conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ca2vdm_cli.bench.baselines import PerStepCachedContext
from ca2vdm_cli.generate.context import Context, contexts, make_context
from ca2vdm_cli.generate.loop import stored_caption
from ca2vdm_cli.model.frame_plan import sequence_plan
from ca2vdm_cli.model.layers import PrefixAttention
from ca2vdm_cli.model.transformer import CausalVideoTransformer

MakeModel = Callable[..., CausalVideoTransformer]
WINDOW, CHUNK = 6, 2
TOLERANCE = 1e-5


def latents(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 4, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


def answer(context: Context, finished: Tensor, noisy: Tensor, timestep: int = 300) -> Tensor:
    """The network's output for a noisy chunk after these frames, which are appended chunk by chunk."""
    for piece in finished.split(CHUNK, dim=2):
        context.append(piece)
    context.open_chunk()
    return context.predict(noisy, torch.tensor([timestep]))


def make(model: CausalVideoTransformer, kind: str, **options: Any) -> Context:
    return make_context(model, kind, 1, timesteps=[900, 300], **options)


def changed(frames: Tensor, which: int) -> Tensor:
    out = frames.clone()
    out[:, :, which] += 1
    return out


@pytest.mark.parametrize("kind", ["recompute", "recompute-extendable"])
@pytest.mark.parametrize("seen", [2, 4, 6])
def test_exact_baselines_equal_the_cache_until_the_window_slides(make_model: MakeModel, kind: str, seen: int) -> None:
    model = make_model()
    ours, theirs = (answer(make(model, one), latents(seen), latents(2, 1)) for one in ("cached", kind))
    assert contexts[kind].exact
    assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "sees"),
    [("recompute", False), ("fixed-window", False), ("recompute-extendable", True), ("bidirectional", True)],
)
def test_an_extendable_context_has_no_window(make_model: MakeModel, kind: str, sees: bool) -> None:
    """The first of 10 frames is outside a window of 6."""
    model, finished = make_model(), latents(10)
    first, second = (answer(make(model, kind), frames, latents(2, 1)) for frames in (finished, changed(finished, 0)))
    assert ((first - second).abs().max() > TOLERANCE) == sees
    assert contexts[kind].extendable == sees


@pytest.mark.parametrize("positions", ["cyclic", "rope"])
def test_bidirectional_frames_see_later_ones(make_model: MakeModel, positions: str) -> None:
    """The chunk's first frame depends on its second, which it never does under a causal mask."""
    model = make_model(temporal_positions=positions)
    for kind in ("bidirectional", "recompute-extendable"):
        noisy = latents(2, 1)
        first, second = (
            answer(make(model, kind), latents(4), frames)[:, :, 0] for frames in (noisy, changed(noisy, 1))
        )
        assert ((first - second).abs().max() > 1e-3) == (kind == "bidirectional")


def test_clean_frames_see_noisy_ones_when_bidirectional(make_model: MakeModel) -> None:
    """Their features at the second block depend on the noisy chunk, so they can't be cached."""
    model = make_model()
    seen: list[Tensor] = []
    attention = model.get_submodule("blocks.1.attn")
    attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][:, :4].clone()))
    for kind, depends in (("bidirectional", True), ("recompute-extendable", False)):
        for noisy in (latents(2, 1), latents(2, 2)):
            answer(make(model, kind), latents(4), noisy)
        before, after = seen[-2:]
        assert ((before - after).abs().max() > 1e-3) == depends


@pytest.mark.parametrize(("prefix", "fixed", "sees"), [(1, None, 2), (3, None, 3), (1, 4, 4)])
def test_fixed_window_is_short(make_model: MakeModel, prefix: int, fixed: int | None, sees: int) -> None:
    """A chunk of 2, or the spatial prefix if that is longer, or as requested."""
    model, noisy = make_model(spatial_prefix_frames=prefix), latents(2, 1)
    ours = answer(make(model, "fixed-window", fixed_frames=fixed), latents(8), noisy)
    same = answer(make(model, "recompute", context_frames=sees), latents(8), noisy)
    assert torch.equal(ours, same)


def test_a_step_reads_the_keys_of_the_same_step(make_model: MakeModel) -> None:
    """A chunk's step equals one forward over all chunks, all at that step's noise level."""
    model = make_model(spatial_prefix="none")
    context = make(model, "per-step-cache")
    noisy = {t: latents(6, seed=t) for t in (900, 300)}
    for i in range(3):
        context.open_chunk()
        for t, frames in noisy.items():
            chunk = frames[:, :, CHUNK * i : CHUNK * (i + 1)]
            output = context.predict(chunk, torch.tensor([t]))
            plan = sequence_plan(model.config, 0, CHUNK * (i + 1), torch.arange(CHUNK * (i + 1)), model.device)
            whole = model(frames[:, :, : CHUNK * (i + 1)], torch.tensor([t]), plan)
            assert (output - whole[:, :, -CHUNK:]).abs().max() < TOLERANCE
        context.append(latents(CHUNK, seed=i))  # ignored
    assert context.frames == 6


@pytest.mark.parametrize("prefix", ["prev_frames_k", "first_frame"])
def test_every_step_has_its_own_spatial_prefix(make_model: MakeModel, prefix: str) -> None:
    model = make_model(spatial_prefix=prefix)
    context = make_context(model, "per-step-cache", 1, timesteps=[900, 300])
    assert isinstance(context, PerStepCachedContext)
    seen: list[Tensor] = []
    attention = model.get_submodule("blocks.1.attn_cf")
    assert isinstance(attention, PrefixAttention)
    watch = attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    for i in range(3):
        context.open_chunk()
        context.predict(latents(CHUNK, seed=10 + i), torch.tensor([900]))
        context.append(latents(CHUNK))
    watch.remove()
    tokens = torch.cat(seen, dim=1)  # (1, 6, S, D), the second block's input at timestep 900
    numbers = [0] if prefix == "first_frame" else [3, 4, 5]  # in slots f mod 3
    keys, values = attention.project(tokens[:, numbers], 1, 3)  # (1, K, S, H, E)
    cache = context.step_caches[0].layers[1]
    assert torch.allclose(cache.spatial_k, keys.permute(0, 3, 1, 2, 4), atol=TOLERANCE)
    assert torch.allclose(cache.spatial_v, values.permute(0, 3, 1, 2, 4), atol=TOLERANCE)
    assert not context.step_caches[1].layers[1].spatial_k.any(), "the other step has not been taken"


def test_per_step_cache_leaves_the_model_unchanged(make_model: MakeModel) -> None:
    model = make_model()
    before = answer(make(model, "cached"), latents(4), latents(2, 1))
    answer(make(model, "per-step-cache"), latents(4), latents(2, 1))
    assert torch.equal(before, answer(make(model, "cached"), latents(4), latents(2, 1)))


def test_per_step_cache_keeps_a_cache_for_every_step(make_model: MakeModel) -> None:
    model = make_model()
    sizes = {
        steps: make_context(model, "per-step-cache", 1, timesteps=list(range(steps))).nbytes for steps in (1, 2, 50)
    }
    assert sizes[1] == make_context(model, "cached", 1, timesteps=[]).nbytes
    assert sizes == {steps: steps * sizes[1] for steps in sizes}


def test_the_steps_share_a_caption(make_model: MakeModel) -> None:
    model = make_model(text_channels=5, text_tokens=5)
    caption = stored_caption(model, 1)
    assert caption is not None
    sizes = []
    for steps in (1, 2):
        context = make_context(model, "per-step-cache", 1, timesteps=list(range(steps)))
        frames = context.nbytes
        context.set_text(model.text_keys_values(caption.embedding, caption.mask))
        sizes.append(context.nbytes - frames)
    assert sizes[0] == sizes[1] > 0


def test_given_frames_are_in_every_cache(make_model: MakeModel) -> None:
    """Before the first chunk, every step of per-step-cache sees what the shared cache holds."""
    model = make_model()
    ours = answer(make(model, "cached"), latents(5), latents(2, 1))
    for timestep in (900, 300):
        theirs = make(model, "per-step-cache")
        same = answer(make(model, "cached"), latents(5), latents(2, 1), timestep)
        output = answer(theirs, latents(5), latents(2, 1), timestep)
        assert torch.equal(output, same)
        assert torch.equal(output, ours) == (timestep == 300)


@pytest.mark.parametrize("kind", contexts)
def test_every_baseline_supports_text(make_model: MakeModel, kind: str) -> None:
    model = make_model(text_channels=5, text_tokens=5, mask_channel=True)
    caption = stored_caption(model, 1)
    assert caption is not None
    answers = []
    for scale in (1.0, 3.0):
        context = make(model, kind)
        context.set_text(model.text_keys_values(scale * caption.embedding, caption.mask))
        answers.append(answer(context, latents(8), latents(2, 1)))
    assert (answers[0] - answers[1]).abs().max() > 1e-3
