"""Training the package's small autoencoders, before the model is trained.

Shapes: N frames, C channels, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ca2vdm_cli.autoencoder import ConvAutoencoder
from ca2vdm_cli.checkpoint import load_weights
from ca2vdm_cli.config import TrainingConfig
from ca2vdm_cli.data import ClipSource
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.interrupts import held_interrupts

from .checkpoints import Checkpoint, Checkpoints
from .run_folder import AUTOENCODER_FILE, STATE_FILE

CROP_LATENTS = 5
"""Side of a training crop, in latent pixels."""
DECODER_SHARE = 0.2
"""Share of the steps, the last ones, that train only the decoder, on whole frames and with the final latents."""
WARMUP_STEPS = 50
"""Steps over which the learning rate rises to its peak."""
OTHER_SETTINGS = "the autoencoder's training began with other settings; resume with those"


def train_autoencoder(
    autoencoder: ConvAutoencoder,
    source: ClipSource,
    training: TrainingConfig,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    *,
    first: int = 0,
    checkpoints: Checkpoints | None = None,
    on_start: Callable[[int, list[str]], None] = lambda step, problems: None,
    on_interrupt: Callable[[], None] = lambda: None,
) -> None:
    """Train on crops of ``source``, fix the latents' mean and variance, then train only the decoder on whole frames.

    If the encoder has no weights, only the second part takes place. An interrupt takes effect after the current step,
    which is saved; the next call continues there, as if nothing had happened.

    Args:
        autoencoder: trained in place.
        source: where the frames come from.
        training: its ``autoencoder_*`` fields set steps, learning rate and batch size.
        seed: seed of the noise on latents; the order of the frames is the source's own.
        progress: called after every step with the number of steps done and the loss.
        first: steps that an autoencoder was trained for before; only its decoder is then trained, up to
            ``training.autoencoder_steps``, and its latents stay as they are.
        checkpoints: where to save every ``training.checkpoint_every`` steps, and what to continue from.
        on_start: called before the first step with the steps done, and a line for each damaged checkpoint.
        on_interrupt: called when an interrupt arrives.

    Raises:
        UserError: a checkpoint can't be written, or is from a training with other settings.
        KeyboardInterrupt: after an interrupt.
    """
    trainer = AutoencoderTrainer(autoencoder, source, training, seed, first)
    last, problems = (None, []) if checkpoints is None else checkpoints.newest()
    if last is not None:
        trainer.load(last)
    on_start(trainer.step, problems)
    with held_interrupts(on_interrupt) as interrupted:
        while trainer.step < training.autoencoder_steps and not interrupted():
            loss = trainer.train_step()
            progress(trainer.step, loss)
            if checkpoints is not None and (trainer.step % training.checkpoint_every == 0 or interrupted()):
                trainer.save(checkpoints)
    trainer.finish()


class AutoencoderTrainer:
    """Trains an autoencoder step by step; the arguments are those of ``train_autoencoder``."""

    def __init__(
        self, autoencoder: ConvAutoencoder, source: ClipSource, training: TrainingConfig, seed: int, first: int = 0
    ) -> None:
        self.autoencoder, self.source, self.training = autoencoder, source, training
        self.step = self._first = first
        """Steps done."""
        only_decoder = first or not list(autoencoder.encoder.parameters())
        self._decoder_start = first if only_decoder else round((1 - DECODER_SHARE) * training.autoencoder_steps)
        self._noise = torch.Generator().manual_seed(seed + first)
        self._optimizer: torch.optim.Optimizer | None = None

    def train_step(self) -> float:
        """Run one step; returns the loss."""
        optimizer = self._optimizer or self._begin()
        start, end, side = self._first, self._decoder_start, 0
        if self._trains_decoder:
            start, end = self._decoder_start, self.training.autoencoder_steps
        else:
            side = CROP_LATENTS * self.autoencoder.downsample
        rate = self.training.autoencoder_learning_rate * _warmup_and_cosine(self.step - start, max(1, end - start))
        for group in optimizer.param_groups:
            group["lr"] = rate
        size = self.training.autoencoder_batch_size
        indices = range(self.step * size, (self.step + 1) * size)
        pictures = [self.source.crop(i, side) if side else self.source.clip(i, 1).frames[0] for i in indices]
        loss = _loss(self.autoencoder, torch.stack(pictures), self._noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._part.parameters(), 1.0)
        optimizer.step()
        self.step += 1
        if self.step == self._decoder_start:
            self._optimizer = None  # the decoder's own training begins
        return loss.item()

    def finish(self) -> None:
        """Freeze the autoencoder."""
        if self._optimizer is None and self._trains_decoder:  # too few steps to train the decoder alone
            self._begin()
        self.autoencoder.eval().requires_grad_(False)

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint."""
        state = {"noise": self._noise.get_state()}
        if self._optimizer is not None:
            for name, parameter in self._part.named_parameters():
                for moment, value in self._optimizer.state[parameter].items():
                    state[f"{name}.{moment}"] = value
        facts = {"first": str(self._first), "decoder_start": str(self._decoder_start)}
        checkpoints.save(self.step, facts, {AUTOENCODER_FILE: self.autoencoder.state_dict(), STATE_FILE: state})
        checkpoints.remove_others(self.step)

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore what ``save`` wrote.

        Raises:
            UserError: it is from a training with other settings.
        """
        path, facts = checkpoint.folder, checkpoint.facts
        if (facts.get("first"), facts.get("decoder_start")) != (str(self._first), str(self._decoder_start)):
            raise UserError(f"{path}: {OTHER_SETTINGS}")
        load_weights(self.autoencoder, checkpoint.tensors(AUTOENCODER_FILE), str(path / AUTOENCODER_FILE))
        state = checkpoint.tensors(STATE_FILE)
        self._noise.set_state(state.pop("noise"))
        self.step = checkpoint.step
        if not state:  # between the two parts
            return
        optimizer, parameters = self._begin(measure=False), dict(self._part.named_parameters())
        for key, value in state.items():
            name, _, moment = key.rpartition(".")
            if name not in parameters:
                raise UserError(f"{path / STATE_FILE}: unknown tensor {key}; {OTHER_SETTINGS}")
            parameter = parameters[name]
            if value.shape == parameter.shape:  # in the parameter's memory layout, for equal rounding
                value = torch.empty_like(parameter).copy_(value)
            optimizer.state[parameter][moment] = value

    @property
    def _trains_decoder(self) -> bool:
        return self.step >= self._decoder_start

    @property
    def _part(self) -> nn.Module:
        return self.autoencoder.decoder if self._trains_decoder else self.autoencoder

    def _begin(self, *, measure: bool = True) -> torch.optim.Optimizer:
        """Begin training the part that is next."""
        if self._trains_decoder and measure and not self._first:
            _measure_latents(self.autoencoder.train(), self.source)
        self.autoencoder.train(not self._trains_decoder)
        self.autoencoder.requires_grad_(False)
        self._part.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self._part.parameters(), self.training.autoencoder_learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        return self._optimizer


def _warmup_and_cosine(step: int, steps: int) -> float:
    """Learning rate at a step, as a share of the peak."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2


def _loss(autoencoder: ConvAutoencoder, frames: Tensor, noise: torch.Generator) -> Tensor:
    """Squared error plus 0.2 times the absolute error of (N, C, H, W) frames reconstructed from noisy latents."""
    frames = frames.to(next(autoencoder.parameters()).device)
    latents = autoencoder.encode(frames)  # in training mode, normalized with the batch's mean and variance
    latents = latents + autoencoder.latent_noise * torch.randn(latents.shape, generator=noise).to(latents)
    error = autoencoder.reconstruct(latents) - frames
    return error.square().mean() + 0.2 * error.abs().mean()


@torch.no_grad()
def _measure_latents(autoencoder: ConvAutoencoder, source: ClipSource, batches: int = 16, size: int = 64) -> None:
    """Average the latents' mean and variance over whole frames (a batch norm without momentum averages all batches)."""
    device = next(autoencoder.parameters()).device
    autoencoder.normalize.reset_running_stats()
    for start in range(0, batches * size, size):
        frames = torch.cat([source.clip(index, 1).frames for index in range(start, start + size)])
        autoencoder.encode(frames.to(device))
