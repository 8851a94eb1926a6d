"""Distillation: targets that a consistent model meets exactly, and a student that learns to jump.

Chunks of 2, window of 6 (see conftest.py). Shapes: latents (B, C, T, h, w), noisy chunks (N, C, l, h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ca2vdm_cli.config import (
    BetaSchedule,
    DiffusionConfig,
    DistillationConfig,
    DistillationSampler,
    Prediction,
    TrainingConfig,
)
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import SeededNoise, generate
from ca2vdm_cli.generate.samplers import make_sampler
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.training.distillation import Distillation, noise_parts
from ca2vdm_cli.training.loss import Draw

MakeModel = Callable[..., CausalVideoTransformer]
V = DiffusionConfig(beta_schedule=BetaSchedule.COSINE, prediction=Prediction.V)
FLOW = DiffusionConfig(beta_schedule=BetaSchedule.FLOW, prediction=Prediction.FLOW)
VIDEOS = 3


def clip(frames: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(VIDEOS, 4, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


def draw(objective: Distillation, chunks: int = 1, seed: int = 0) -> Draw:
    generators = [torch.Generator().manual_seed(100 * seed + video) for video in range(VIDEOS)]
    return Draw.stack([objective.draw(1, chunks, generator) for generator in generators])


@pytest.mark.parametrize("sampler", DistillationSampler)
@pytest.mark.parametrize("config", [V, FLOW])
@pytest.mark.parametrize("chunks", [1, 3])
def test_with_as_many_steps_as_the_teacher_its_weights_are_the_solution(
    chunks: int, config: DiffusionConfig, sampler: DistillationSampler, make_model: MakeModel
) -> None:
    teacher, process = make_model(learn_variance=False), NoiseProcess(config)
    other = make_model(learn_variance=False)
    with torch.no_grad():
        other.final_layer.linear.bias.add_(0.5)
    losses = []
    for student in (teacher, other):
        settings = DistillationConfig(8, sampler, 8)
        objective = Distillation(student, process, TrainingConfig(), teacher, settings, 300)
        losses.append(float(objective(clip(), 1, draw(objective, chunks))[0]))
    assert losses[0] < 1e-6 * losses[1]


def test_a_teacher_reads_captions_in_its_own_way(make_model: MakeModel) -> None:
    process = NoiseProcess(V)
    teacher, student = (make_model(learn_variance=False, text_channels=16, text_tokens=3) for _ in range(2))
    text = teacher.unconditional_caption(VIDEOS)
    losses = []
    for change in (0.0, 0.5):
        with torch.no_grad():
            assert student.y_embedder is not None
            student.y_embedder.y_proj.fc2.bias.add_(change)  # what its captions' keys and values are made of
        objective = Distillation(student, process, TrainingConfig(), teacher, DistillationConfig(8, teacher_steps=8))
        losses.append(float(objective(clip(), 1, draw(objective), text)[0]))
    assert losses[0] < 1e-6 * losses[1]


@pytest.mark.parametrize("sampler", DistillationSampler)
def test_a_model_that_always_sees_the_same_latents_is_consistent(
    sampler: DistillationSampler, make_model: MakeModel
) -> None:
    """Wherever it jumps from, it lands on the line from there to these latents, where the next jump begins."""
    process, latents = NoiseProcess(V), clip(2)
    model = make_model(learn_variance=False)
    settings = DistillationConfig(4, sampler, 32)
    objective = Distillation(model, process, TrainingConfig(), model, settings, 100)

    def ask(model: CausalVideoTransformer, x: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = process.alpha_sigma(timestep)
        return process.target(latents, (x - alpha * latents) / sigma, timestep)

    for seed in range(12):
        numbers = draw(objective, seed=seed)
        timestep = numbers.timestep.flatten()
        x = process.add_noise(latents, numbers.noise, timestep)
        target = objective.target(latents, numbers.noise, x, timestep, ask)
        assert torch.allclose(target, ask(model, x, timestep), atol=1e-4)


def test_timesteps_are_the_teachers_and_the_samplers_are_where_the_parts_begin(make_model: MakeModel) -> None:
    process = NoiseProcess(V)
    objective = Distillation(
        make_model(), process, TrainingConfig(), make_model(), DistillationConfig(4, teacher_steps=20)
    )
    drawn = {int(t) for seed in range(100) for t in draw(objective, 3, seed).timestep.flatten()}
    assert drawn == set(range(49, 1000, 50))
    assert make_sampler("trailing", process, 4).timesteps == [999, 749, 499, 249]
    assert make_sampler("trailing", process, 1).timesteps == [999]


@pytest.mark.parametrize(("steps", "last"), [(1, 0), (2, 0), (4, 0), (4, 400), (4, 990), (10, 990)])
def test_parts_of_log_snr_begin_where_the_sampler_steps(steps: int, last: int) -> None:
    """However few timesteps there are between them."""
    process = NoiseProcess(V)
    parts = noise_parts(process, DistillationConfig(steps, DistillationSampler.LOG_SNR, 10 * steps), last)
    assert [part[0] for part in parts] == make_sampler("log-snr", process, steps, last).timesteps
    grid = [t for part in parts for t in part]
    assert grid == sorted(set(grid), reverse=True) and parts[-1] == [last if steps > 1 else 999]
    if last < 990:
        assert all(len(part) == 10 for part in parts[:-1])
        gaps = [b - a for part in parts[1:-1] for a, b in pairwise(process.half_log_snr[part].tolist())]
        assert max(gaps, default=1) < 3 * min(gaps, default=1)  # even, but for rounding


def test_there_cannot_be_more_parts_than_timesteps() -> None:
    with pytest.raises(UsageError, match=r"steps: 4 must be at most 2, the timesteps from sampling.last_timestep 998"):
        noise_parts(NoiseProcess(V), DistillationConfig(4, DistillationSampler.LOG_SNR), 998)


def test_a_student_comes_nearer_to_its_teachers_samples(make_model: MakeModel) -> None:
    """Two steps of the student against 16 of the teacher, from the same noise, before and after."""
    teacher, student = make_model(learn_variance=False), make_model(learn_variance=False).requires_grad_(True)
    process = NoiseProcess(V)
    objective = Distillation(student, process, TrainingConfig(), teacher, DistillationConfig(2, teacher_steps=16))
    true = clip()

    def sample(model: CausalVideoTransformer, steps: int) -> Tensor:
        noise = SeededNoise(0, list(range(VIDEOS)), (4, 2, 4, 4), torch.device("cpu"))
        context = make_context(model, "cached", VIDEOS)
        (chunk,) = generate(context, process, make_sampler("trailing", process, steps), noise, 1, given=true[:, :, :3])
        return chunk.latents

    goal = sample(teacher, 16)
    before = float((sample(student, 2) - goal).square().mean())
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for step in range(150):
        loss, _ = objective(true, 3, draw(objective, 3, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((sample(student, 2) - goal).square().mean()) < 0.5 * before
    assert all(parameter.grad is None for parameter in teacher.parameters())
