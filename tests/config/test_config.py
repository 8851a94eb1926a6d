"""Settings that don't go together: each is refused, and the message begins with its key."""

from __future__ import annotations

import pytest

from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.presets import load_preset

FLOW = ["diffusion.beta_schedule=flow", "diffusion.prediction=flow"]
PARALLEL = "training.parallel_chunks=true"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # pixels
        (["video="], "video: needed exactly when autoencoder.kind is not none"),
        (["autoencoder.kind=none"], "video: needed exactly when autoencoder.kind is not none"),
        (["video.height=36"], "video.height: 36 must be model.latent_height 8 times autoencoder.downsample 4 = 32"),
        (["autoencoder.downsample=3"], "autoencoder.downsample: 3 must be even for the conv autoencoder"),
        (["autoencoder.kind=lowpass"], "model.in_channels: 4 must be video.channels 1 with the lowpass autoencoder"),
        (["autoencoder.kind=diffusers"], "autoencoder.path: the diffusers autoencoder needs a local folder"),
        (["text.path=t5"], "text: needs a text-conditioned model; set model.text_channels and model.text_tokens"),
        (["model.text_channels=8"], "model.text_tokens: 0 must be positive exactly when text_channels (8) is"),
        (["synthetic_data.min_speed=2"], "synthetic_data.max_speed: 1.5 must be at least min_speed 2.0"),
        # noise
        (["diffusion.prediction=flow"], "diffusion.prediction: flow does not go with beta_schedule linear"),
        (["diffusion.prefix_noise=[9, 3]"], "diffusion.prefix_noise: [9, 3] must be two ascending timesteps from 0"),
        (FLOW, "model.learn_variance: true needs a variance-preserving process"),
        # prefixes
        (["training.prefix_lengths=[1]"], "training.prefix_lengths: [1] must have 0, the empty context, when"),
        (["training.prefix_lengths=[0, 10]"], "training.prefix_lengths: 10 must be at most model.context_frames = 9"),
        (["training.prefix_weights=[1]"], "training.prefix_weights: [1.0] must have one number for each of"),
        (["training.prefix_lengths=[0]", "training.prefix_weights=[0]"], "training.prefix_weights: [0.0] must have"),
        # optimizer
        (["training.trainable=lora", "training.lora_rank=49"], "training.lora_rank: 49 must be at most model.hidden"),
        (["training.trainable=lora", "training.optimizer=muon"], "training.optimizer: muon does not go with"),
        # sampling
        (["sampling.last_timestep=990"], "sampling.last_timestep: 990 must be at most 988, to leave 12 timesteps"),
        (["distillation.teacher_steps=3"], "distillation.teacher_steps: 3 must be a multiple of steps 4"),
        (["distillation.teacher_steps=2000"], "distillation.teacher_steps: 2000 must be at most diffusion.train_times"),
        # clips
        (["training.rollout_share=0.5"], "training.rollout_share: 0.5 needs training.parallel_chunks"),
        (["training.clip_frames=20"], "training.clip_frames: 20 needs training.parallel_chunks"),
        ([PARALLEL, "training.clip_frames=12"], "training.clip_frames: 12 must be at least 13, a whole chunk"),
        # model
        (["model.num_heads=5"], "model.num_heads: 5 must divide hidden_size 48"),
        (["model.sink_frames=6"], "model.sink_frames: 6 must be at most context_frames - chunk_frames = 5"),
        (["model.spatial_prefix_frames=10"], "model.spatial_prefix_frames: 10 must be at most context_frames - sink"),
        (["model.temporal_positions=rope", "model.num_heads=16"], "model.num_heads: rope positions need an even head"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        load_preset("tiny", overrides)
    _, _, message = str(error.value).partition(f"{overrides[-1]}: ")
    assert message.startswith(expected)


def test_metrics_are_names_of_the_registry() -> None:
    assert load_preset("tiny").config.training.validation_metrics == ("psnr",)
    assert load_preset("tiny", ["training.validation_metrics=[]"]).config.training.validation_metrics == ()
    with pytest.raises(UsageError, match=r"training\.validation_metrics: there is no metric 'pnsr'; did you mean psnr"):
        load_preset("tiny", ["training.validation_metrics=[pnsr]"])
