"""Training: the clean-prefix objective on clips, with everything a run needs to go on later.

Shape letters: B clips of this process and forward, C channels, T frames, H, W pixels, h, w latent size.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.autoencoder import Autoencoder
from ca2vdm_cli.checkpoint import load_weights
from ca2vdm_cli.config import Preset, Schedule, Trainable, TrainingConfig
from ca2vdm_cli.data import Batch, ClipLoader, ClipSource, LatentClips
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.samplers import Sampler, make_sampler
from ca2vdm_cli.interrupts import held_interrupts
from ca2vdm_cli.loading import build_model
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.presets import PRESET_FILE, dump_preset
from ca2vdm_cli.processes import any_process, gather_for, gathered, like
from ca2vdm_cli.runtime import peak_memory
from ca2vdm_cli.text_encoder import TextEncoder
from ca2vdm_cli.training import sharding as zero
from ca2vdm_cli.video_codec import encode_video

from .distillation import Distillation
from .log import StepReport, TrainingLog
from .lora import add_adapters, merged, split
from .loss import Draw, Objective
from .optimizers import make_optimizers
from .rollout import self_forcing_rollout
from .run_folder import STATE_FILE, WEIGHTS_FILE, Checkpoint, RunFolder
from .validation import Validator

if TYPE_CHECKING:
    from accelerate import Accelerator

OTHER_SETTINGS = "not of these settings; resume with those that the run began with"
CLIP, STEP, ROLLOUT, TEXT = 1, 2, 3, 4
"""What random numbers are for: a clip's noise, a step's prefix length, a clip's rollout, or its text dropout."""
RATES = {"adamw": "learning_rate", "muon": "muon_learning_rate"}
"""The setting of each optimizer's peak learning rate."""
TEMPORAL_LAYERS = ("attn_temp", "attn_temp_pre_merge", "attn_cf")
"""Layers of a block that video adds to an image model."""


class Trainer:
    """A model being trained, and the state to go on from: weights, their moving average, optimizer moments, the step.

    All randomness of step n is drawn from (seed, n), and that of a clip from (seed, its number), so a resumed run does
    what an uninterrupted one would have done, and several processes together do what one would have done alone.

    Args:
        preset: what to train and how.
        source: clips, or clips as latents already.
        autoencoder: between pixels and latents.
        backend: how to run the model.
        accelerator: devices and processes.
        steps: the last step, for the learning-rate schedule.
        seed: of everything.
        origin: where clips and teacher come from, remembered for ``--resume``.
        teacher: a trained model to make a few-step student of, see ``distillation``.
        text_encoder: what captions are encoded by; without it a model with text learns its stored caption only.

    Raises:
        UsageError: a batch size that the processes don't divide, an optimizer that can't be shared among them, or a
            sampler that rollouts can't use.
    """

    def __init__(
        self,
        preset: Preset,
        source: ClipSource,
        autoencoder: Autoencoder,
        backend: Backend,
        accelerator: Accelerator,
        steps: int,
        seed: int = 0,
        origin: dict[str, str] | None = None,
        teacher: CausalVideoTransformer | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.preset, self.source, self.autoencoder, self.accelerator = preset, source, autoencoder, accelerator
        self.text_encoder = text_encoder
        self.device, self.steps, self.seed, self.origin = accelerator.device, steps, seed, origin or {}
        self.step = 0
        training = preset.training
        shares = accelerator.num_processes * training.accumulation
        if training.batch_size % shares:
            raise UsageError(
                f"training.batch_size: {training.batch_size} must be a multiple of {shares}, the processes "
                f"({accelerator.num_processes}) times training.accumulation ({training.accumulation})"
            )
        check_sharing(accelerator)
        self.share = training.batch_size // shares
        """Clips of one forward of one process."""
        torch.manual_seed(seed)
        self.model = build_model(preset.model, backend, device=self.device, trainable=True)
        self.model.gradient_checkpointing = training.gradient_checkpointing
        choose_trainable(self.model, training)
        process = NoiseProcess(preset.diffusion)
        self.objective = Objective(self.model, process, training)
        last_timestep = 0  # of rollouts
        if teacher is not None:
            last_timestep = preset.sampling.last_timestep  # a student knows no others than its sampler's
            distillation = preset.distillation
            self.objective = Distillation(self.model, process, training, teacher, distillation, last_timestep)
        self._rollout_sampler: Sampler | None = None
        if training.rollout_share:
            name, steps = preset.sampling.sampler, training.rollout_steps
            self._rollout_sampler = make_sampler(name, process, steps, last_timestep)
        if zero.in_use(accelerator):
            zero.configure(accelerator, training, self.share)
        optimizers = make_optimizers(self.model, training)
        self._peaks = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
        self._forward, *prepared = accelerator.prepare(self.objective, *optimizers.values())
        if accelerator.distributed_type.value == "FSDP":
            gather_for(self.objective, "run")
            for block in self.model.blocks:
                gather_for(block, "text_keys_values")
        self.optimizers: dict[str, torch.optim.Optimizer] = dict(zip(optimizers, prepared, strict=True))
        self.average: dict[str, Tensor] = {}
        self._loader: ClipLoader | None = None
        self._begin_average()

    @property
    def trained_prefixes(self) -> tuple[int, ...]:
        """Prefix lengths that some chunk is trained after, with those of later chunks of a clip."""
        window, chunk = self.preset.model.context_frames, self.preset.model.chunk_frames
        every = {min(window, p + j * chunk) for p in self.preset.prefixes for j in range(self.preset.chunks(p))}
        return tuple(sorted(every))

    def start_from(self, weights: dict[str, Tensor], source: str) -> None:
        """Begin at given weights instead of random ones (fine-tuning)."""
        self._load(split(self.model, weights), source)
        self._begin_average()

    def train_step(self) -> StepReport:
        """One optimizer step."""
        began = time.perf_counter()
        training, chunk = self.preset.training, self.preset.model.chunk_frames
        prefix, chunks = self._draw_lengths(self.step)
        rate = self._learning_rate()
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * self._peaks[name]
        self.model.zero_grad(set_to_none=True)
        data_seconds = encode_seconds = 0.0
        losses: list[Tensor] = []
        parts: list[dict[str, Tensor]] = []
        for part in range(training.accumulation):
            indices = self._clips_of(part)
            clips, waited = self._next_clips()
            data_seconds += waited
            at = time.perf_counter()
            latents, text = self._encode(clips), self._encode_text(clips.captions, indices)
            encode_seconds += time.perf_counter() - at
            draws = [self.objective.draw(prefix, chunks, self._generator(CLIP, index)) for index in indices]
            last = part == training.accumulation - 1
            if zero.in_use(self.accelerator):  # whose step is part of its last backward
                self.accelerator.sync_gradients = last
            with nullcontext() if last else self.accelerator.no_sync(self._forward):
                context = self._roll_out(latents, prefix, chunks, indices, text)
                with self.accelerator.autocast():  # accelerate's own wrapping leaves FSDP2 out
                    loss, terms = self._forward(latents, prefix, Draw.stack(draws).to(self.device), text, context)
                self.accelerator.backward(loss / training.accumulation)
            losses.append(loss.detach())
            parts.append(terms)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), training.gradient_clip))
        if not math.isfinite(norm):
            rates = " and ".join(f"training.{RATES[name]} (now {self._peaks[name]})" for name in self.optimizers)
            raise UserError(
                f"step {self.step + 1}: the gradient is {norm}; train with smaller --set {rates}, from the last "
                "checkpoint if there is one"
            )
        for optimizer in self.optimizers.values():
            optimizer.step()
        self._update_average()
        self.step += 1
        seconds = time.perf_counter() - began
        return StepReport(
            step=self.step,
            loss=self._mean(torch.stack(losses)),
            terms={name: self._mean(torch.stack([part[name] for part in parts])) for name in parts[0]},
            learning_rate=rate * training.learning_rate,
            gradient_norm=norm,
            prefix=prefix,
            seconds=seconds,
            data_seconds=data_seconds,
            encode_seconds=encode_seconds,
            frames=training.batch_size * chunks * chunk,
            memory_bytes=peak_memory(self.device),
        )

    def _generator(self, purpose: int, index: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, purpose, index]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) % 2**63)

    def _draw_lengths(self, step: int) -> tuple[int, int]:
        """Frames before a step's first chunk, and its chunks."""
        training, lengths, generator = self.preset.training, self.preset.prefixes, self._generator(STEP, step)
        weights = torch.tensor(training.prefix_weights or [1.0] * len(lengths), dtype=torch.float64)
        prefix = lengths[int(torch.multinomial(weights, 1, generator=generator))]
        alone = float(torch.rand((), generator=generator)) < training.first_chunk_share
        return prefix, 1 if alone else self.preset.chunks(prefix)

    def _next_clips(self) -> tuple[Batch, float]:
        """The next part's clips, and for how long they were waited for; the first call starts the loader."""
        accumulation = self.preset.training.accumulation

        def frames(part: int) -> int:
            prefix, chunks = self._draw_lengths(part // accumulation)
            return prefix + chunks * self.preset.model.chunk_frames

        if self._loader is None:
            self._loader = ClipLoader(
                self.source,
                frames,
                self.share,
                first=self.step * accumulation,
                workers=self.preset.data.workers,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
            )
        before = self._loader.wait_seconds
        clips = next(self._loader)
        return clips, self._loader.wait_seconds - before

    def close(self) -> None:
        """End the processes that make clips."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _clips_of(self, part: int) -> range:
        """Numbers of the clips that this process takes in one part of this step."""
        processes = self.accelerator.num_processes
        place = (self.step * self.preset.training.accumulation + part) * processes + self.accelerator.process_index
        return range(place * self.share, (place + 1) * self.share)

    @torch.no_grad()
    def _encode(self, clips: Batch) -> Tensor:
        """Clips as latents (B, c, T, h, w)."""
        frames = clips.clips.to(self.device, non_blocking=True)
        if isinstance(self.source, LatentClips):
            return frames.float().transpose(1, 2)
        with self.accelerator.autocast():
            return encode_video(self.autoencoder, frames)

    def _encode_text(self, captions: Sequence[str | None], indices: range) -> tuple[Tensor, Tensor] | None:
        """Captions as embeddings (B, M, text_channels) and masks (B, M); some are dropped. None without text."""
        stored = self.model.unconditional_caption(len(captions))
        if stored is None or self.text_encoder is None:
            return stored
        share = self.preset.training.text_dropout
        dropped = [float(torch.rand((), generator=self._generator(TEXT, index))) < share for index in indices]
        return self.text_encoder(captions, stored, dropped)

    def _roll_out(
        self, latents: Tensor, prefix: int, chunks: int, indices: range, text: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        """The clips' clean frames as the model makes them, in the share of steps that trains on these."""
        training, sampler = self.preset.training, self._rollout_sampler
        drawn = float(torch.rand((), generator=self._generator(ROLLOUT, self.step)))
        if sampler is None or chunks == 1 or drawn >= training.rollout_share:
            return None
        generators = [self._generator(ROLLOUT, 2**32 + index) for index in indices]
        with self.accelerator.autocast():
            strength = training.rollout_strength
            return self.objective.run(
                lambda: self_forcing_rollout(self.model, sampler, latents, prefix, chunks, strength, generators, text)
            )

    def _mean(self, values: Tensor) -> float:
        """Over all processes."""
        mean: Tensor = self.accelerator.reduce(values.mean(), reduction="mean")
        return mean.item()

    def _learning_rate(self) -> float:
        """Share of the peak learning rate."""
        training = self.preset.training
        if self.step < training.warmup_steps:
            return (self.step + 1) / training.warmup_steps
        if training.schedule is Schedule.COSINE:
            done = (self.step - training.warmup_steps) / max(1, self.steps - training.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return 1.0

    def _begin_average(self) -> None:
        self.average = {key: value.detach().clone() for key, value in merged(self.model).items()}

    @torch.no_grad()
    def _update_average(self) -> None:
        """Exponential moving average in float32, shorter at first so that it forgets the random start."""
        decay = min(self.preset.training.ema_decay, (1 + self.step) / (10 + self.step))
        own = merged(self.model)
        for kind in {type(value) for value in self.average.values()}:  # FSDP shares parameters, but not buffers
            keys = [k for k, v in self.average.items() if type(v) is kind and v.is_floating_point()]
            if keys:
                torch._foreach_lerp_([self.average[k] for k in keys], [own[k].detach() for k in keys], 1 - decay)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average, gathered from all processes; empty in all but the first."""
        return gathered(self.average.items(), keep=self.accelerator.is_main_process)

    # ------------------------------------------------------------------------------------------------- on disk
    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint: the averaged weights, which ``sample`` loads, and the state to resume from."""
        main = self.accelerator.is_main_process
        state = gathered(((f"model.{key}", value) for key, value in self.model.state_dict().items()), keep=main)
        for name, key, moments in self._moments():
            state |= gathered(((f"{name}.{key}.{moment}", value) for moment, value in moments.items()), keep=main)
        average = self.averaged_weights()
        if main:
            facts = {"seed": str(self.seed), "steps": str(self.steps), **self.origin}
            folder.save(self.step, facts, {WEIGHTS_FILE: average, STATE_FILE: state})
        self.accelerator.wait_for_everyone()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            UserError: the state of other settings.
        """
        path = checkpoint.folder / STATE_FILE
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("model", *self.optimizers)}
        for key, value in checkpoint.tensors(STATE_FILE).items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise UserError(f"{path}: unknown tensor {key}; {OTHER_SETTINGS}")
            parts[part][name] = value
        self._load(parts.pop("model"), str(path))
        average = checkpoint.tensors(WEIGHTS_FILE)
        if average.keys() != self.average.keys():
            raise UserError(f"{checkpoint.folder / WEIGHTS_FILE}: {OTHER_SETTINGS}")
        self.average = {key: like(average[key], own) for key, own in self.average.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for part, moments in parts.items():
            state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
            optimizer = self.optimizers[part]
            learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if zero.in_use(self.accelerator):
                learned = zero.parameters(optimizer)
            parameters = {names[parameter]: parameter for parameter in learned}
            for key, value in moments.items():
                name, _, moment = key.rpartition(".")
                if name not in parameters:
                    raise UserError(f"{path}: unknown tensor {part}.{key}; {OTHER_SETTINGS}")
                parameter = parameters[name]
                fits = value.shape == parameter.shape
                state[parameter][moment] = like(value, parameter.detach()) if fits else value
            if zero.in_use(self.accelerator):
                zero.set_state(optimizer, state)
            else:
                optimizer.state.update(state)
        self.step = checkpoint.step

    def _moments(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """Each optimizer's moments of each parameter, by the names of both."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, inner in self.optimizers.items():
            state = zero.whole_state(inner) if zero.in_use(self.accelerator) else inner.state
            for parameter, moments in state.items():
                yield optimizer, names[parameter], moments

    def _load(self, weights: dict[str, Tensor], source: str) -> None:
        own = self.model.state_dict()
        load_weights(self.model, {k: like(v, own[k]) if k in own else v for k, v in weights.items()}, source)
        if zero.in_use(self.accelerator):
            for optimizer in self.optimizers.values():
                zero.refresh(optimizer)


def check_sharing(accelerator: Accelerator) -> None:
    """Refuse ways of sharing weights that don't fit the model.

    Raises:
        UsageError: FSDP of the first version, or with units that are smaller than a block.
    """
    if accelerator.distributed_type.value != "FSDP":
        return
    if not accelerator.is_fsdp2:
        raise UsageError("FSDP: its first version is not supported; accelerate launch --fsdp_version 2")
    if accelerator.state.fsdp_plugin.min_num_params:
        raise UsageError("FSDP: a block must stay whole; --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP or NO_WRAP")


def choose_trainable(model: CausalVideoTransformer, training: TrainingConfig) -> None:
    """Freeze what is not to be trained, and add what is to be trained instead."""
    if training.trainable is Trainable.LORA:
        model.requires_grad_(False)
        add_adapters(model.blocks, training.lora_rank, training.lora_alpha)
    elif training.trainable is Trainable.TEMPORAL:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(layer in name.split(".") for layer in TEMPORAL_LAYERS))


def train(
    trainer: Trainer,
    folder: RunFolder,
    on_step: Callable[[StepReport], None],
    validator: Validator | None = None,
) -> None:
    """Train to the last step, saving and validating as the preset says, and at the end.

    A new run saves before its first step, to be resumed from there on. An interrupt waits for the step's end and saves.
    A step that fails (a gradient that is not finite) saves nothing: the last checkpoint is what to go on from.
    """
    training, main = trainer.preset.training, trainer.accelerator.is_main_process
    with (
        closing(trainer),
        TrainingLog(folder, trainer.step, active=main) as log,
        held_interrupts() as interrupted,
    ):
        if trainer.step == 0:
            trainer.save(folder)
        while trainer.step < trainer.steps and not any_process(trainer.accelerator, interrupted()):
            report = trainer.train_step()
            log.step(report)
            on_step(report)
            done = trainer.step == trainer.steps
            if trainer.step % training.checkpoint_every == 0 or done:
                trainer.save(folder)
            if training.validate_every and (trainer.step % training.validate_every == 0 or done):
                weights = trainer.averaged_weights()
                if main and validator is not None:
                    log.validation(validator(weights, trainer.step))
        trainer.save(folder)


def write_preset(preset: Preset, folder: Path) -> None:
    """Put the resolved preset beside the weights, so that ``--preset FOLDER`` is all that ``sample`` needs."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{PRESET_FILE}.partial"
    temporary.write_text(dump_preset(preset), encoding="utf-8")
    temporary.replace(folder / PRESET_FILE)
