"""Samplers: how a chunk of noise becomes latents in N denoising steps.

Shape letters: B videos, C channels, L frames of a chunk, h, w latent size.
"""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.config import SamplingConfig
from ca2vdm_cli.errors import UsageError, first_line
from ca2vdm_cli.plugins import Registry
from ca2vdm_cli.plugins import samplers as _samplers

from .diffusion import NoiseProcess, interpolate_variance, posterior

DrawNoise = Callable[[int], Tensor]
"""Draws standard normal noise (B, C, L, h, w) to add after denoising step i."""


class Sampler(ABC):
    """Turns noise into latents in N steps, one chunk at a time; ``start`` begins a new chunk.

    Subclass it, set ``timesteps``, and register the class (hook ``ca2vdm_register_samplers``).

    Args:
        process: the model's noise process.
        steps: N.
        last_timestep: the cleanest timestep; samplers that can't choose it ignore it.

    Raises:
        UsageError: the noise process has fewer timesteps than N, or the sampler does not support it.
    """

    name: ClassVar[str]
    """The name that selects it, such as ``--sampler ddim``."""
    description: ClassVar[str]
    """One line."""
    timesteps: Sequence[float]
    """The N timesteps, noisiest first. They are integers, except for some diffusers schedulers."""

    def __init__(self, process: NoiseProcess, steps: int, last_timestep: int = 0) -> None:
        if not 1 <= steps <= process.config.train_timesteps:
            raise UsageError(f"steps: {steps} must be from 1 to {process.config.train_timesteps}")
        self.process = process

    def start(self, x: Tensor) -> Tensor:
        """Begin a chunk with standard normal noise x; returns x at step 0."""
        return x

    def scale_input(self, index: int, x: Tensor) -> Tensor:
        """The network's input for x at step ``index``."""
        return x

    def noised(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        """x at step ``index``, on the path from this noise to these latents. Call ``start`` first."""
        return self.process.add_noise(latents, noise, torch.tensor([int(self.timesteps[index])]))

    @abstractmethod
    def step(self, index: int, x: Tensor, output: Tensor, noise: DrawNoise) -> Tensor:
        """One step from timestep ``timesteps[index]`` to the next.

        Args:
            index: which step, from 0.
            x: (B, C, L, h, w) float32.
            output: the network's output (B, C or 2C, L, h, w) float32.
            noise: draws the step's noise, if the sampler needs any.
        """

    def _split(self, index: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        return self.process.split(output[:, : x.shape[1]], x, torch.tensor([int(self.timesteps[index])]))


def evenly_respaced(train_timesteps: int, steps: int) -> list[int]:
    """N timesteps, evenly spaced from 0 to the last and rounded, noisiest first (as published); N = 1 gives the last.

    The stride is accumulated, not multiplied, as in the published code. This decides how a timestep halfway between two
    integers is rounded, as with N = 21.
    """
    last = train_timesteps - 1
    if steps == 1:
        return [last]
    stride = last / (steps - 1)
    return [round(t) for t in itertools.accumulate([stride] * (steps - 1), initial=0.0)][::-1]


class AncestralSampler(Sampler):
    """DDPM on respaced timesteps (IDDPM); the variance is learned, or else that of the posterior."""

    name = "ancestral"
    description = "DDPM on respaced timesteps (published)"

    def __init__(
        self, process: NoiseProcess, steps: int, last_timestep: int = 0, *, timesteps: list[int] | None = None
    ) -> None:
        super().__init__(process, steps)
        if process.config.flow:
            raise UsageError(
                "sampler: ancestral needs a variance-preserving process; flow matching takes ddim or dpm++"
            )
        self.timesteps = timesteps or evenly_respaced(process.config.train_timesteps, steps)
        cumulative = process.cumulative[self.timesteps]
        beta = (1 - cumulative / torch.cat([cumulative[1:], torch.ones(1, dtype=cumulative.dtype)])).float()
        # float32 from here on, as published: 1 - 0.9999 has a relative error of 1.7e-4, which scales the last output
        current = torch.cumprod(1 - beta.flip(0), dim=0).flip(0)
        previous = torch.cat([current[1:], torch.ones(1)])
        self._posterior = posterior(beta, previous, current)

    def step(self, index: int, x: Tensor, output: Tensor, noise: DrawNoise) -> Tensor:
        latents, _ = self._split(index, x, output)
        latent_factor, x_factor, log_min, log_max = (table[index].to(x) for table in self._posterior)
        mean = latent_factor * latents + x_factor * x
        if index == len(self.timesteps) - 1:
            return mean
        log_variance = log_min
        if output.shape[1] > x.shape[1]:
            log_variance = interpolate_variance(output[:, x.shape[1] :], log_min, log_max)
        return mean + (0.5 * log_variance).exp() * noise(index)


class DdimSampler(Sampler):
    """Deterministic DDIM (Song et al. 2021) on the same respaced timesteps; with flow matching, Euler's method."""

    name = "ddim"
    description = "deterministic DDIM; Euler's method with flow matching"

    def __init__(self, process: NoiseProcess, steps: int, last_timestep: int = 0) -> None:
        super().__init__(process, steps)
        self.timesteps = evenly_respaced(process.config.train_timesteps, steps)

    def step(self, index: int, x: Tensor, output: Tensor, noise: DrawNoise) -> Tensor:
        latents, predicted_noise = self._split(index, x, output)
        if index == len(self.timesteps) - 1:
            return latents
        alpha, sigma = self.process.alpha_sigma(torch.tensor([int(self.timesteps[index + 1])]), x.device)
        return alpha * latents + sigma * predicted_noise


def trailing(train_timesteps: int, steps: int) -> list[int]:
    """The noisy ends of N equal parts of the noise range, noisiest first.

    The last step removes all remaining noise; evenly respaced timesteps waste it at timestep 0 (Lin et al. 2024).
    """
    return [round(train_timesteps * (steps - k) / steps) - 1 for k in range(steps)]


class TrailingSampler(DdimSampler):
    """DDIM on trailing timesteps, for distilled models with 1 to 4 steps."""

    name = "trailing"
    description = "DDIM on trailing timesteps, for distilled models"

    def __init__(self, process: NoiseProcess, steps: int, last_timestep: int = 0) -> None:
        super().__init__(process, steps)
        self.timesteps = trailing(process.config.train_timesteps, steps)


class LogSnrSampler(DdimSampler):
    """DDIM on the timesteps of ``dpm++``, for models distilled for a few unequal steps."""

    name = "log-snr"
    description = "DDIM on timesteps evenly spaced in log SNR, for distilled models"

    def __init__(self, process: NoiseProcess, steps: int, last_timestep: int = 0) -> None:
        super().__init__(process, steps)
        self.timesteps = evenly_in_log_snr(process, steps, last_timestep)


def evenly_in_log_snr(
    process: NoiseProcess, steps: int, last_timestep: int = 0, first_timestep: int | None = None
) -> list[int]:
    """N timesteps evenly spaced in half log SNR, noisiest first, down to ``last_timestep``.

    With few steps evenly spaced in time, the last would jump from mild noise to none and lose fine variation.
    ``first_timestep`` is the noisiest training timestep by default. A half log SNR below -5 counts as -5.

    Raises:
        UsageError: there are fewer than N timesteps.
    """
    half_log_snr = process.half_log_snr
    first = len(half_log_snr) - 1 if first_timestep is None else first_timestep
    if last_timestep + steps > first + 1:
        raise UsageError(
            f"steps: {steps} must be at most {first + 1 - last_timestep}, the timesteps from sampling.last_timestep "
            f"{last_timestep} on"
        )
    noisiest, cleanest = max(-5.0, half_log_snr[first].item()), half_log_snr[last_timestep].item()
    goals = torch.linspace(noisiest, cleanest, steps, dtype=torch.float64)
    timesteps = [first]
    for done, goal in enumerate(goals[1:].tolist(), start=1):
        nearest = int((half_log_snr - goal).abs().argmin())
        timesteps.append(max(min(nearest, timesteps[-1] - 1), last_timestep + steps - 1 - done))
    return timesteps


class DpmSolverSampler(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022): second order, good with 8 to 20 steps."""

    name = "dpm++"
    description = "DPM-Solver++(2M), second order, good with 8 to 20 steps"

    def __init__(self, process: NoiseProcess, steps: int, last_timestep: int = 0) -> None:
        super().__init__(process, steps)
        self.timesteps = evenly_in_log_snr(process, steps, last_timestep)
        self._alpha = [*process.alpha[self.timesteps].tolist(), 1.0]
        self._sigma = [*process.sigma[self.timesteps].tolist(), 0.0]
        self._half_log_snr = process.half_log_snr[self.timesteps].tolist()
        self._before: Tensor | None = None

    def start(self, x: Tensor) -> Tensor:
        self._before = None
        return x

    def step(self, index: int, x: Tensor, output: Tensor, noise: DrawNoise) -> Tensor:
        latents, _ = self._split(index, x, output)
        before, self._before = self._before, latents
        if index == len(self.timesteps) - 1:
            return latents
        lam = self._half_log_snr
        step = lam[index + 1] - lam[index]
        if before is not None:  # extrapolate linearly in half log SNR
            latents = latents + (latents - before) * (step / (2 * (lam[index] - lam[index - 1])))
        ratio = self._sigma[index + 1] / self._sigma[index]
        return ratio * x - self._alpha[index + 1] * float(np.expm1(-step)) * latents


samplers: Registry[type[Sampler]] = _samplers
"""All samplers, by name."""


class DiffusersSampler(Sampler):
    """Any scheduler class of the diffusers library (extra ``latent``), configured for the noise process."""

    def __init__(self, process: NoiseProcess, steps: int, name: str) -> None:
        super().__init__(process, steps)
        try:
            import diffusers
        except ImportError:
            raise UsageError(
                f"sampler: {name!r} is not one of {', '.join(samplers)}; pip install 'ca2vdm[latent]' adds more"
            ) from None
        if process.config.flow:
            raise UsageError(
                f"sampler: {name!r} is for variance-preserving processes; flow matching takes ddim or dpm++"
            )
        scheduler_class = getattr(diffusers, name, None)
        if name in _OTHER_PROCESSES or "trained_betas" not in _parameters(scheduler_class):
            raise UsageError(
                f"sampler: {name!r} is not one of {', '.join(samplers)}, nor a diffusers scheduler for this noise "
                "process (such as UniPCMultistepScheduler)"
            )
        cumulative = process.cumulative
        betas = 1 - cumulative / torch.cat([torch.ones(1, dtype=cumulative.dtype), cumulative[:-1]])
        settings = {
            "num_train_timesteps": len(cumulative),
            "trained_betas": betas.tolist(),
            "prediction_type": {"epsilon": "epsilon", "v": "v_prediction"}[process.config.prediction.value],
            "clip_sample": False,
        }
        try:
            self._scheduler = scheduler_class.from_config(settings)  # type: ignore[union-attr]
            self._scheduler.set_timesteps(steps)
        except Exception as error:  # whatever a third party's constructor raises
            raise UsageError(f"sampler: {name} can't be used here ({first_line(error)})") from error
        self._steps = steps
        self._random = "generator" in _parameters(self._scheduler.step)
        self.timesteps = [float(t) for t in self._scheduler.timesteps]

    def start(self, x: Tensor) -> Tensor:
        self._scheduler.set_timesteps(self._steps, device=x.device)  # resets its state
        return x * float(self._scheduler.init_noise_sigma)

    def scale_input(self, index: int, x: Tensor) -> Tensor:
        out: Tensor = self._scheduler.scale_model_input(x, self._scheduler.timesteps[index])
        return out

    def noised(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        timestep = self._scheduler.timesteps[index : index + 1]
        out: Tensor = self._scheduler.add_noise(latents, noise, timestep.to(latents.device))
        return out

    def step(self, index: int, x: Tensor, output: Tensor, noise: DrawNoise) -> Tensor:
        arguments = {}
        if self._random:  # one generator per video, seeded by that video's noise
            seeds = noise(index).flatten(1)[:, 0].cpu().double().mul(2**40).long().abs().tolist()
            arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        out: Tensor = self._scheduler.step(
            output[:, : x.shape[1]], self._scheduler.timesteps[index], x, return_dict=False, **arguments
        )[0]
        return out


_OTHER_PROCESSES = frozenset({"IPNDMScheduler", "UnCLIPScheduler", "DDIMInverseScheduler"})
"""diffusers schedulers that accept betas but sample another process."""


def _parameters(function: object) -> Container[str]:
    try:
        return inspect.signature(function).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ()


def make_sampler(name: str, process: NoiseProcess, steps: int, last_timestep: int = 0) -> Sampler:
    """The sampler with that name: a registered one, or a scheduler class of diffusers.

    Args:
        name: a registered name, or the name of a class in diffusers.
        process: the model's noise process.
        steps: N.
        last_timestep: the cleanest timestep; samplers that can't choose it ignore it.

    Raises:
        UsageError: there is no such sampler, or it does not support this process or number of steps.
    """
    if name in samplers:
        return samplers[name](process, steps, last_timestep)
    return DiffusersSampler(process, steps, name)


def sampler_for(
    process: NoiseProcess, sampling: SamplingConfig, *, name: str | None = None, steps: int | None = None
) -> Sampler:
    """The sampler that a preset names.

    Args:
        process: the preset's noise process.
        sampling: the preset's ``sampling`` section.
        name: a sampler to use instead of the preset's.
        steps: a number of steps to use instead of the preset's.

    Raises:
        UsageError: see ``make_sampler``.
    """
    steps = sampling.steps if steps is None else steps
    return make_sampler(name or sampling.sampler, process, steps, sampling.last_timestep)
