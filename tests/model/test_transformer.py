"""The network: which frames see each other, what its parts do, and how a new one is initialized.

Window of 6 frames, chunks of 2 (see conftest.py). Shapes: latents (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ca2vdm_cli.config import ModelConfig, SpatialPrefix, TemporalPositions
from ca2vdm_cli.model import layers
from ca2vdm_cli.model.kv_cache import KVCache
from ca2vdm_cli.model.layers import gelu
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import backends

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., CausalVideoTransformer]

EVERYTHING = {"mask_channel": True, "text_channels": 5, "text_tokens": 3}
"""Every optional component; the prefix is on by default."""


def latents(frames: int, videos: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(videos, 4, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


def caption(model: CausalVideoTransformer) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, model.config.text_tokens, model.config.text_channels)
    return torch.randn(shape, generator=generator), torch.tensor([[1, 1, 0], [1, 1, 1]])


def denoise(model: CausalVideoTransformer, frames: Tensor, clean: int, timestep: int = 500) -> Tensor:
    """One forward without a cache over ``clean`` frames and a noisy chunk after them."""
    noisy = frames.shape[2] - clean
    plan = model.context_plan(noisy, clean, TemporalWindow(model.config))
    text = model.text_keys_values(*caption(model)) if model.config.text_channels else []
    return model(frames, torch.full((2,), timestep), plan, text=text)


def changed(frames: Tensor, frame: int) -> Tensor:
    out = frames.clone()
    out[:, :, frame] += 1
    return out


# ----------------------------------------------------------------------------------- which frames see each other
@pytest.mark.parametrize("prefix", SpatialPrefix)
@pytest.mark.parametrize("clean", [0, 1, 4])
def test_a_noisy_frame_sees_earlier_frames_only(prefix: SpatialPrefix, clean: int, make_model: MakeModel) -> None:
    """Clean frames are causal too; otherwise a later frame would be visible through a clean frame in between."""
    model, frames = make_model(spatial_prefix=prefix, chunk_frames=3), latents(clean + 3)
    usual = denoise(model, frames, clean)
    assert usual.shape == (2, 8, 3, 4, 4)
    for frame in range(clean + 3):
        apart = (denoise(model, changed(frames, frame), clean) - usual).abs().amax((0, 1, 3, 4))  # (3,)
        unchanged = max(0, frame - clean)
        assert torch.equal(apart[:unchanged], torch.zeros(unchanged))
        assert (apart[unchanged:] > 1e-3).all()


@pytest.mark.parametrize("clean", [0, 1, 4])
def test_partial_noisy_frames_see_each_other_and_clean_ones_do_not_see_them(clean: int, make_model: MakeModel) -> None:
    model, frames = make_model(causality="partial", chunk_frames=3), latents(clean + 3)
    usual = denoise(model, frames, clean)
    for frame in range(clean, clean + 3):
        apart = (denoise(model, changed(frames, frame), clean) - usual).abs().amax((0, 1, 3, 4))
        assert (apart > 1e-3).all()
    if clean:  # a cache, which has no noisy frames, gives the same output
        cache = KVCache(model.config, 2)
        model.write(frames[:, :, :clean], cache)
        again = model(frames[:, :, clean:], torch.full((2,), 500), cache.plan(3, clean=False), cache)
        assert torch.allclose(again, usual, atol=1e-5)


@pytest.mark.parametrize("causality", ["causal", "partial"])
@pytest.mark.parametrize("prefix", SpatialPrefix)
def test_a_clean_frames_keys_depend_on_earlier_frames_only(
    prefix: SpatialPrefix, causality: str, make_model: MakeModel
) -> None:
    model = make_model(spatial_prefix=prefix, causality=causality)

    def keys(frames: Tensor) -> Tensor:
        cache = KVCache(model.config, 2)
        model.write(frames, cache)
        return cache.layers[1].temporal_k  # (B*S, H, R, E), the second layer's

    usual = keys(latents(5))
    for frame in range(5):
        apart = (keys(changed(latents(5), frame)) - usual).abs().amax((0, 1, 3))[:5]
        assert torch.equal(apart[:frame], torch.zeros(frame))
        assert (apart[frame:] > 1e-3).all()


@pytest.mark.parametrize("prefix", SpatialPrefix)
def test_only_in_first_frame_mode_do_clean_frames_look_at_another(prefix: SpatialPrefix, make_model: MakeModel) -> None:
    """In the first layer, before temporal attention: at the first frame, whether in the same write or earlier."""
    model = make_model(depth=1, spatial_prefix=prefix)

    def keys(frames: Tensor, first_write: int) -> Tensor:
        cache = KVCache(model.config, 2)
        model.write(frames[:, :, :first_write], cache)
        model.write(frames[:, :, first_write:], cache)
        return cache.layers[0].temporal_k

    for first_write in (1, 3):
        usual = keys(latents(5), first_write)
        for frame in range(5):
            apart = (keys(changed(latents(5), frame), first_write) - usual).abs().amax((0, 1, 3))[:5]
            others = frame == 0 and prefix is SpatialPrefix.FIRST_FRAME
            assert [bool(each > 1e-3) for each in apart] == [others or f == frame for f in range(5)]


def test_one_cache_serves_all_timesteps(make_model: MakeModel) -> None:
    """Cache sharing: denoising at any timestep leaves the clean frames' keys unchanged."""
    model, cache = make_model(), KVCache(make_model().config, 2)
    model.write(latents(4), cache)
    before = [(layer.temporal_k[:, :, :4].clone(), layer.temporal_v[:, :, :4].clone()) for layer in cache.layers]
    plan = cache.plan(2, clean=False)
    answers = [model(latents(2, seed=3), torch.full((2,), t), plan, cache) for t in (999, 500, 0, 999)]
    for layer, (k, v) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.temporal_k[:, :, :4], k) and torch.equal(layer.temporal_v[:, :, :4], v)
    assert torch.equal(answers[0], answers[3]) and not torch.allclose(answers[0], answers[1], atol=1e-3)
    assert cache.frames == 4


def test_padding_of_a_caption_is_ignored(make_model: MakeModel) -> None:
    model = make_model(**EVERYTHING)
    embedding, mask = caption(model)
    plan = model.context_plan(2, 2, TemporalWindow(model.config))

    def answer(video: int, token: int) -> Tensor:
        different = embedding.clone()
        different[video, token] += 1
        return model(latents(4), torch.full((2,), 500), plan, text=model.text_keys_values(different, mask))

    usual = model(latents(4), torch.full((2,), 500), plan, text=model.text_keys_values(embedding, mask))
    assert torch.equal(answer(0, 2), usual)
    assert not torch.allclose(answer(0, 1), usual, atol=1e-3)
    assert torch.equal(answer(0, 1)[1], usual[1])


# ------------------------------------------------------------------------------------------------------------- parts
@pytest.mark.parametrize("strategy", ["cached", "recompute"])
@pytest.mark.parametrize("positions", TemporalPositions)
def test_every_weight_matters(strategy: str, positions: TemporalPositions, make_model: MakeModel) -> None:
    """The other tests would not notice a branch that contributes nothing."""
    model = make_model(temporal_positions=positions, **EVERYTHING)

    def answer() -> Tensor:
        if strategy == "recompute":
            return denoise(model, latents(6), 4)
        cache = KVCache(model.config, 2)
        cache.text = model.text_keys_values(*caption(model))
        model.write(latents(6)[:, :, :4], cache)
        return model(latents(6)[:, :, 4:], torch.full((2,), 500), cache.plan(2, clean=False), cache)

    usual = answer()
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        parameter.zero_()
        assert (answer() - usual).abs().max() > 1e-3, name
        parameter.copy_(before)


def test_the_mask_channel_distinguishes_clean_and_noisy_frames(make_model: MakeModel) -> None:
    """The same frame at timestep 0, as a clean frame and as a noisy one, differs only in the mask."""
    for mask_channel in (False, True):
        model = make_model(depth=1, mask_channel=mask_channel, spatial_prefix="none")
        clean, noisy = KVCache(model.config, 2), KVCache(model.config, 2)
        model.write(latents(2), clean)
        model(latents(2), torch.zeros(2), noisy.plan(2, clean=False), noisy)
        same = torch.allclose(clean.layers[0].temporal_k, noisy.layers[0].temporal_k, atol=1e-6)
        assert same is not mask_channel


def test_a_write_returns_no_frames_and_stops_at_the_last_keys(make_model: MakeModel) -> None:
    model, calls = make_model(), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    cache = KVCache(model.config, 2)
    out = model(latents(2), torch.zeros(2), cache.plan(2, clean=True), cache)
    assert out.shape == (2, 8, 0, 4, 4) and cache.frames == 2
    write, calls = calls, 0
    model(latents(2), torch.zeros(2), cache.plan(2, clean=False), cache)
    assert write < calls


@pytest.mark.parametrize("learn_variance", [True, False])
def test_output_channels(learn_variance: bool, make_model: MakeModel) -> None:
    out = denoise(make_model(learn_variance=learn_variance), latents(4), 2)
    assert out.shape == (2, 8 if learn_variance else 4, 2, 4, 4)


def test_bfloat16_stays_near_float32(make_model: MakeModel) -> None:
    """Eight bits of mantissa, rounded about fifty times: about a hundredth of the largest value."""
    usual = denoise(make_model(temporal_positions="rope", **EVERYTHING), latents(6), 4)
    rough = denoise(make_model(temporal_positions="rope", **EVERYTHING).to(torch.bfloat16), latents(6), 4)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - usual).abs().max() < 0.05 * usual.abs().max()


def test_every_block_is_prepared_by_the_backend(make_config: MakeConfig) -> None:
    prepared: list[nn.Module] = []

    class Recording(type(backends["eager"])):  # type: ignore[misc]
        def prepare(self, block: nn.Module) -> None:
            prepared.append(block)

    model = CausalVideoTransformer(make_config(), Recording())
    assert prepared == list(model.blocks)


# -------------------------------------------------------------------------------------------------------- a new model
def test_a_new_model_predicts_zero_and_its_added_branches_are_silent(make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    model = CausalVideoTransformer(make_config(mask_channel=True), backends["eager"]).eval()
    usual = denoise(model, latents(6), 4)
    assert torch.equal(usual, torch.zeros(2, 8, 2, 4, 4))
    nn.init.normal_(model.final_layer.linear.weight)
    with torch.no_grad():
        usual, other = denoise(model, latents(6), 4), denoise(model, changed(latents(6), 2), 4)
    assert usual.abs().max() > 0.1
    assert torch.equal(usual, other), "a frame of the context has an effect before any training"


def test_every_weight_is_trained(make_model: MakeModel) -> None:
    model = make_model(**EVERYTHING).requires_grad_(True)
    denoise(model, latents(6), 4).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# ------------------------------------------------------------------------------------------------------ activation
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_gelu_is_pytorchs_with_and_without_a_gradient(
    dtype: torch.dtype, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "GELU_VALUES", 1000)
    x = torch.linspace(-12, 12, 4801, dtype=dtype)
    expected = nn.functional.gelu(x, approximate="tanh")
    assert torch.allclose(gelu(x), expected, rtol=0, atol=atol)
    again = x.clone().requires_grad_(True)
    assert torch.equal(gelu(again), expected)
    gelu(again).sum().backward()
    assert again.grad is not None
    assert float(again.grad[-1]) == 1
