"""The training objective: clean prefix at timestep 0, loss on the noisy chunks (Ca2-VDM, section 3.2).

Shape letters: B batch, C channels, T frames (P clean, then J chunks of l), h, w latent size, M text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca2vdm_cli.config import TemporalPositions, TrainingConfig
from ca2vdm_cli.generate.diffusion import NoiseProcess, variational_bound
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer


@dataclass(frozen=True)
class Draw:
    """The random numbers of a batch. A clip's numbers don't depend on its batch."""

    timestep: Tensor
    """(B, J) int64: timesteps of the noisy chunks."""
    noise: Tensor
    """(B, C, J·l, h, w): noise of the noisy chunks."""
    prefix_level: Tensor
    """(B, P) int64: timesteps of the noise on clean frames; (B, 0) if they get none."""
    prefix_noise: Tensor
    """(B, C, P, h, w): noise on clean frames; P is 0 if they get none."""
    offset: Tensor
    """(B, 1) in [0, 1): where a full clip starts in the position table, as a share of the possible starts."""

    def to(self, device: torch.device) -> Draw:
        """A copy on a device; timesteps stay on the CPU, like the tables that they index."""
        return replace(self, noise=self.noise.to(device), prefix_noise=self.prefix_noise.to(device))

    @classmethod
    def stack(cls, draws: Sequence[Draw]) -> Draw:
        """Concatenate the draws of several batches."""
        return cls(*(torch.cat([getattr(draw, field.name) for draw in draws]) for field in fields(cls)))


Predict = Callable[[CausalVideoTransformer, Tensor, Tensor], Tensor]
"""A network's output for noisy chunks (B*J, C, l, h, w) with timesteps (B*J,), in the context of this batch."""


class Objective(nn.Module):
    """What training minimizes: the network with its loss, as one module, which DDP and FSDP wrap as a whole.

    Args:
        model: the network.
        process: its noise process.
        training: sets the timestep shift and the weight of the variance term.
    """

    _no_split_modules = ("Block",)
    """Units of FSDP, as read by accelerate."""

    def __init__(self, model: CausalVideoTransformer, process: NoiseProcess, training: TrainingConfig) -> None:
        super().__init__()
        self.model, self.process, self.training_config = model, process, training

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Call a function that uses the network outside ``forward``; FSDP gathers weights in these two methods only."""
        return function()

    def clean_frames(self, prefix: int, chunks: int) -> int:
        """Number of clean input frames: all but those of the last chunk."""
        return prefix + (chunks - 1) * self.model.config.chunk_frames

    def draw(self, prefix: int, chunks: int, generator: torch.Generator | None = None) -> Draw:
        """One clip's random numbers, from its own CPU generator (B = 1)."""
        config = self.model.config
        channels, length, *size = config.chunk_shape
        timestep = self.process.draw_timesteps(chunks, self.training_config.timestep_shift, generator)
        noise = torch.cat([self.process.draw_noise(config.chunk_shape, generator) for _ in range(chunks)], dim=1)
        level = self.process.draw_levels(self.clean_frames(prefix, chunks), length, generator)
        prefix_noise = torch.randn((channels, len(level), *size), generator=generator)
        offset = torch.rand(1, generator=generator)
        return Draw(timestep[None], noise[None], level[None], prefix_noise[None], offset[None])

    def target(self, latents: Tensor, noise: Tensor, x: Tensor, timestep: Tensor, predict: Predict) -> Tensor:
        """What the network should predict for x; all (B*J, C, l, h, w) with timesteps (B*J,)."""
        return self.process.target(latents, noise, timestep)

    def forward(
        self,
        clip: Tensor,
        prefix: int,
        draw: Draw,
        text: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on a batch.

        Args:
            clip: latents (B, C, T, h, w), T at least P + J·l; further frames are ignored.
            prefix: P, clean frames before the first chunk; clean frames carry timestep 0.
            draw: random numbers of J chunks. Each chunk is conditioned on the clean frames before it and noised to its
                own timestep; all share one pass over the clean frames.
            text: embedding (B, M, text_channels) and mask (B, M) for models with text.
            context: clean input frames (B, C, P + (J-1)·l, h, w) to use instead of the clip's.

        Returns:
            The loss (mean over the chunks), and its terms by name, detached, (B, J) each.
        """
        config, process = self.model.config, self.process
        batch, chunks = draw.timestep.shape
        frames, clean = prefix + chunks * config.chunk_frames, self.clean_frames(prefix, chunks)
        latents = _by_chunk(clip[:, :, prefix:frames], chunks)  # (B*J, C, l, h, w)
        noise, timestep = _by_chunk(draw.noise, chunks), draw.timestep.flatten()
        x = process.add_noise(latents, noise, timestep)
        context = clip[:, :, :clean] if context is None else context
        if draw.prefix_level.shape[1]:
            context = process.add_noise(context, draw.prefix_noise, draw.prefix_level)

        window = TemporalWindow(config, sink_frames=None if chunks > 1 else 0)
        if chunks == 1:
            plan = self.model.context_plan(config.chunk_frames, prefix, window)
        else:
            plan = self.model.parallel_plan(prefix, chunks, window)
        rotary = config.temporal_positions is TemporalPositions.ROPE
        if frames >= window.slots and not rotary and not window.sink_frames:  # sinks keep their positions
            # full clips start anywhere in a table that wraps, and wherever they fit in one that does not
            cyclic = config.temporal_positions is TemporalPositions.CYCLIC
            starts = window.table if cyclic else window.table - frames + 1
            offset = (draw.offset * starts).long().to(clip.device)
            plan = replace(plan, positions=(plan.positions + offset) % window.table)
        keys_values = self.model.text_keys_values(*text) if text is not None else []

        def predict(model: CausalVideoTransformer, x: Tensor, timestep: Tensor) -> Tensor:
            own = keys_values if model is self.model or text is None else model.text_keys_values(*text)
            noisy = x.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)  # (B, C, J*l, h, w)
            steps = timestep.view(batch, chunks).to(clip.device)
            return _by_chunk(model(torch.cat([context, noisy], dim=2), steps, plan, text=own).float(), chunks)

        out = predict(self.model, x, timestep)
        prediction, variance = out[:, : config.in_channels], out[:, config.in_channels :]
        target = self.target(latents, noise, x, timestep, predict)
        mse = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)  # (B*J,)
        terms, loss = {"mse": mse}, mse.mean()
        if config.learn_variance:
            terms["vlb"] = variational_bound(process, latents, x, timestep, prediction.detach(), variance)
            weight = self.training_config.variance_weight * process.config.train_timesteps
            loss = loss + weight * terms["vlb"].mean()
        return loss, {name: term.detach().view(batch, chunks) for name, term in terms.items()}


def _by_chunk(x: Tensor, chunks: int) -> Tensor:
    """(B, C, J*l, h, w) -> (B*J, C, l, h, w)."""
    return x.unflatten(2, (chunks, -1)).transpose(1, 2).flatten(0, 1)
