"""Training: the steps of one run. ``loop`` has the loop around them.

Shape letters: B clips of one forward of one process, C channels, T frames, h, w latent size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ca2vdm_cli.atomic import write_file
from ca2vdm_cli.config import Preset, Trainable, TrainingConfig
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.samplers import Sampler, make_sampler
from ca2vdm_cli.loading import build_model
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.presets import PRESET_FILE, dump_preset
from ca2vdm_cli.runtime import peak_memory

from .average import WeightAverage
from .batches import CLIP, ROLLOUT, Batches, EncodedBatch, TrainingData
from .distillation import Distillation
from .lora import add_adapters
from .loss import Draw, Objective
from .optimizers import RATES, learning_rate_share, make_optimizers
from .reports import StepReport
from .rollout import self_forcing_rollout
from .run_folder import RunFolder
from .sharding import make_sharding
from .state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

TEMPORAL_LAYERS = ("attn_temp", "attn_temp_pre_merge", "attn_cf")
"""Layers of a block that video adds to an image model."""


class Trainer:
    """Trains a model step by step. Batches, the state on disk and sharding are objects of their own.

    Args:
        preset: what to train and how; ``training.steps`` is the last step.
        data: clips and encoders.
        backend: how to run the model.
        accelerator: devices and processes.
        seed: seed of all randomness.
        teacher: a frozen model to distill into one that needs few steps, see ``distillation``.
        facts: what checkpoints remember besides tensors, for resuming.

    Raises:
        UsageError: a batch size that is not divisible by the number of processes, a kind of sharding that does not fit
            the settings, or a sampler that rollouts can't use.
    """

    def __init__(
        self,
        preset: Preset,
        data: TrainingData,
        backend: Backend,
        accelerator: Accelerator,
        seed: int = 0,
        teacher: CausalVideoTransformer | None = None,
        facts: dict[str, str] | None = None,
    ) -> None:
        training = preset.training
        self.preset, self.accelerator, self.device = preset, accelerator, accelerator.device
        self.facts = {"seed": str(seed), "steps": str(training.steps), **(facts or {})}
        self.batches = Batches(preset, data, accelerator, seed)
        self.sharding = make_sharding(accelerator)
        torch.manual_seed(seed)
        self.model = build_model(preset.model, backend, device=self.device, trainable=True)
        self.model.gradient_checkpointing = training.gradient_checkpointing
        choose_trainable(self.model, training)
        process = NoiseProcess(preset.diffusion)
        self.objective = Objective(self.model, process, training)
        last_timestep = 0  # of rollouts
        if teacher is not None:
            last_timestep = preset.sampling.last_timestep  # a student knows its own sampler's timesteps only
            self.objective = Distillation(self.model, process, training, teacher, preset.distillation, last_timestep)
        self._rollout_sampler: Sampler | None = None
        if training.rollout_share:
            name, steps = preset.sampling.sampler, training.rollout_steps
            self._rollout_sampler = make_sampler(name, process, steps, last_timestep)
        optimizers = make_optimizers(self.model, training)
        self._peak_rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
        self._forward, self.optimizers = self.sharding.prepare(self.objective, optimizers, training, self.batches.size)
        average = WeightAverage(self.model, training.ema_decay)
        self.state = TrainingState(self.model, self.optimizers, average, self.sharding)
        self._fetched: list[EncodedBatch] = []
        self._fetch_seconds = 0.0
        self.whole = True
        """Whether weights and moments belong to the same step, so that they can be saved."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def fetch(self, waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Read and encode the clips of the next step, unless that is done; ``train_step`` does it if need be.

        Args:
            waiting: called now and then while worker processes are awaited, with the seconds so far; what it raises
                passes through, and the clips can be fetched later.

        Raises:
            UserError: no video is usable any more, or a worker has died.
        """
        started = time.perf_counter()
        while len(self._fetched) < self.preset.training.accumulation:
            caption = self.model.unconditional_caption(self.batches.size)
            self._fetched.append(self.batches.next(self.step, len(self._fetched), caption, waiting))
        self._fetch_seconds += time.perf_counter() - started

    def train_step(self) -> StepReport:
        """Run one optimizer step.

        Raises:
            UserError: clips can't be read, or the gradient is not finite; the weights are as before the step.
        """
        self.fetch()
        batches, self._fetched = self._fetched, []
        started, self._fetch_seconds = time.perf_counter() - self._fetch_seconds, 0.0
        training, step = self.preset.training, self.step
        prefix, chunks = self.batches.lengths(step)
        rate = learning_rate_share(step, training)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * self._peak_rates[name]
        self.model.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        terms: list[dict[str, Tensor]] = []
        for part, batch in enumerate(batches):
            with self.sharding.accumulate(self._forward, last=part == training.accumulation - 1):
                loss, loss_terms = self._loss(batch, prefix, chunks)
                self.accelerator.backward(loss / training.accumulation)
            losses.append(loss.detach())
            terms.append(loss_terms)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), training.gradient_clip))
        if not math.isfinite(norm):
            self.whole = False  # the weights or moments may hold what the gradient does
            rates = " and ".join(f"training.{RATES[name]} (now {self._peak_rates[name]})" for name in self.optimizers)
            raise UserError(
                f"step {step + 1}: the gradient is {norm}; lower {rates}, and resume from the last checkpoint if there "
                "is one"
            )
        self.whole = False
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.state.average.update(step)
        self.state.step += 1
        self.whole = True
        seconds = time.perf_counter() - started
        return StepReport(
            step=self.step,
            loss=self._mean(torch.stack(losses)),
            terms={name: self._mean(torch.stack([part[name] for part in terms])) for name in terms[0]},
            learning_rate=rate * training.learning_rate,
            gradient_norm=norm,
            prefix=prefix,
            seconds=seconds,
            data_seconds=sum(batch.data_seconds for batch in batches),
            encode_seconds=sum(batch.encode_seconds for batch in batches),
            frames=training.batch_size * chunks * self.preset.model.chunk_frames,
            memory_bytes=peak_memory(self.device),
        )

    def _loss(self, batch: EncodedBatch, prefix: int, chunks: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on a batch, with its terms by name."""
        draws = [self.objective.draw(prefix, chunks, self.batches.generator(CLIP, index)) for index in batch.indices]
        context = self._roll_out(batch, prefix, chunks)
        with self.accelerator.autocast():  # accelerate's own wrapping leaves FSDP2 out
            draw = Draw.stack(draws).to(self.device)
            loss: tuple[Tensor, dict[str, Tensor]] = self._forward(batch.latents, prefix, draw, batch.text, context)
            return loss

    def _roll_out(self, batch: EncodedBatch, prefix: int, chunks: int) -> Tensor | None:
        """Clean frames generated by the model itself, in the steps that train on such frames; else None."""
        training, sampler = self.preset.training, self._rollout_sampler
        drawn = float(torch.rand((), generator=self.batches.generator(ROLLOUT, self.step)))
        if sampler is None or chunks == 1 or drawn >= training.rollout_share:
            return None
        generators = [self.batches.generator(ROLLOUT, 2**32 + index) for index in batch.indices]
        strength, latents, text = training.rollout_strength, batch.latents, batch.text
        with self.accelerator.autocast():
            return self.objective.run(
                lambda: self_forcing_rollout(self.model, sampler, latents, prefix, chunks, strength, generators, text)
            )

    def _mean(self, values: Tensor) -> float:
        """Mean over all processes."""
        mean: Tensor = self.accelerator.reduce(values.mean(), reduction="mean")
        return mean.item()

    def stop_at(self, steps: int) -> None:
        """Change the last step, and the learning rate's schedule with it."""
        self.preset = replace(self.preset, training=replace(self.preset.training, steps=steps))
        self.facts["steps"] = str(steps)

    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint: the averaged weights, for sampling, and the state to resume from."""
        self.state.save(folder, self.facts)

    def close(self) -> None:
        """End the processes that read clips."""
        self.batches.close()


def choose_trainable(model: CausalVideoTransformer, training: TrainingConfig) -> None:
    """Freeze the weights that ``training.trainable`` leaves out; with ``lora``, add the adapters."""
    if training.trainable is Trainable.LORA:
        model.requires_grad_(False)
        add_adapters(model.blocks, training.lora_rank, training.lora_alpha)
    elif training.trainable is Trainable.TEMPORAL:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(layer in name.split(".") for layer in TEMPORAL_LAYERS))


def write_preset(preset: Preset, folder: Path) -> None:
    """Write the resolved preset beside the weights, which makes the folder a preset for sampling."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / PRESET_FILE, dump_preset(preset))
