"""Autoencoders: shapes, properties of the latents, training, and errors that name the mismatch."""

import sys
from pathlib import Path

import pytest
import torch
from command_kit import batch
from safetensors.torch import load_file
from torch.nn import functional as F

from ca2vdm_cli.autoencoder import ConvAutoencoder, LowPassAutoencoder, load_autoencoder, save_autoencoder
from ca2vdm_cli.config import AutoencoderConfig, SyntheticDataConfig, TrainingConfig, VideoConfig
from ca2vdm_cli.data import MovingDigits
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.training.autoencoder import train_autoencoder

VIDEO = VideoConfig(height=32, width=32, channels=1)
SMALL = AutoencoderConfig(kind="conv", downsample=8, base_channels=8)


def digits(count: int, video: VideoConfig = VIDEO, seed: int = 99) -> torch.Tensor:
    """Frames of moving digits, (count, C, H, W)."""
    return batch(MovingDigits(SyntheticDataConfig(), video, seed), 0, count, 1)[:, 0]


def random_autoencoder(config: AutoencoderConfig = SMALL) -> ConvAutoencoder:
    torch.manual_seed(0)
    return ConvAutoencoder(config, VIDEO, 4).eval().requires_grad_(False)


@pytest.mark.parametrize(("downsample", "channels", "in_channels"), [(8, 1, 4), (4, 3, 6), (2, 3, 4)])
def test_shapes_range_and_determinism(downsample: int, channels: int, in_channels: int) -> None:
    config = AutoencoderConfig(kind="conv", downsample=downsample, base_channels=8)
    video = VideoConfig(height=32, width=48, channels=channels)  # type: ignore[arg-type]
    autoencoder = load_autoencoder(config, video, in_channels)
    latents = autoencoder.encode(digits(3, video))
    assert latents.shape == (3, in_channels, 32 // downsample, 48 // downsample)
    frames = autoencoder.decode(5 * latents)
    assert frames.shape == (3, channels, 32, 48) and frames.abs().max() <= 1
    assert torch.equal(autoencoder.decode(5 * latents), frames)
    assert torch.allclose(autoencoder.decode(5 * latents[:1]), frames[:1], atol=1e-5)


def test_latents_shift_with_the_picture() -> None:
    """A shift by whole latent pixels shifts the latents and changes nothing else, which makes them easy to learn."""
    frame = torch.full((1, 1, 192, 192), -1.0)
    frame[..., 72:104, 72:104] = digits(1)
    autoencoder = random_autoencoder()
    latents, shifted = autoencoder.encode(frame), autoencoder.encode(frame.roll((16, 24), (2, 3)))
    assert torch.allclose(latents.roll((2, 3), (2, 3)), shifted, atol=1e-5)


def test_training_helps_is_reproducible_and_normalizes_the_latents() -> None:
    config = AutoencoderConfig(kind="conv", downsample=4, base_channels=8)
    training = TrainingConfig(autoencoder_steps=40, autoencoder_batch_size=8, autoencoder_learning_rate=1e-2)
    source = MovingDigits(SyntheticDataConfig(), VIDEO, seed=0)
    frames = digits(64)
    losses: list[float] = []
    untrained, trained, again = (random_autoencoder(config) for _ in range(3))
    train_autoencoder(trained, source, training, seed=5, progress=lambda step, loss: losses.append(loss))
    train_autoencoder(again, source, training, seed=5)
    assert len(losses) == 40
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in trained.state_dict().items())
    assert not trained.training and not any(parameter.requires_grad for parameter in trained.parameters())
    latents = trained.encode(frames)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.15)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.15)
    error = F.mse_loss(trained.decode(latents), frames)
    assert error < 0.5 * F.mse_loss(untrained.decode(untrained.encode(frames)), frames)
    assert error < 0.7 * frames.var()


def test_lowpass_latents_are_smoothed_frames_and_only_the_decoder_learns() -> None:
    config = AutoencoderConfig(kind="lowpass", downsample=4, base_channels=8)
    training = TrainingConfig(autoencoder_steps=150, autoencoder_batch_size=8, autoencoder_learning_rate=1e-2)
    torch.manual_seed(0)
    autoencoder = LowPassAutoencoder(config, VIDEO, 1)
    assert not list(autoencoder.encoder.parameters())
    flat = torch.rand(2, 1, 1, 1).expand(-1, 1, 32, 32)
    assert torch.allclose(autoencoder.encoder(flat), flat[..., ::4, ::4], atol=1e-6)
    bump = torch.zeros(1, 1, 32, 32)
    bump[..., 13, 17] = 1  # weights of the latent pixels around it depend on their distance
    seen = autoencoder.encoder(bump)[0, 0]
    assert torch.allclose(seen.sum(), torch.tensor(1 / 16)) and seen.argmax() == 3 * 8 + 4

    frames = digits(64)
    train_autoencoder(autoencoder, MovingDigits(SyntheticDataConfig(), VIDEO, seed=0), training)
    latents = autoencoder.encode(frames)
    assert latents.shape == (64, 1, 8, 8)
    assert abs(latents.mean()) < 0.15 and abs(latents.std() - 1) < 0.15
    enlarged = F.interpolate(autoencoder.encoder(frames), size=(32, 32), mode="bilinear")
    assert F.mse_loss(autoencoder.decode(latents), frames) < 0.6 * F.mse_loss(enlarged, frames)


def test_saving_and_loading_rounds_to_half_precision(tmp_path: Path) -> None:
    autoencoder, path, frames = random_autoencoder().train(), tmp_path / "autoencoder.safetensors", digits(2)
    autoencoder.encode(frames)  # measures the latents' mean and variance
    autoencoder.eval()
    save_autoencoder(autoencoder, path)
    loaded = load_autoencoder(SMALL, VIDEO, 4, path)
    assert torch.allclose(loaded.encode(frames), autoencoder.encode(frames), atol=1e-2)
    assert load_file(path)["normalize.running_mean"].dtype == torch.float32
    assert load_file(path)["decoder.0.weight"].dtype == torch.float16
    assert next(iter(loaded.parameters())).dtype == torch.float32


def test_weights_that_do_not_fit_are_refused_with_both_shapes(tmp_path: Path) -> None:
    path = tmp_path / "autoencoder.safetensors"
    save_autoencoder(random_autoencoder(), path)
    with pytest.raises(UserError, match=r"encoder\.9\.weight has shape \(4, 16, 3, 3\), .* needs \(6, 16, 3, 3\)"):
        load_autoencoder(SMALL, VIDEO, 6, path)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_autoencoder(SMALL, VIDEO, 4, path)
    with pytest.raises(UsageError, match="latents only"):
        load_autoencoder(AutoencoderConfig(), VIDEO, 4)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="downsample: 3 must be even"):
        AutoencoderConfig(kind="conv", downsample=3)
    with pytest.raises(ValueError, match="downsample: 5 must be even for the lowpass autoencoder"):
        AutoencoderConfig(kind="lowpass", downsample=5)
    with pytest.raises(UsageError, match=r"model.in_channels: 4 must be video.channels 1"):
        load_preset("tiny", ["autoencoder.kind=lowpass"])
    with pytest.raises(ValueError, match="path: the diffusers autoencoder needs"):
        AutoencoderConfig(kind="diffusers")


def test_shipped_weights_reconstruct_well_even_from_noisy_latents() -> None:
    preset = load_preset("moving-digits")
    config = preset.config
    assert config.video is not None and preset.autoencoder_weights_path is not None
    autoencoder = load_autoencoder(
        config.autoencoder, config.video, config.model.in_channels, preset.autoencoder_weights_path
    )
    assert preset.autoencoder_weights_path.stat().st_size < 4e6
    assert config.synthetic_data is not None
    frames = batch(MovingDigits(config.synthetic_data, config.video, 99), 0, 64, 1)[:, 0]

    def psnr(latents: torch.Tensor) -> float:
        return float(10 * torch.log10(4 / F.mse_loss(autoencoder.decode(latents), frames)))

    latents = autoencoder.encode(frames)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert psnr(latents) > 35.5 and psnr(latents + 0.2 * noise) > 34
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(config.model.in_channels), atol=0.1)


def test_diffusers_autoencoder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    theirs.save_pretrained(tmp_path)
    config = AutoencoderConfig(kind="diffusers", path=str(tmp_path), downsample=2, scale_factor=0.5)
    rgb = VideoConfig(height=32, width=32, channels=3)
    frames = digits(2, rgb)
    with torch.no_grad():
        expected = theirs.encode(frames).latent_dist.mode()
        picture = theirs.decode(expected).sample
    ours = load_autoencoder(config, rgb, 4)
    assert torch.allclose(ours.encode(frames), 0.5 * expected, atol=1e-5)
    assert torch.allclose(ours.decode(0.5 * expected), picture.clamp(-1, 1), atol=1e-5)
    gray = load_autoencoder(config, VIDEO, 4)
    assert torch.allclose(gray.decode(gray.encode(frames[:, :1])), picture.mean(1, True).clamp(-1, 1), atol=1e-5)
    with pytest.raises(UserError, match=r"model\.in_channels: 6 does not fit .*; set it to 4"):
        load_autoencoder(config, rgb, 6)
    absent = AutoencoderConfig(kind="diffusers", path=str(tmp_path / "absent"), downsample=2)
    with pytest.raises(UserError, match=r"autoencoder\.path: no AutoencoderKL can be loaded from"):
        load_autoencoder(absent, rgb, 4)


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    config = AutoencoderConfig(kind="diffusers", path="somewhere")
    with pytest.raises(UserError, match=r"pip install 'ca2vdm\[latent\]'"):
        load_autoencoder(config, VIDEO, 4)
