"""Training: the clean-prefix objective on clips, with everything a run needs to go on later."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .attention import Backend
from .autoencoder import Autoencoder
from .checkpoint import load_tensors, load_weights, save_tensors
from .config import Optimizer, Precision, Preset, Schedule, TrainingConfig
from .data import ClipSource, batch
from .diffusion import NoiseProcess, training_loss
from .errors import UserError
from .interrupts import held_interrupts
from .model import CausalVideoTransformer
from .presets import PRESET_FILE, dump_preset

WEIGHTS_FILE = "model.safetensors"
AUTOENCODER_FILE = "autoencoder.safetensors"
STATE_FILE = "training-state.safetensors"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Steps done."""
    loss: float
    terms: dict[str, float]
    """The loss's parts by name."""
    learning_rate: float
    gradient_norm: float
    prefix: int
    """Frames of clean prefix before the first chunk."""
    seconds: float
    data_seconds: float
    """Of these, making clips and encoding them."""
    frames: int
    """Frames that the loss was on."""


class Trainer:
    """A model being trained, and the state to go on from: weights, their moving average, optimizer moments, the step.

    All randomness of step n (clips, prefix length, timesteps, noise) is drawn from (seed, n), so a resumed run does
    what an uninterrupted one would have done.

    Args:
        preset: what to train and how.
        source: clips.
        autoencoder: between pixels and latents.
        backend: how to run the model.
        device: where.
        steps: the last step, for the learning-rate schedule.
        seed: of everything.
        origin: where the clips come from and how they are fitted, remembered for ``--resume``.
    """

    def __init__(
        self,
        preset: Preset,
        source: ClipSource,
        autoencoder: Autoencoder,
        backend: Backend,
        device: torch.device,
        steps: int,
        seed: int = 0,
        origin: dict[str, str] | None = None,
    ) -> None:
        self.preset, self.source, self.autoencoder = preset, source, autoencoder
        self.device, self.steps, self.seed, self.origin = device, steps, seed, origin or {}
        self.step = 0
        torch.manual_seed(seed)
        self.model = CausalVideoTransformer(preset.model, backend).to(device).train()
        self.process = NoiseProcess(preset.diffusion)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizers = make_optimizers(self.model, preset.training)
        self._peaks = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Prefix lengths that a step draws from."""
        model, training = self.preset.model, self.preset.training
        if training.prefix_lengths:
            return training.prefix_lengths
        empty = [0] if self.preset.diffusion.unconditional_start else []
        if training.parallel_chunks:
            return tuple(empty or [1])
        return (*empty, *range(1, model.context_frames + 1, model.chunk_frames))

    def chunks(self, prefix: int) -> int:
        """Chunks that are trained in one forward after so many clean frames."""
        model, training = self.preset.model, self.preset.training
        if not training.parallel_chunks:
            return 1
        return max(1, ((training.clip_frames or model.window_frames) - prefix) // model.chunk_frames)

    def start_from(self, weights: dict[str, Tensor], source: str) -> None:
        """Begin at given weights instead of random ones (fine-tuning)."""
        load_weights(self.model, weights, source)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def train_step(self) -> StepReport:
        """One optimizer step."""
        began = time.perf_counter()
        training, chunk = self.preset.training, self.preset.model.chunk_frames
        state = np.random.SeedSequence([self.seed, self.step]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) % 2**63)
        prefix = self.prefixes[int(torch.randint(len(self.prefixes), (), generator=generator))]
        chunks = self.chunks(prefix)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision is Precision.BFLOAT16)
        with half:
            latents = self._latents(prefix + chunks * chunk)
        encoded = time.perf_counter()

        share = self._learning_rate()
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = share * self._peaks[name]
        with half:
            loss, terms = training_loss(
                self.model,
                self.process,
                latents,
                prefix,
                chunks=chunks,
                timestep_shift=training.timestep_shift,
                variance_weight=training.variance_weight,
                generator=generator,
                text=self.model.unconditional_caption(training.batch_size),
            )
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.gradient_clip)
        if not math.isfinite(norm.item()):
            raise UserError(
                f"step {self.step + 1}: the gradient is {norm.item()}; train with a smaller --set "
                f"training.learning_rate (now {training.learning_rate}), from the last checkpoint if there is one"
            )
        for optimizer in self.optimizers.values():
            optimizer.step()
        self._update_average()
        self.step += 1
        seconds = time.perf_counter() - began
        frames, rate = training.batch_size * chunks * chunk, share * training.learning_rate
        return StepReport(self.step, loss.item(), terms, rate, norm.item(), prefix, seconds, encoded - began, frames)

    @torch.no_grad()
    def _latents(self, frames: int) -> Tensor:
        """This step's clips as latents (B, C, T, h, w)."""
        size = self.preset.training.batch_size
        clips = batch(self.source, self.step * size, size, frames).to(self.device)  # (B, T, C, H, W)
        return self.autoencoder.encode(clips.flatten(0, 1)).float().unflatten(0, (size, frames)).transpose(1, 2)

    def _learning_rate(self) -> float:
        """Share of the peak learning rate."""
        training = self.preset.training
        if self.step < training.warmup_steps:
            return (self.step + 1) / training.warmup_steps
        if training.schedule is Schedule.COSINE:
            done = (self.step - training.warmup_steps) / max(1, self.steps - training.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return 1.0

    @torch.no_grad()
    def _update_average(self) -> None:
        """Exponential moving average, shorter at first so that it forgets the random start."""
        decay = min(self.preset.training.ema_decay, (1 + self.step) / (10 + self.step))
        own = self.model.state_dict()
        averages = [v for v in self.average.values() if v.is_floating_point()]
        torch._foreach_lerp_(
            averages, [own[k].detach() for k, v in self.average.items() if v.is_floating_point()], 1 - decay
        )

    # ------------------------------------------------------------------------------------------------- on disk
    def save(self, folder: Path) -> None:
        """Write the averaged weights, which ``sample`` loads, and the state to resume from."""
        save_tensors(folder / WEIGHTS_FILE, self.average, {"step": str(self.step)})
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        metadata = {"step": str(self.step), "seed": str(self.seed), "steps": str(self.steps), **self.origin}
        save_tensors(folder / STATE_FILE, tensors, metadata)

    def resume(self, folder: Path) -> None:
        """Go on from what ``save`` wrote."""
        path = folder / STATE_FILE
        tensors, metadata = load_tensors(path)
        try:
            step, seed = int(metadata["step"]), int(metadata["seed"])
        except (KeyError, ValueError):
            raise UserError(f"{path}: its metadata has no step and seed; not a training state") from None
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("model", "average", *self.optimizers)}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise UserError(f"{path}: unknown tensor {key}; not a training state of these settings")
            parts[part][name] = value
        load_weights(self.model, parts["model"], str(path))
        self.average = {k: v.to(self.device) for k, v in parts["average"].items()}
        for part, optimizer in self.optimizers.items():
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in parts[part].items():
                index, _, name = key.partition(".")
                if not index.isdecimal():
                    raise UserError(f"{path}: unknown tensor {part}.{key}; not a training state")
                moments.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        self.step, self.seed = step, seed


def make_optimizers(model: CausalVideoTransformer, training: TrainingConfig) -> dict[str, torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the others, by name.

    Raises:
        UserError: this PyTorch has no Muon.
    """
    parameters = dict(model.named_parameters())
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if training.optimizer is Optimizer.MUON:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"training.optimizer: muon needs PyTorch 2.9 or later, this is {torch.__version__}")
        matrices = [name for name, p in parameters.items() if name.startswith("blocks.") and name.endswith(".weight")]
        optimizers["muon"] = torch.optim.Muon(
            [parameters.pop(name) for name in matrices],
            lr=training.muon_learning_rate,
            weight_decay=training.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    optimizers["adamw"] = torch.optim.AdamW(
        parameters.values(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=training.weight_decay
    )
    return optimizers


def train(trainer: Trainer, folder: Path, on_step: Callable[[StepReport], None]) -> None:
    """Train to the last step, saving every ``training.checkpoint_every`` steps, at the end, and when interrupted.

    A step that fails (a gradient that is not finite) saves nothing: the last checkpoint is what to go on from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every = trainer.preset.training.checkpoint_every
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as log, held_interrupts() as interrupted:
        while trainer.step < trainer.steps and not interrupted():
            report = trainer.train_step()
            log.write(json.dumps(asdict(report)) + "\n")
            log.flush()
            on_step(report)
            if trainer.step % every == 0 and trainer.step < trainer.steps:
                trainer.save(folder)
        trainer.save(folder)


def write_preset(preset: Preset, folder: Path) -> None:
    """Put the resolved preset beside the weights, so that ``--preset FOLDER`` is all that ``sample`` needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PRESET_FILE).write_text(dump_preset(preset), encoding="utf-8")
