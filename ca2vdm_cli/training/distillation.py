"""Few-step distillation: a student that crosses the noise range in N steps, from a teacher that needs many.

Multistep consistency (Heek et al. 2024, after Song et al. 2023): the range is cut into N parts, and wherever in a part
the student is asked, it should jump to the same point at the part's end. Its target is one step of the teacher along
the part, then its own jump from there, without a gradient. With N parts the student need not map all noise to latents
at once, as with one part, and its samples stay those of the teacher for the same noise, so that the two can be compared
frame by frame; no second network has to be trained beside it, as distribution matching needs.

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
"""The timestep without noise, and the last entry of tables by timestep."""


class Distillation(Objective):
    """The objective with a teacher's targets; everything about clips, prefixes and chunks stays as it is.

    Args:
        model: the student.
        process: the noise process of both.
        training: as for ``Objective``; timesteps are drawn from the teacher's, all alike.
        teacher: frozen.
        distillation: steps of both.
        last_timestep: where the last part begins, if the student's sampler lets one choose.

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
        self._teacher = (teacher,)  # in a tuple, so that it is no part of what is trained, averaged and saved
        parts = noise_parts(process, distillation, last_timestep)
        ends = [*(part[0] for part in parts[1:]), CLEAN]
        self._grid = torch.tensor(list(chain.from_iterable(parts)))
        self._next = torch.cat([self._grid[1:], torch.tensor([CLEAN])])
        """The teacher's next timestep, for each of its own."""
        self._end = torch.tensor([end for part, end in zip(parts, ends, strict=True) for _ in part])
        """Where the student's jump ends, for each of the teacher's timesteps."""
        self._alpha = torch.cat([process.alpha, torch.ones(1, dtype=torch.float64)])
        self._sigma = torch.cat([process.sigma, torch.zeros(1, dtype=torch.float64)])

    def draw(self, prefix: int, chunks: int, generator: torch.Generator | None = None) -> Draw:
        """One clip's random numbers, with timesteps of the teacher's."""
        draw = super().draw(prefix, chunks, generator)
        index = torch.randint(len(self._grid), (1, chunks), generator=generator)
        return replace(draw, timestep=self._grid[index])

    @torch.no_grad()
    def target(self, latents: Tensor, noise: Tensor, x: Tensor, timestep: Tensor, ask: Predict) -> Tensor:
        """The prediction whose jump ends where a teacher's step and the student's jump from there do."""
        place = torch.searchsorted(-self._grid, -timestep)
        after, end = self._next[place], self._end[place]
        closer = self._jump(ask(self._teacher[0], x, timestep), x, timestep, after)
        arrived = (after == end).view(-1, 1, 1, 1, 1).to(x.device)
        before = after.clamp(min=0)
        goal = torch.where(arrived, closer, self._jump(ask(self.model, closer, before), closer, before, end))
        (alpha, sigma), (alpha_end, sigma_end) = self._tables(timestep, x), self._tables(end, x)
        ratio = sigma_end / sigma
        found = (goal - ratio * x) / (alpha_end - ratio * alpha)
        return self.process.target(found, (x - alpha * found) / sigma, timestep)

    def _jump(self, output: Tensor, x: Tensor, timestep: Tensor, to: Tensor) -> Tensor:
        """DDIM's step from x at a timestep to a later one."""
        latents, noise = self.process.split(output[:, : x.shape[1]], x, timestep)
        alpha, sigma = self._tables(to, x)
        return alpha * latents + sigma * noise

    def _tables(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (N, 1, 1, 1, 1); 1 and 0 at ``CLEAN``."""
        alpha, sigma = (table[timestep].view(-1, 1, 1, 1, 1).to(like) for table in (self._alpha, self._sigma))
        return alpha, sigma


def noise_parts(process: NoiseProcess, config: DistillationConfig, last_timestep: int = 0) -> list[list[int]]:
    """The teacher's timesteps in each of the N parts of the noise range, noisiest first.

    Each part begins where a step of the student's sampler does. ``log-snr`` cuts them evenly in log SNR again, but for
    the last, from ``last_timestep`` to clean, which the teacher crosses in one step as well.
    """
    each = config.teacher_steps // config.steps
    if config.sampler is DistillationSampler.TRAILING:
        grid = trailing(process.config.train_timesteps, config.teacher_steps)
        return [grid[i : i + each] for i in range(0, len(grid), each)]
    begins = evenly_in_log_snr(process, config.steps, last_timestep)
    parts = [evenly_in_log_snr(process, min(each, a - b) + 1, b, a)[:-1] for a, b in pairwise(begins)]
    return [*parts, [begins[-1]]]
