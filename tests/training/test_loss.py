"""The objective: a loss on the right frames, and all chunks of a clip in one forward as if each came alone.

Chunks of 2, window of 6 (see conftest.py). Shapes: latents (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ca2vdm_cli.config import (
    BetaSchedule,
    DiffusionConfig,
    ModelConfig,
    Prediction,
    SpatialPrefix,
    TemporalPositions,
    TrainingConfig,
)
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.model.frame_plan import FramePlan
from ca2vdm_cli.model.kv_cache import KVCache
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import backends
from ca2vdm_cli.training.loss import Draw, Objective

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., CausalVideoTransformer]


class Answering(nn.Module):
    """Stands in for the network: records its inputs, and returns a parameter of the output's shape."""

    def __init__(self, config: ModelConfig, videos: int) -> None:
        super().__init__()
        self.config = config
        self.answer = nn.Parameter(torch.zeros(videos, config.out_channels, config.chunk_frames, 4, 4))
        self.inputs: Tensor
        self.plan: FramePlan
        self.timestep: Tensor

    def context_plan(self, noisy: int, start: int, window: TemporalWindow) -> FramePlan:
        clean, frames = len(window.context(start)), start + noisy
        positions = torch.tensor([window.position(f, start) for f in range(frames)])
        return FramePlan(clean, False, positions, torch.ones(frames, frames, dtype=torch.bool), None)

    def forward(self, inputs: Tensor, timestep: Tensor, plan: FramePlan, text: object = None) -> Tensor:
        self.inputs, self.timestep, self.plan = inputs, timestep.flatten(), plan
        return self.answer


def draw(objective: Objective, videos: int, prefix: int, chunks: int = 1, seed: int = 0) -> Draw:
    """The random numbers of a batch."""
    generators = [torch.Generator().manual_seed(100 * seed + video) for video in range(videos)]
    return Draw.stack([objective.draw(prefix, chunks, generator) for generator in generators])


def ask(
    network: Answering, process: NoiseProcess, clip: Tensor, prefix: int, seed: int = 0, **options: float
) -> Tensor:
    """The training loss with the stand-in."""
    objective = Objective(network, process, TrainingConfig(**options))  # type: ignore[arg-type]
    loss: Tensor = objective(clip, prefix, draw(objective, len(clip), prefix, seed=seed))[0]
    return loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ the objective
@pytest.mark.parametrize("prefix", [0, 1, 3, 6])
@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
def test_the_prefix_goes_in_clean_and_the_loss_is_on_the_chunk(
    prefix: int, prediction: Prediction, make_config: MakeConfig
) -> None:
    process = NoiseProcess(DiffusionConfig(prediction=prediction))
    network = Answering(make_config(learn_variance=False), 3)
    clip = random(3, 4, 8, 4, 4)
    loss = ask(network, process, clip, prefix)
    assert network.plan.clean_frames == prefix and network.inputs.shape[2] == prefix + 2
    assert torch.equal(network.inputs[:, :, :prefix], clip[:, :, :prefix])
    target = clip[:, :, prefix : prefix + 2]
    alpha, sigma = process.alpha_sigma(network.timestep)
    noise = (network.inputs[:, :, prefix:] - alpha * target) / sigma
    assert abs(noise.std() - 1) < 0.2
    assert torch.allclose(loss, process.target(target, noise, network.timestep).square().mean(), rtol=1e-3)
    beyond = clip.clone()
    beyond[:, :, prefix + 2 :] += 1
    assert torch.equal(ask(network, process, beyond, prefix), loss)


def test_a_perturbed_prefix_has_a_little_noise_and_still_timestep_0(make_config: MakeConfig) -> None:
    process = NoiseProcess(DiffusionConfig(prefix_noise=(50, 100)))
    network = Answering(make_config(), 64)
    clip = torch.zeros(64, 4, 8, 4, 4)
    ask(network, process, clip, 6)
    assert network.plan.clean_frames == 6
    _, sigma = process.alpha_sigma(torch.tensor([50, 100]))
    spread = network.inputs[:, :, :6].flatten(1).std(dim=1)  # each video has a level of its own
    assert spread.min() > 0.85 * sigma[0] and spread.max() < 1.15 * sigma[1] and spread.max() > 1.3 * spread.min()


def test_full_clips_start_at_any_position_and_shorter_ones_at_0(make_config: MakeConfig) -> None:
    process, starts = NoiseProcess(DiffusionConfig()), set()
    network = Answering(make_config(), 16)
    for seed in range(4):
        ask(network, process, random(16, 4, 8, 4, 4), 6, seed)
        positions = network.plan.positions
        assert torch.equal((positions - positions[:, :1]) % 8, torch.arange(8).expand(16, -1))
        starts |= set(positions[:, 0].tolist())
    assert starts == set(range(8))
    ask(network, process, random(16, 4, 8, 4, 4), 4)
    assert network.plan.positions.tolist() == list(range(6))
    network = Answering(make_config(temporal_positions="rope"), 16)
    ask(network, process, random(16, 4, 8, 4, 4), 6)
    assert network.plan.positions.tolist() == list(range(8))


def test_full_clips_start_wherever_they_fit_into_a_longer_table(make_config: MakeConfig) -> None:
    network = Answering(make_config(temporal_positions="absolute", position_table=11), 16)
    starts = set()
    for seed in range(4):
        ask(network, NoiseProcess(DiffusionConfig()), random(16, 4, 8, 4, 4), 6, seed)
        assert torch.equal(network.plan.positions - network.plan.positions[:, :1], torch.arange(8).expand(16, -1))
        starts |= set(network.plan.positions[:, 0].tolist())
    assert starts == {0, 1, 2, 3}


def test_the_same_generator_gives_the_same_loss(make_model: MakeModel) -> None:
    process, clip = NoiseProcess(DiffusionConfig(prefix_noise=(50, 100))), random(3, 4, 8, 4, 4)
    objective = Objective(make_model(), process, TrainingConfig())
    losses = [objective(clip, 6, draw(objective, 3, 6, seed=seed))[0] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


# ---------------------------------------------------------------------------------------------------- parallel chunks
KINDS = [
    {},
    {"causality": "partial", "temporal_positions": "rope", "mask_channel": True},
    {"spatial_prefix": "first_frame", "learn_variance": False},
    {"spatial_prefix": "none", "temporal_positions": "absolute", "position_table": 40},
]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_parallel_chunks_have_the_gradients_of_one_chunk_at_a_time(
    kind: dict[str, object], first: int, make_model: MakeModel
) -> None:
    """Within the window, summed over the chunks. The prefix is perturbed too: the same noise for every chunk."""
    model = make_model(**{"context_frames": 8, **kind}).requires_grad_(True)
    objective = Objective(model, NoiseProcess(DiffusionConfig(prefix_noise=(50, 100))), TrainingConfig())
    clip, chunks = random(2, 4, 9, 4, 4), 3
    numbers = replace(draw(objective, 2, first, chunks), offset=torch.zeros(2, 1))
    together, terms = objective(clip, first, numbers)
    expected = torch.autograd.grad(chunks * together, list(model.parameters()), materialize_grads=True)
    alone = torch.zeros(())
    for j in range(chunks):
        prefix, part = first + 2 * j, slice(2 * j, 2 * j + 2)
        one = Draw(
            numbers.timestep[:, j : j + 1],
            numbers.noise[:, :, part],
            numbers.prefix_level[:, :prefix],
            numbers.prefix_noise[:, :, :prefix],
            numbers.offset,
        )
        loss, term = objective(clip, prefix, one)
        alone = alone + loss
        assert torch.allclose(term["mse"][:, 0], terms["mse"][:, j], rtol=1e-4)
    assert torch.allclose(chunks * together, alone, rtol=1e-5)
    gradients = torch.autograd.grad(alone, list(model.parameters()), materialize_grads=True)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for (name, _), ours, theirs in zip(model.named_parameters(), expected, gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * largest), name
    assert largest > 1e-3


@pytest.mark.parametrize("prefix", SpatialPrefix)
@pytest.mark.parametrize(
    ("positions", "sinks"),
    [
        (TemporalPositions.CYCLIC, 0),
        (TemporalPositions.CYCLIC, 1),
        (TemporalPositions.ROPE, 0),
        (TemporalPositions.ROPE, 2),
    ],
)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_long_clips_are_trained_under_the_caches_own_eviction(
    first: int, positions: TemporalPositions, prefix: SpatialPrefix, sinks: int, make_model: MakeModel
) -> None:
    """One forward over a clip of four windows predicts what generation with the cache would."""
    model = make_model(temporal_positions=positions, spatial_prefix=prefix, sink_frames=sinks)
    chunks = 10
    clip, noisy = random(2, 4, first + 20, 4, 4), random(2, 4, 20, 4, 4, seed=1)
    timestep = torch.randint(1000, (2, chunks), generator=torch.Generator().manual_seed(0))
    plan = model.parallel_plan(first, chunks, TemporalWindow(model.config))
    together = model(torch.cat([clip[:, :, :-2], noisy], dim=2), timestep, plan)
    cache = KVCache(model.config, 2)
    if first:
        model.write(clip[:, :, :first], cache)
    for j in range(chunks):
        part = slice(2 * j, 2 * j + 2)
        one = model(noisy[:, :, part], timestep[:, j], cache.plan(2, clean=False), cache)
        assert torch.allclose(one, together[:, :, part], atol=1e-4 * float(one.abs().max())), j
        model.write(clip[:, :, first + 2 * j : first + 2 * j + 2], cache)


# ------------------------------------------------------------------------------------------------ the variance's term
def test_the_bound_trains_the_variance_channels_only(make_config: MakeConfig) -> None:
    network, process, clip = Answering(make_config(), 3), NoiseProcess(DiffusionConfig()), random(3, 4, 8, 4, 4)
    gradients = []
    for weight in (0.0, 1e-3):
        network.zero_grad()
        ask(network, process, clip, 3, variance_weight=weight).backward()
        assert network.answer.grad is not None
        gradients.append(network.answer.grad.clone())
    assert torch.equal(gradients[0][:, :4], gradients[1][:, :4])
    assert not gradients[0][:, 4:].any() and (gradients[1][:, 4:] != 0).all()


# -------------------------------------------------------------------------------------------------------- it can learn
@pytest.mark.parametrize("prediction", Prediction)
def test_a_new_model_learns_one_batch(prediction: Prediction, make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    flow = prediction is Prediction.FLOW
    model = CausalVideoTransformer(make_config(learn_variance=not flow), backends["sdpa"])
    process = NoiseProcess(
        DiffusionConfig(prediction=prediction, beta_schedule=BetaSchedule.FLOW if flow else BetaSchedule.LINEAR)
    )
    objective, clip = Objective(model, process, TrainingConfig()), random(4, 4, 8, 4, 4)
    numbers = draw(objective, 4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss, terms = objective(clip, 3, numbers)
        assert set(terms) == ({"mse"} if flow else {"mse", "vlb"})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(terms["mse"].mean()))
    assert losses[-1] < 0.1 * losses[0], losses
