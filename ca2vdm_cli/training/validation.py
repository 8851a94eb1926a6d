"""What training looks at now and then: held-out loss by prefix length and noise level, and a video from fixed seeds.

Shape letters: B clips, c channels, T frames, h, w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ca2vdm_cli.autoencoder import FRAMES_AT_ONCE, Autoencoder
from ca2vdm_cli.config import Preset, TrainingConfig
from ca2vdm_cli.data import ClipSource
from ca2vdm_cli.generate.context import make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import Caption, SeededNoise, generate
from ca2vdm_cli.generate.samplers import sampler_for
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.text_encoder import TextEncoder
from ca2vdm_cli.video_io import contact_sheet, open_writer, write_image

from .loss import Draw, Objective

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels that the held-out loss is measured at, as shares of the training timesteps."""
SEED = 12345
"""Of the noise, the same in every validation, so that only the weights differ."""
VIDEOS = 4
SHEET_COLUMNS = 12


@dataclass(frozen=True)
class ValidationReport:
    """What one validation found."""

    step: int
    loss: float
    """Mean over prefix lengths and noise levels."""
    by_prefix: dict[int, float]
    by_level: dict[float, float]
    """By share of the training timesteps."""
    video: Path
    sheet: Path


class Validator:
    """Measures the averaged weights on clips that are not trained on.

    Args:
        preset: what is trained.
        source: held-out clips.
        autoencoder: between pixels and latents.
        backend: how to run the model.
        device: where.
        prefixes: prefix lengths to measure; the first chunk of the video is made from none of them if 0 is among them,
            else from one given frame.
        folder: where videos and sheets go.
        text_encoder: what the clips' captions are encoded by; without it those of a model with text are not used.

    Raises:
        UsageError: a sampler that the preset's noise process can't use.
    """

    def __init__(
        self,
        preset: Preset,
        source: ClipSource,
        autoencoder: Autoencoder,
        backend: Backend,
        device: torch.device,
        prefixes: tuple[int, ...],
        folder: Path,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.preset, self.source, self.autoencoder, self.prefixes = preset, source, autoencoder, prefixes
        self.folder, self.text_encoder = folder, text_encoder
        self.model = CausalVideoTransformer(preset.model, backend).to(device).eval().requires_grad_(False)
        self.process = NoiseProcess(preset.diffusion)
        self.objective = Objective(self.model, self.process, TrainingConfig())
        self.sampler = sampler_for(self.process, preset.sampling)

    @torch.no_grad()
    def __call__(self, weights: dict[str, Tensor], step: int) -> ValidationReport:
        """Measure weights, and write ``step-N.mp4`` and its contact sheet ``step-N.png``."""
        self.model.load_state_dict(weights)
        losses = self._losses()  # (prefixes, levels)
        videos = self._videos()  # (B, T, H, W, C)
        stem = self.folder / f"step-{step:08d}"
        assert self.preset.video is not None
        columns = np.linspace(0, videos.shape[1] - 1, SHEET_COLUMNS).round().astype(int)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_image(stem.with_suffix(".png"), contact_sheet([v[i] for v in videos for i in columns], SHEET_COLUMNS))
        with open_writer(stem.with_suffix(".mp4"), fps=self.preset.video.fps, overwrite=True) as writer:
            for t in range(videos.shape[1]):
                writer.write(contact_sheet(list(videos[:, t]), columns=2))
        return ValidationReport(
            step=step,
            loss=float(losses.mean()),
            by_prefix=dict(zip(self.prefixes, losses.mean(1).tolist(), strict=True)),
            by_level=dict(zip(LEVELS, losses.mean(0).tolist(), strict=True)),
            video=stem.with_suffix(".mp4"),
            sheet=stem.with_suffix(".png"),
        )

    def _losses(self) -> Tensor:
        """Mean squared error of the prediction, (prefix lengths, noise levels)."""
        count, config = self.preset.training.validation_clips, self.preset.diffusion
        latents, text = self._clips(count, max(self.prefixes) + self.preset.model.chunk_frames)
        rows = []
        for prefix in self.prefixes:
            generators = [torch.Generator().manual_seed(SEED + clip) for clip in range(count)]
            draw = Draw.stack([self.objective.draw(prefix, 1, generator) for generator in generators])
            row = []
            for level in LEVELS:
                timestep = torch.full((count, 1), round(level * (config.train_timesteps - 1)))
                numbers = Draw(timestep, draw.noise, draw.prefix_level, draw.prefix_noise, draw.offset)
                _, terms = self.objective(latents, prefix, numbers.to(latents.device), text)
                row.append(terms["mse"].mean())
            rows.append(torch.stack(row))
        return torch.stack(rows).cpu()

    def _videos(self) -> NDArray[np.uint8]:
        """Videos of two windows from fixed seeds, (B, T, H, W, C) uint8."""
        config, device = self.preset.model, self.model.device
        first, text = self._clips(VIDEOS, 1)
        given = None if self.preset.diffusion.unconditional_start else first
        caption = None if text is None else Caption(*text)
        shape = (config.in_channels, config.chunk_frames, config.latent_height, config.latent_width)
        noise = SeededNoise(SEED, list(range(VIDEOS)), shape, device)
        context = make_context(self.model, "cached", VIDEOS)
        start, longest = 0 if given is None else 1, context.window.longest
        frames = 2 * config.context_frames
        chunks = -(-frames // config.chunk_frames) if longest is None else (longest - start) // config.chunk_frames
        made = generate(context, self.process, self.sampler, noise, chunks, given=given, caption=caption)
        latents = torch.cat([*([] if given is None else [given]), *(chunk.latents for chunk in made)], dim=2)
        parts = latents.transpose(1, 2).flatten(0, 1).split(FRAMES_AT_ONCE)
        pixels = torch.cat([self.autoencoder.decode(part) for part in parts])
        pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        return pixels.unflatten(0, (VIDEOS, -1)).permute(0, 1, 3, 4, 2).numpy()

    def _clips(self, count: int, frames: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The first held-out clips as latents (B, c, T, h, w), and their captions: embeddings and masks."""
        clips = [self.source.clip(index, frames) for index in range(count)]
        pixels = torch.stack([clip.frames for clip in clips]).to(self.model.device)
        parts = [self.autoencoder.encode(part).float() for part in pixels.flatten(0, 1).split(FRAMES_AT_ONCE)]
        latents = torch.cat(parts).unflatten(0, (count, frames)).transpose(1, 2)
        text = self.model.unconditional_caption(count)
        if text is not None and self.text_encoder is not None:
            text = self.text_encoder([clip.caption for clip in clips], text)
        return latents, text
