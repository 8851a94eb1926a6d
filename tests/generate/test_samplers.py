"""Samplers on a problem with a known solution, reproducible seeds, and the loop over chunks.

Chunks of 2, window of 6 (see conftest.py). Shapes: latents (B, C, T, h, w).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from command_kit import STRATEGIES
from torch import Tensor

from ca2vdm_cli.config import BetaSchedule, DiffusionConfig, Prediction
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.generate.context import Context, make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import Caption, SeededNoise, generate
from ca2vdm_cli.generate.samplers import AncestralSampler, DrawNoise, Sampler, evenly_respaced, make_sampler, samplers
from ca2vdm_cli.model.kv_cache import TextKeysValues
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.presets import load_preset

MakeModel = Callable[..., CausalVideoTransformer]

CHUNK = (4, 2, 4, 4)
CPU = torch.device("cpu")
MEAN, SPREAD = 0.7, 0.5
THEIRS = ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"]
diffusers_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Known(Context):
    """Stands in for model and context: the exact prediction for independent latents N(MEAN, SPREAD²)."""

    def __init__(self, model: CausalVideoTransformer, process: NoiseProcess) -> None:
        self.model, self.process = model, process
        self.text: list[TextKeysValues] = []
        self.appended: list[Tensor] = []
        self.asked = 0

    def set_text(self, text: list[TextKeysValues]) -> None:
        self.text = text

    @property
    def frames(self) -> int:
        return sum(latents.shape[2] for latents in self.appended)

    @property
    def nbytes(self) -> int:
        return 0

    def append(self, latents: Tensor) -> None:
        self.appended.append(latents)

    def open_chunk(self) -> None:
        pass

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.asked += 1
        alpha, sigma = self.process.alpha_sigma(timestep.long())
        latents = MEAN + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * MEAN)
        noise = (x - alpha * latents) / sigma
        return self.process.target(latents, noise, timestep.long())


class KnownVariance(Known):
    """Also predicts the exact variance of the ancestral sampler's next step."""

    timesteps: list[int]

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        following = [*self.timesteps[1:], self.timesteps[-1]][self.timesteps.index(int(timestep[0]))]
        before, now = self.process.cumulative[following], self.process.cumulative[int(timestep[0])]
        beta = 1 - now / before
        variance = before * SPREAD**2 + 1 - before  # of x at the following timestep
        given_x = variance - now / before * variance**2 / (now * SPREAD**2 + 1 - now)
        smallest, largest = (beta * (1 - before) / (1 - now)).log(), beta.log()
        share = (given_x.log() - smallest) / (largest - smallest)
        channels = torch.full_like(x, float(2 * share - 1))
        return torch.cat([super().predict(x, timestep), channels], dim=1)


def sampled(context: Known, sampler: Sampler, videos: int = 256) -> tuple[Tensor, Tensor]:
    """One chunk and its initial noise, (B, C, L, h, w) each; 32768 values by default."""
    noise = SeededNoise(0, list(range(videos)), CHUNK, CPU)
    (chunk,) = generate(context, context.process, sampler, noise, 1)
    noise.chunk(0)
    return chunk.latents, noise.initial(context.process)


@pytest.fixture
def model(make_model: MakeModel) -> CausalVideoTransformer:
    return make_model()


# ------------------------------------------------------------------------------------------------- a known problem
PROCESSES = [
    (schedule, prediction)
    for schedule in (BetaSchedule.LINEAR, BetaSchedule.COSINE)
    for prediction in (Prediction.EPSILON, Prediction.V)
]


@pytest.mark.parametrize(
    ("name", "steps", "schedule", "prediction"),
    [
        *(
            (name, steps, *kind)
            for name, steps in (("ancestral", 400), ("ddim", 200), ("dpm++", 30))
            for kind in PROCESSES
        ),
        ("ddim", 200, BetaSchedule.FLOW, Prediction.FLOW),
        ("dpm++", 30, BetaSchedule.FLOW, Prediction.FLOW),
    ],
)
def test_samples_have_the_right_mean_and_spread(
    name: str, steps: int, schedule: BetaSchedule, prediction: Prediction, model: CausalVideoTransformer
) -> None:
    process = NoiseProcess(DiffusionConfig(beta_schedule=schedule, prediction=prediction))
    latents, _ = sampled(Known(model, process), make_sampler(name, process, steps), 64)
    assert abs(latents.mean() - MEAN) < 0.02
    assert abs(latents.std() / SPREAD - 1) < 0.03


@pytest.mark.parametrize("name", ["ancestral", "UniPCMultistepScheduler"])
def test_variance_preserving_samplers_refuse_flow_matching(name: str) -> None:
    if name not in samplers:
        pytest.importorskip("diffusers")
    process = NoiseProcess(DiffusionConfig(beta_schedule=BetaSchedule.FLOW, prediction=Prediction.FLOW))
    with pytest.raises(UsageError, match=r"flow matching takes ddim or dpm\+\+"):
        make_sampler(name, process, 8)


@diffusers_warns
@pytest.mark.parametrize("name", ["ddim", "dpm++", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_denoising_can_start_at_any_step(name: str) -> None:
    """The network's input is then what the noise process gives, whatever a scheduler's internal scale."""
    if name.endswith("Scheduler"):
        pytest.importorskip("diffusers")
    process = NoiseProcess(DiffusionConfig())
    sampler = make_sampler(name, process, 10)
    latents, noise = torch.randn(2, *CHUNK), torch.randn(2, *CHUNK)
    for index in (3, 8):
        sampler.start(noise)
        seen = sampler.scale_input(index, sampler.noised(index, latents, noise))
        expected = process.add_noise(latents, noise, torch.tensor([int(sampler.timesteps[index])]))
        assert torch.allclose(seen, expected, atol=2e-2)


@diffusers_warns
@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
@pytest.mark.parametrize("name", THEIRS)
def test_diffusers_schedulers_sample_correctly(
    name: str, prediction: Prediction, model: CausalVideoTransformer
) -> None:
    pytest.importorskip("diffusers")
    process = NoiseProcess(DiffusionConfig(prediction=prediction))
    latents, _ = sampled(Known(model, process), make_sampler(name, process, 100), 64)
    assert abs(latents.mean() - MEAN) < 0.03
    assert abs(latents.std() / SPREAD - 1) < 0.08


def test_a_learned_variance_makes_few_ancestral_steps_exact(model: CausalVideoTransformer) -> None:
    process = NoiseProcess(DiffusionConfig())
    sampler, context = AncestralSampler(process, 8), KnownVariance(model, process)
    context.timesteps = [int(t) for t in sampler.timesteps]
    exact, _ = sampled(context, sampler)
    fixed, _ = sampled(Known(model, process), AncestralSampler(process, 8))
    assert abs(exact.mean() - MEAN) < 0.02
    assert abs(exact.std() / SPREAD - 1) < 0.02 < 0.2 < abs(fixed.std() / SPREAD - 1)


def test_deterministic_samplers_follow_the_flow_and_second_order_needs_fewer_steps(
    model: CausalVideoTransformer,
) -> None:
    """The probability flow of a Gaussian is linear, so every noise has one exact result."""
    process = NoiseProcess(DiffusionConfig())
    alpha, sigma = process.alpha_sigma(torch.tensor([999]))

    def error(name: str, steps: int) -> float:
        latents, noise = sampled(Known(model, process), make_sampler(name, process, steps), 16)
        scale = (alpha**2 * SPREAD**2 + sigma**2).sqrt()
        return float((latents - (MEAN + SPREAD * (noise - alpha * MEAN) / scale)).abs().mean())

    for name in ("ddim", "dpm++"):
        assert error(name, 10) > 1.5 * error(name, 20) > 2 * error(name, 40)
    assert error("dpm++", 8) < 0.9 * error("ddim", 8)
    assert error("dpm++", 20) < 0.5 * error("ddim", 20)


@pytest.mark.parametrize("name", samplers)
def test_a_sampler_can_be_used_again(name: str, model: CausalVideoTransformer) -> None:
    process = NoiseProcess(DiffusionConfig())
    sampler = make_sampler(name, process, 6)
    first, _ = sampled(Known(model, process), sampler, 2)
    again, _ = sampled(Known(model, process), sampler, 2)
    assert torch.equal(first, again)


def test_a_timestep_halfway_between_two_is_rounded_as_published() -> None:
    """With 21 steps the stride is 49.95. Accumulated ten times it is slightly below 499.5, and rounds down."""
    assert evenly_respaced(1000, 21)[::-1] == [
        *(0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 499),
        *(549, 599, 649, 699, 749, 799, 849, 899, 949, 999),
    ]  # fmt: skip


def test_timesteps() -> None:
    assert evenly_respaced(1000, 4) == [999, 666, 333, 0]
    for name in samplers:
        for steps in (2, 10, 50, 1000):
            timesteps = make_sampler(name, NoiseProcess(DiffusionConfig()), steps).timesteps
            assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
            assert timesteps == sorted(set(timesteps), reverse=True)


def test_the_last_timestep_can_be_a_noisy_one() -> None:
    process = NoiseProcess(DiffusionConfig())
    for last, steps in ((0, 8), (300, 8), (300, 700)):
        timesteps = make_sampler("dpm++", process, steps, last).timesteps
        assert len(timesteps) == steps and (timesteps[0], timesteps[-1]) == (999, last)
        assert timesteps == sorted(set(timesteps), reverse=True)
    half_log_snr = [process.half_log_snr[int(t)] for t in make_sampler("dpm++", process, 8, 300).timesteps]
    gaps = torch.stack(half_log_snr).diff()
    assert (gaps / gaps.mean() - 1).abs().max() < 0.1, "evenly spread down to it"
    with pytest.raises(UsageError, match="steps: 701 must be at most 700, the timesteps from sampling"):
        make_sampler("dpm++", process, 701, 300)
    with pytest.raises(UsageError, match=r"sampling\.last_timestep: 993 must be at most 992, to leave 8 timesteps"):
        load_preset("tiny", ["sampling.steps=8", "sampling.last_timestep=993"])
    assert load_preset("tiny", ["sampling.steps=8", "sampling.last_timestep=992"]).config.sampling.last_timestep == 992


# ------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("name", samplers)
def test_impossible_step_counts_are_refused(name: str, steps: int) -> None:
    with pytest.raises(UsageError, match=f"steps: {steps} must be from 1 to 1000"):
        make_sampler(name, NoiseProcess(DiffusionConfig()), steps)


@diffusers_warns
@pytest.mark.parametrize("name", ["fastest", "__name__"])
def test_an_unknown_sampler_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UsageError) as error:
        make_sampler(name, NoiseProcess(DiffusionConfig()), 10)
    assert name in str(error.value) and "ancestral, ddim, dpm++" in str(error.value) and "\n" not in str(error.value)


@diffusers_warns
@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",  # another noise process
        "EDMEulerScheduler",
        "VQDiffusionScheduler",  # another kind of data
        pytest.param(
            "LMSDiscreteScheduler",  # needs scipy
            marks=pytest.mark.skipif(find_spec("scipy") is not None, reason="scipy is installed"),
        ),
    ],
)
def test_a_scheduler_that_cannot_work_is_refused_in_one_line(name: str) -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(UsageError) as error:
        make_sampler(name, NoiseProcess(DiffusionConfig()), 10)
    assert name in str(error.value) and "\n" not in str(error.value)


@diffusers_warns
@pytest.mark.parametrize("name", THEIRS)
def test_diffusers_schedulers_log_no_warnings(
    name: str, model: CausalVideoTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("diffusers")
    process, log = NoiseProcess(DiffusionConfig()), logging.getLogger("diffusers")
    log.addHandler(caplog.handler)
    try:
        sampled(Known(model, process), make_sampler(name, process, 3), 1)
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.messages == []


# ------------------------------------------------------------------------------------------------------------- seeds
def video(
    model: CausalVideoTransformer,
    frames: int,
    videos: tuple[int, ...] = (0,),
    *,
    seed: int = 3,
    strategy: str = "cached",
    sampler: str = "ancestral",
    given: Tensor | None = None,
    process: NoiseProcess | None = None,
) -> Tensor:
    """A whole latent video without the given frames, (B, C, T, h, w)."""
    process = process or NoiseProcess(DiffusionConfig())
    context, noise = make_context(model, strategy, len(videos)), SeededNoise(seed, list(videos), CHUNK, CPU)
    chunks = generate(context, process, make_sampler(sampler, process, 3), noise, frames // 2, given=given)
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


@pytest.mark.parametrize("sampler", samplers)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_seeds_video_does_not_depend_on_its_length(
    strategy: str, sampler: str, model: CausalVideoTransformer
) -> None:
    long = video(model, 80, strategy=strategy, sampler=sampler)
    assert long.shape == (1, 4, 80, 4, 4)
    assert torch.equal(long[:, :, :40], video(model, 40, strategy=strategy, sampler=sampler))


@pytest.mark.parametrize("perturbed", [None, (50, 100)])
def test_a_seeds_video_does_not_depend_on_the_batch(
    perturbed: tuple[int, int] | None, model: CausalVideoTransformer
) -> None:
    """With v, values stay of order 1, so rounding errors don't grow."""
    process = NoiseProcess(DiffusionConfig(prediction=Prediction.V, prefix_noise=perturbed))
    together = video(model, 12, (0, 1, 5), sampler="ddim", process=process)
    assert together.abs().max() < 30
    for row, index in enumerate((0, 1, 5)):
        alone = video(model, 12, (index,), sampler="ddim", process=process)
        assert torch.allclose(together[row : row + 1], alone, atol=1e-4 * float(together.abs().max()))
    assert not torch.allclose(together[0], together[1], atol=0.1)


@diffusers_warns
@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_random_diffusers_schedulers_do_not_depend_on_the_batch(name: str, model: CausalVideoTransformer) -> None:
    pytest.importorskip("diffusers")
    together, alone = video(model, 2, (0, 1), sampler=name), video(model, 2, (1,), sampler=name)
    assert torch.allclose(together[1:], alone, atol=1e-4 * float(together.abs().max()))


def test_noise_is_drawn_from_seed_video_and_chunk() -> None:
    def draw(seed: int, videos: list[int], chunk: int) -> list[Tensor]:
        noise = SeededNoise(seed, videos, CHUNK, CPU)
        noise.chunk(chunk)
        process = NoiseProcess(DiffusionConfig(prefix_noise=(50, 100)))
        latents = noise.perturb(process, torch.zeros(len(videos), *CHUNK))
        return [latents, noise.initial(process), noise.step(0), noise.step(1)]

    usual = draw(3, [0, 1], 4)
    for ours, theirs in zip(usual, draw(3, [1], 4), strict=True):
        assert torch.equal(ours[1:], theirs)
    others = [usual, draw(4, [0, 1], 4), draw(3, [2, 3], 4), draw(3, [0, 1], 5), draw(3, [0, 1], -1)]
    every = torch.stack([one.flatten() for drawn in others for one in drawn[1:]])
    assert (torch.corrcoef(every) - torch.eye(len(every))).abs().max() < 0.3  # all of them differ


def test_strategies_generate_the_same_video_until_the_window_slides(model: CausalVideoTransformer) -> None:
    cached, recomputed = (video(model, 16, strategy=strategy) for strategy in STRATEGIES)
    scale = float(cached.abs().max())
    assert torch.allclose(cached[:, :, :8], recomputed[:, :, :8], atol=1e-4 * scale)
    assert not torch.allclose(cached[:, :, 8:], recomputed[:, :, 8:], atol=1e-4 * scale)


# --------------------------------------------------------------------------------------------------------- the loop
@pytest.mark.parametrize("given_frames", [0, 1, 4])
def test_chunks_are_numbered_and_generated_on_demand(given_frames: int, model: CausalVideoTransformer) -> None:
    process = NoiseProcess(DiffusionConfig())
    context, steps = Known(model, process), list[tuple[int, int]]()
    given = torch.zeros(1, 4, given_frames, 4, 4) if given_frames else None
    noise, sampler = SeededNoise(0, [0], CHUNK, CPU), make_sampler("ddim", process, 3)
    chunks = generate(context, process, sampler, noise, 3, given=given, on_step=lambda *step: steps.append(step))
    assert context.asked == 0
    for index in range(3):
        chunk = next(chunks)
        assert (chunk.index, chunk.first_frame) == (index, given_frames + 2 * index)
        assert chunk.latents.shape == (1, *CHUNK) and chunk.latents.dtype == torch.float32
        assert context.asked == 3 * (index + 1), "a later chunk was started before this one was yielded"
        assert chunk.denoise_seconds > 0
    assert next(chunks, None) is None
    assert steps == [(index, step) for index in range(3) for step in (1, 2, 3)]
    assert context.frames == given_frames + 4, "the last chunk is not written to the context"


def test_the_context_is_perturbed_and_the_output_is_not(model: CausalVideoTransformer) -> None:
    """If the weights were trained with a noisy prefix; the level is drawn per video and chunk."""
    process = NoiseProcess(DiffusionConfig(prefix_noise=(50, 100)))
    context, sampler = Known(model, process), make_sampler("dpm++", process, 20)
    given = torch.ones(16, 4, 1, 4, 4)
    noise = SeededNoise(0, list(range(16)), CHUNK, CPU)
    shown = [given, *(chunk.latents for chunk in generate(context, process, sampler, noise, 2, given=given))]
    alpha, sigma = process.alpha_sigma(torch.tensor([50, 100]))
    for clean, seen in zip(shown, context.appended, strict=False):
        spread = (seen - alpha.mean() * clean).flatten(1).std(dim=1)
        assert 0.7 * sigma[0] < spread.min() < spread.max() < 1.4 * sigma[1]
    unperturbed = NoiseProcess(DiffusionConfig())
    context = Known(model, unperturbed)
    assert len(list(generate(context, unperturbed, sampler, noise, 2, given=given))) == 2
    assert torch.equal(context.appended[0], given)


class Listening(Sampler):
    """Remembers the output it is given."""

    output: Tensor

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__(process, 2)
        self.timesteps = [999, 0]

    def step(self, index: int, x: Tensor, output: Tensor, noise: DrawNoise) -> Tensor:
        self.output = output
        return x


class Halves(Known):
    """Predicts noise 3 and variance 5 for the conditional half, 1 and 7 for the unconditional one."""

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        assert x.shape[0] == 4 and timestep.shape == (1,) and torch.equal(x[:2], x[2:])
        noise = torch.tensor([3.0, 3.0, 1.0, 1.0]).view(4, 1, 1, 1, 1).expand_as(x)
        variance = torch.tensor([5.0, 5.0, 7.0, 7.0]).view(4, 1, 1, 1, 1).expand_as(x)
        return torch.cat([noise, variance], dim=1)


def test_guidance_extrapolates_the_noise_and_keeps_the_conditional_variance(make_model: MakeModel) -> None:
    model, process = make_model(text_channels=5, text_tokens=3), NoiseProcess(DiffusionConfig())
    caption = Caption(torch.randn(2, 3, 5), torch.ones(2, 3), guidance_scale=4.0)
    context, sampler = Halves(model, process), Listening(process)
    noise = SeededNoise(0, [0, 1], CHUNK, CPU)
    list(generate(context, process, sampler, noise, 2, given=torch.zeros(2, 4, 1, 4, 4), caption=caption))
    assert sampler.output.shape == (2, 8, 2, 4, 4)
    assert (sampler.output[:, :4] == 1 + 4 * (3 - 1)).all() and (sampler.output[:, 4:] == 5).all()
    assert [latents.shape[0] for latents in context.appended] == [4, 4]
    for layer in context.text:  # the unconditional half has the stored caption
        assert layer.k.shape[0] == 4 and not torch.equal(layer.k[0], layer.k[1])
        assert torch.equal(layer.k[2], layer.k[3])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_guided_video_does_not_depend_on_the_batch(strategy: str, make_model: MakeModel) -> None:
    model, process = make_model(text_channels=5, text_tokens=3), NoiseProcess(DiffusionConfig())
    embedding, mask = (
        torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1, 1, 0], [1, 1, 1]]),
    )

    def run(videos: list[int], scale: float = 2.0) -> Tensor:
        caption = Caption(embedding[videos], mask[videos], scale)
        context = make_context(model, strategy, len(videos) * (2 if caption.guided else 1))
        noise, sampler = SeededNoise(0, videos, CHUNK, CPU), make_sampler("ancestral", process, 3)
        return torch.cat([c.latents for c in generate(context, process, sampler, noise, 5, caption=caption)], dim=2)

    together = run([0, 1])
    for index in range(2):
        alone = run([index])
        assert torch.allclose(together[index : index + 1], alone, atol=1e-4 * float(together.abs().max()))
    assert not torch.allclose(run([0]), run([0], scale=1.0), rtol=0.1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("variant", "sampler"),
    [
        ({}, "ancestral"),
        ({"temporal_positions": "rope", "sink_frames": 2, "causality": "partial"}, "ddim"),
        ({"spatial_prefix": "first_frame", "mask_channel": True, "text_channels": 5, "text_tokens": 3}, "dpm++"),
    ],
)
def test_the_loop_stays_on_the_models_device(
    variant: dict[str, Any], sampler: str, strategy: str, make_model: MakeModel
) -> None:
    """Tensors on the device ``meta`` have no values: they can't be combined with tensors on the CPU, and nothing can be
    read back. On a GPU the loop therefore neither mixes devices nor waits."""
    model, meta = make_model("sdpa", **variant).to("meta"), torch.device("meta")
    process = NoiseProcess(DiffusionConfig(prefix_noise=(50, 100)))
    caption = None
    if model.config.text_channels:
        caption = Caption(torch.empty(1, 3, 5, device=meta), torch.empty(1, 3, device=meta), guidance_scale=2.0)
    context, noise = make_context(model, strategy, 2 if caption else 1), SeededNoise(0, [0], CHUNK, meta)
    solver, given = make_sampler(sampler, process, 2), torch.empty(1, 4, 1, 4, 4, device=meta)
    chunks = list(generate(context, process, solver, noise, 5, given=given, caption=caption))
    assert all(chunk.latents.device == meta and chunk.latents.shape == (1, *CHUNK) for chunk in chunks)
