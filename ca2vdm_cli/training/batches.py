"""A run's batches: which clips a step takes, how long they are, and their latents and text embeddings.

All randomness of step n is drawn from (seed, n), and that of a clip from (seed, its number). A resumed run therefore
sees the batches that an uninterrupted one would have seen, and several processes together see those of a single one.

Shape letters: B clips of one forward of one process, C channels, T frames, H, W pixels, c, h, w of latents, M text
tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.autoencoder import Autoencoder
from ca2vdm_cli.config import Preset
from ca2vdm_cli.data import Batch, ClipLoader, ClipSource, LatentClips
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.text_encoder import TextEncoder
from ca2vdm_cli.video_codec import encode_video

if TYPE_CHECKING:
    from accelerate import Accelerator

CLIP, STEP, ROLLOUT, TEXT = 1, 2, 3, 4
"""Purposes of random numbers: a clip's noise, a step's prefix length, a clip's rollout, or its text dropout."""


def seeded_generator(seed: int, purpose: int, index: int) -> torch.Generator:
    """A CPU generator that depends on its arguments only."""
    state = np.random.SeedSequence([seed, purpose, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


@dataclass
class TrainingData:
    """Clips, and what encodes them."""

    source: ClipSource
    """Clips as pixels, or as latents (``LatentClips``)."""
    autoencoder: Autoencoder
    text_encoder: TextEncoder | None = None
    """Encodes captions; without it a model with text learns from its stored caption only."""


@dataclass(frozen=True)
class EncodedBatch:
    """What one forward of one process is trained on."""

    indices: range
    """Numbers of its clips."""
    latents: Tensor
    """(B, c, T, h, w) float32."""
    text: tuple[Tensor, Tensor] | None
    """Embeddings (B, M, text_channels) and masks (B, M); None for a model without text."""
    data_seconds: float
    """Time spent waiting for clips."""
    encode_seconds: float
    """Time spent encoding clips and captions."""


class Batches:
    """Makes the batches of this process.

    Args:
        preset: batch size, prefix lengths and text dropout.
        data: clips and encoders.
        accelerator: devices and processes.
        seed: seed of all randomness.

    Raises:
        UsageError: the batch size is not divisible by the number of processes.
    """

    def __init__(self, preset: Preset, data: TrainingData, accelerator: Accelerator, seed: int) -> None:
        self.preset, self.data, self.accelerator, self.seed = preset, data, accelerator, seed
        training, processes = preset.training, accelerator.num_processes
        shares = processes * training.accumulation
        if training.batch_size % shares:
            raise UsageError(
                f"training.batch_size: {training.batch_size} must be a multiple of {shares}, the number of "
                f"processes ({processes}) times training.accumulation ({training.accumulation})"
            )
        self.size = training.batch_size // shares
        """B."""
        self._loader: ClipLoader | None = None

    def lengths(self, step: int) -> tuple[int, int]:
        """Frames before the first noisy chunk of a step, and its number of noisy chunks."""
        training, prefixes, generator = self.preset.training, self.preset.prefixes, self.generator(STEP, step)
        weights = torch.tensor(training.prefix_weights or [1.0] * len(prefixes), dtype=torch.float64)
        prefix = prefixes[int(torch.multinomial(weights, 1, generator=generator))]
        first_chunk_only = float(torch.rand((), generator=generator)) < training.first_chunk_share
        return prefix, 1 if first_chunk_only else self.preset.chunks(prefix)

    def next(
        self,
        step: int,
        part: int,
        stored_caption: tuple[Tensor, Tensor] | None,
        waiting: Callable[[float], None] = lambda seconds: None,
    ) -> EncodedBatch:
        """The next batch. The first call decides where in the data to start; later ones must be consecutive.

        Args:
            step: steps done.
            part: which part of the step, from 0 (gradient accumulation).
            stored_caption: the model's unconditional caption, B rows; None for a model without text.
            waiting: called now and then while clips are awaited, with the seconds so far.
        """
        accelerator, accumulation = self.accelerator, self.preset.training.accumulation
        place = (step * accumulation + part) * accelerator.num_processes + accelerator.process_index
        indices = range(place * self.size, (place + 1) * self.size)
        loader = self._loader = self._loader or self._start_loader(step)
        waited_before = loader.wait_seconds
        batch = loader.next(waiting)
        encoding = time.perf_counter()
        latents = self._encode(batch)
        text = self._encode_text(batch.captions, indices, stored_caption)
        encode_seconds = time.perf_counter() - encoding
        return EncodedBatch(indices, latents, text, loader.wait_seconds - waited_before, encode_seconds)

    def close(self) -> None:
        """End the worker processes."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def generator(self, purpose: int, index: int) -> torch.Generator:
        """A generator of this run's randomness."""
        return seeded_generator(self.seed, purpose, index)

    def _start_loader(self, step: int) -> ClipLoader:
        accumulation = self.preset.training.accumulation

        def frames(part: int) -> int:
            prefix, chunks = self.lengths(part // accumulation)
            return prefix + chunks * self.preset.model.chunk_frames

        return ClipLoader(
            self.data.source,
            frames,
            self.size,
            first=step * accumulation,
            workers=self.preset.data.workers,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    @torch.no_grad()
    def _encode(self, batch: Batch) -> Tensor:
        """Latents (B, c, T, h, w) of clips (B, T, C, H, W), or of latents (B, T, c, h, w)."""
        clips = batch.clips.to(self.accelerator.device, non_blocking=True)
        if isinstance(self.data.source, LatentClips):
            return clips.float().transpose(1, 2)
        with self.accelerator.autocast():
            return encode_video(self.data.autoencoder, clips)

    def _encode_text(
        self, captions: Sequence[str | None], indices: range, stored: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor] | None:
        """Embeddings (B, M, text_channels) and masks (B, M) of captions, some of which are dropped."""
        if stored is None or self.data.text_encoder is None:
            return stored
        share = self.preset.training.text_dropout
        dropped = [float(torch.rand((), generator=self.generator(TEXT, index))) < share for index in indices]
        return self.data.text_encoder(captions, stored, dropped)
