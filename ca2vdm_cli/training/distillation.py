"""Few-step distillation: a student that samples in N steps, from a teacher that needs many.

Multistep consistency (Heek et al. 2024, after Song et al. 2023): the noise range is divided into N parts. From any
point of a part, the student should jump to where the teacher's path leaves that part. Its target is one step of the
teacher, followed by the student's own jump from there, without a gradient. With several parts the student need not map
pure noise to latents in one jump. Its samples approximate the teacher's for the same noise, so that the two can be
compared frame by frame, and unlike distribution matching, no second network has to be trained.

Shapes: noisy chunks (N, C, l, h, w) with timesteps (N,), N = B·J.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, pairwise

import torch
from torch import Tensor

from ca2vdm_cli.config import DistillationConfig, DistillationSampler, TrainingConfig
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.samplers import evenly_in_log_snr, trailing
from ca2vdm_cli.model.transformer import CausalVideoTransformer

from .loss import Draw, Objective, Predict

CLEAN = -1
"""Stands for no noise at all; as an index, it is the last entry of tables by timestep."""


class Distillation(Objective):
    """The training objective with targets from a teacher; clips, prefixes and chunks are as without one.

    Args:
        model: the student.
        process: the noise process of both models.
        training: as for ``Objective``; timesteps are drawn uniformly from the teacher's.
        teacher: the teacher, frozen.
        distillation: the preset's ``distillation`` section.
        last_timestep: where the last part begins, if the student's sampler supports choosing it.

    Raises:
        UsageError: more steps than there are timesteps.
    """

    def __init__(
        self,
        model: CausalVideoTransformer,
        process: NoiseProcess,
        training: TrainingConfig,
        teacher: CausalVideoTransformer,
        distillation: DistillationConfig,
        last_timestep: int = 0,
    ) -> None:
        super().__init__(model, process, training)
        self._teacher = (teacher,)  # in a tuple, so that it is not a submodule, which would be trained and saved
        parts = noise_parts(process, distillation, last_timestep)
        ends = [*(part[0] for part in parts[1:]), CLEAN]
        self._grid = torch.tensor(list(chain.from_iterable(parts)))
        self._next = torch.cat([self._grid[1:], torch.tensor([CLEAN])])
        """For each of the teacher's timesteps, the next one."""
        self._end = torch.tensor([end for part, end in zip(parts, ends, strict=True) for _ in part])
        """For each of the teacher's timesteps, where the student's jump ends."""
        self._alpha = torch.cat([process.alpha, torch.ones(1, dtype=torch.float64)])
        self._sigma = torch.cat([process.sigma, torch.zeros(1, dtype=torch.float64)])

    def draw(self, prefix: int, chunks: int, generator: torch.Generator | None = None) -> Draw:
        """One clip's random numbers, with timesteps drawn from the teacher's."""
        draw = super().draw(prefix, chunks, generator)
        index = torch.randint(len(self._grid), (1, chunks), generator=generator)
        return replace(draw, timestep=self._grid[index])

    @torch.no_grad()
    def target(self, latents: Tensor, noise: Tensor, x: Tensor, timestep: Tensor, predict: Predict) -> Tensor:
        """The prediction for which the student's jump ends where one teacher step plus the student's own jump end."""
        index = torch.searchsorted(-self._grid, -timestep)
        after, end = self._next[index], self._end[index]
        closer = self._jump(predict(self._teacher[0], x, timestep), x, timestep, after)
        arrived = (after == end).view(-1, 1, 1, 1, 1).to(x.device)
        before = after.clamp(min=0)
        goal = torch.where(arrived, closer, self._jump(predict(self.model, closer, before), closer, before, end))
        (alpha, sigma), (alpha_end, sigma_end) = self._tables(timestep, x), self._tables(end, x)
        ratio = sigma_end / sigma
        predicted = (goal - ratio * x) / (alpha_end - ratio * alpha)  # latents
        return self.process.target(predicted, (x - alpha * predicted) / sigma, timestep)

    def _jump(self, output: Tensor, x: Tensor, timestep: Tensor, to: Tensor) -> Tensor:
        """A DDIM step from x at a timestep to a cleaner one."""
        latents, noise = self.process.split(output[:, : x.shape[1]], x, timestep)
        alpha, sigma = self._tables(to, x)
        return alpha * latents + sigma * noise

    def _tables(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (N, 1, 1, 1, 1) at each timestep; 1 and 0 at ``CLEAN``."""
        alpha, sigma = (table[timestep].view(-1, 1, 1, 1, 1).to(like) for table in (self._alpha, self._sigma))
        return alpha, sigma


def noise_parts(process: NoiseProcess, config: DistillationConfig, last_timestep: int = 0) -> list[list[int]]:
    """The teacher's timesteps in each of the N parts of the noise range, noisiest first.

    Each part begins where a step of the student's sampler begins. With ``log-snr``, each part is again divided evenly
    in log SNR, except the last, from ``last_timestep`` to clean latents, which the teacher also crosses in one step.
    """
    part_steps = config.teacher_steps // config.steps
    if config.sampler is DistillationSampler.TRAILING:
        grid = trailing(process.config.train_timesteps, config.teacher_steps)
        return [grid[i : i + part_steps] for i in range(0, len(grid), part_steps)]
    starts = evenly_in_log_snr(process, config.steps, last_timestep)
    parts = [evenly_in_log_snr(process, min(part_steps, a - b) + 1, b, a)[:-1] for a, b in pairwise(starts)]
    return [*parts, [starts[-1]]]
