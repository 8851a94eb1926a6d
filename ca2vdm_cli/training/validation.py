"""Validation during training: held-out loss, metrics on held-out clips, and a video from fixed seeds.

Shape letters: B clips, C channels, T frames, H, W pixels, c, h, w of latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.config import Preset, TrainingConfig
from ca2vdm_cli.generate.context import make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import Caption, SeededNoise, generate
from ca2vdm_cli.generate.samplers import sampler_for
from ca2vdm_cli.loading import build_model
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.video_codec import decode_video, encode_video, to_uint8
from ca2vdm_cli.video_io import Frame, contact_sheet, open_writer, write_image
from ca2vdm_cli.video_metrics import metrics

from .batches import TrainingData
from .loss import Draw, Objective

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels at which the held-out loss is measured, as shares of the training timesteps."""
SEED = 12345
"""Seed of all noise. It is the same in every validation, so that only the weights differ."""
VIDEOS = 4
SHEET_COLUMNS = 12

Text = tuple[Tensor, Tensor] | None
"""Embeddings and masks of captions; None for a model without text."""


@dataclass(frozen=True)
class ValidationReport:
    """Results of one validation."""

    step: int
    loss: float
    """Mean over prefix lengths and noise levels."""
    by_prefix: dict[int, float]
    """Loss by prefix length."""
    by_level: dict[float, float]
    """Loss by noise level, a share of the training timesteps."""
    reconstruction: dict[str, float]
    """By metric: held-out frames after the autoencoder's encoder and decoder, against the frames themselves."""
    continuation: dict[str, float]
    """By metric: the chunk generated after a full window of held-out frames, against the true continuation."""
    repeat_last_frame: dict[str, float]
    """By metric: the last given frame, repeated, against the same true continuation."""
    video: Path
    sheet: Path


class Validator:
    """Measures the averaged weights on held-out clips.

    Args:
        preset: what is trained.
        data: held-out clips, as pixels, with the encoders that training uses.
        backend: how to run the model.
        device: where to run it.
        folder: where videos and contact sheets go.

    Raises:
        UsageError: the preset's sampler does not support its noise process, or there is no such metric.
    """

    def __init__(
        self, preset: Preset, data: TrainingData, backend: Backend, device: torch.device, folder: Path
    ) -> None:
        self.preset, self.data, self.folder, self.prefixes = preset, data, folder, preset.trained_prefixes
        self.model = build_model(preset.model, backend, device=device)
        self.process = NoiseProcess(preset.diffusion)
        self.objective = Objective(self.model, self.process, TrainingConfig())
        self.sampler = sampler_for(self.process, preset.sampling)

    @torch.no_grad()
    def __call__(self, weights: dict[str, Tensor], step: int) -> ValidationReport:
        """Measure weights, and write a video ``step-N.mp4`` and its contact sheet ``step-N.png``."""
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
            **self._metrics(),
            video=stem.with_suffix(".mp4"),
            sheet=stem.with_suffix(".png"),
        )

    def _losses(self) -> Tensor:
        """Mean squared error of the prediction, (prefix lengths, noise levels)."""
        count, config = self.preset.training.validation_clips, self.preset.diffusion
        pixels, text = self._clips(count, max(self.prefixes) + self.preset.model.chunk_frames)
        latents = self._encode(pixels)
        rows = []
        for prefix in self.prefixes:
            generators = [torch.Generator().manual_seed(SEED + clip) for clip in range(count)]
            draw = Draw.stack([self.objective.draw(prefix, 1, generator) for generator in generators])
            row = []
            for level in LEVELS:
                timestep = torch.full((count, 1), round(level * (config.train_timesteps - 1)))
                at_level = Draw(timestep, draw.noise, draw.prefix_level, draw.prefix_noise, draw.offset)
                _, terms = self.objective(latents, prefix, at_level.to(latents.device), text)
                row.append(terms["mse"].mean())
            rows.append(torch.stack(row))
        return torch.stack(rows).cpu()

    def _videos(self) -> Frame:
        """Videos of two windows from fixed seeds, (B, T, H, W, C) uint8."""
        config = self.preset.model
        pixels, text = self._clips(VIDEOS, 1)
        given = None if self.preset.diffusion.unconditional_start else self._encode(pixels)
        start, longest = 0 if given is None else 1, TemporalWindow(config).longest
        frames = 2 * config.context_frames
        chunks = -(-frames // config.chunk_frames) if longest is None else (longest - start) // config.chunk_frames
        latents = self._generate(VIDEOS, chunks, given, text)
        return self._decode(latents if given is None else torch.cat([given, latents], dim=2))

    def _metrics(self) -> dict[str, dict[str, float]]:
        """The report's ``reconstruction``, ``continuation`` and ``repeat_last_frame``, means over the clips.

        If the source's clips are shorter than a window and a chunk, the context is whatever precedes their last chunk;
        if nothing does, there is no continuation to measure.
        """
        training, chunk = self.preset.training, self.preset.model.chunk_frames
        frames = min(self.preset.model.window_frames, self.preset.clip_frames)
        given, count = frames - chunk, training.validation_clips
        pixels, text = self._clips(count, frames)
        latents, true = self._encode(pixels), to_uint8(pixels).cpu().numpy()
        pairs = {"reconstruction": (self._decode(latents), true)}
        if given:
            continuation = self._decode(self._generate(count, 1, latents[:, :, :given], text))
            pairs["continuation"] = continuation, true[:, given:]
            pairs["repeat_last_frame"] = true[:, given - 1 : given].repeat(chunk, axis=1), true[:, given:]
        return {
            key: {
                name: float(np.mean([metrics[name].measure(*pair) for pair in zip(*pairs[key], strict=True)]))
                for name in (training.validation_metrics if key in pairs else ())
            }
            for key in ("reconstruction", "continuation", "repeat_last_frame")
        }

    def _generate(self, count: int, chunks: int, given: Tensor | None, text: Text) -> Tensor:
        """Generated latents (B, c, T, h, w) from fixed seeds, without the given frames."""
        config, device = self.preset.model, self.model.device
        noise = SeededNoise(SEED, list(range(count)), config.chunk_shape, device)
        context = make_context(self.model, "cached", count)
        caption = None if text is None else Caption(*text)
        run = generate(context, self.process, self.sampler, noise, chunks, given=given, caption=caption)
        return torch.cat([chunk.latents for chunk in run], dim=2)

    def _clips(self, count: int, frames: int) -> tuple[Tensor, Text]:
        """The first held-out clips (B, T, C, H, W) in [-1, 1], and their captions' embeddings and masks."""
        clips = [self.data.source.clip(index, frames) for index in range(count)]
        text = self.model.unconditional_caption(count)
        if text is not None and self.data.text_encoder is not None:
            text = self.data.text_encoder([clip.caption for clip in clips], text)
        return torch.stack([clip.frames for clip in clips]).to(self.model.device), text

    def _encode(self, pixels: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, c, T, h, w)."""
        return encode_video(self.data.autoencoder, pixels)

    def _decode(self, latents: Tensor) -> Frame:
        """(B, c, T, h, w) -> (B, T, H, W, C) uint8."""
        return decode_video(self.data.autoencoder, latents).cpu().numpy()
