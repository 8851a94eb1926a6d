"""Validation during training: held-out loss, metrics on held-out clips, and videos from fixed seeds beside the truth.

Shape letters: B clips, C channels, T frames, H, W pixels, c, h, w of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.config import Preset, TrainingConfig
from ca2vdm_cli.data import Clip
from ca2vdm_cli.errors import UserError, first_line
from ca2vdm_cli.generate.context import make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import Caption, SeededNoise, generate
from ca2vdm_cli.generate.samplers import sampler_for
from ca2vdm_cli.loading import build_model
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.video_codec import decode_video, encode_video, to_uint8
from ca2vdm_cli.video_io import Frame, open_writer, write_image
from ca2vdm_cli.video_metrics import measured

from .batches import TrainingData
from .loss import Draw, Objective
from .reports import COMPARISONS, ValidationReport
from .sheets import Row, labelled_sheet

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels at which the held-out loss is measured, as shares of the training timesteps."""
SEED = 12345
"""Seed of all noise. It is the same in every validation, so that only the weights differ."""
VIDEOS = 4
"""Clips that are shown: half of them continue a window of given frames, the others start from one frame or none."""
WINDOWS = 2
"""More than this many windows are generated for each, so that drift shows."""
SHEET_COLUMNS = 14

Text = tuple[Tensor, Tensor] | None
"""Embeddings and masks of captions; None for a model without text."""
LARGEST_SHOWN = 100.0
"""Limit of generated latents that are decoded; those of an autoencoder are below 10."""


@dataclass(frozen=True)
class _Shown:
    """A generated video, and the true one."""

    label: str
    true: Frame | None
    """(T, H, W, C), perhaps shorter than the generated one; None without given frames."""
    generated: Frame
    """(T, H, W, C), given frames included."""
    given: int
    """Number of given frames."""

    def rows(self, frames: Sequence[int]) -> list[Row]:
        """The rows of a sheet that show these frames."""
        model = Row(self.label, [self.generated[t] for t in frames], sum(t < self.given for t in frames))
        if self.true is None:
            return [model]
        return [Row("truth", [self.true[t] if t < len(self.true) else None for t in frames]), model]


class Validator:
    """Measures the averaged weights on held-out clips.

    Args:
        preset: what is trained.
        data: held-out clips, as pixels, with the encoders that training uses.
        backend: how to run the model.
        device: where to run it.
        folder: where videos and contact sheets go.
        read_clips: given a count and a length in frames, that many clips to show, as long as the data has them; by
            default clips as long as training's.
        title: begins the sheets' titles, for example with where the clips come from.

    Raises:
        UsageError: the preset's sampler does not support its noise process, or there is no such metric.
    """

    def __init__(
        self,
        preset: Preset,
        data: TrainingData,
        backend: Backend,
        device: torch.device,
        folder: Path,
        read_clips: Callable[[int, int], list[Clip]] | None = None,
        title: str = "",
    ) -> None:
        self.preset, self.data, self.folder, self.prefixes = preset, data, folder, preset.trained_prefixes
        self.model = build_model(preset.model, backend, device=device)
        self.process = NoiseProcess(preset.diffusion)
        self.objective = Objective(self.model, self.process, TrainingConfig())
        self.sampler = sampler_for(self.process, preset.sampling)
        self.given = min(preset.model.window_frames, preset.clip_frames) - preset.model.chunk_frames
        """Frames that continuations are given: a window, or as many as there are before a clip's last chunk."""
        self._read_clips, self._title = read_clips or self._clips_of_training_length, title
        self._shown_clips: list[Clip] = []
        self._told = False

    @torch.no_grad()
    def __call__(
        self, weights: dict[str, Tensor], step: int, note: Callable[[str], None] = lambda line: None
    ) -> ValidationReport:
        """Measure weights, and write a video ``step-N.mp4`` and its contact sheet ``step-N.png``.

        If the pictures can't be written, ``note`` is called once with the reason.
        """
        self.model.load_state_dict(weights)
        losses = self._losses()  # (prefixes, levels)
        stem = self.folder / f"step-{step:08d}"
        try:
            self._write_pictures(stem, step)
        except (UserError, OSError) as error:
            if not self._told:
                reason = str(error) if isinstance(error, UserError) else f"{stem}: {first_line(error)}"
                note(f"validation at step {step} leaves no pictures: {reason}")
            self._told = True
        return ValidationReport(
            step=step,
            loss=float(losses.mean()),
            by_prefix=dict(zip(self.prefixes, losses.mean(1).tolist(), strict=True)),
            by_level=dict(zip(LEVELS, losses.mean(0).tolist(), strict=True)),
            **self._metrics(),
            video=stem.with_suffix(".mp4"),
            sheet=stem.with_suffix(".png"),
        )

    def _write_pictures(self, stem: Path, step: int) -> None:
        """A sheet with a row of truth and one of the model for each video, and a video of all."""
        assert self.preset.video is not None
        videos = self._videos()
        frames = len(videos[0].generated)
        title = f"{self._title}step {step}, {frames} frames; given frames have a coloured border"
        columns = np.linspace(0, frames - 1, min(SHEET_COLUMNS, frames)).round().astype(int).tolist()
        rows = [row for video in videos for row in video.rows(columns)]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_image(stem.with_suffix(".png"), labelled_sheet(title, [f"frame {t}" for t in columns], rows))
        with open_writer(stem.with_suffix(".mp4"), fps=self.preset.video.fps, overwrite=True) as writer:
            for t in range(frames):
                writer.write(_moment(videos, f"step {step}, frame {t}", t))

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

    def _videos(self) -> list[_Shown]:
        """Videos from fixed seeds, of more than ``WINDOWS`` windows after the given frames, and the true ones."""
        config = self.preset.model
        longest = TemporalWindow(config).longest
        frames = self.given + (WINDOWS * config.context_frames // config.chunk_frames + 1) * config.chunk_frames
        self._shown_clips = self._shown_clips or self._read_clips(VIDEOS, frames)
        shortest = 0 if self.preset.diffusion.unconditional_start else 1
        shown = []
        for clips, given in zip(_halves(self._shown_clips), (self.given or shortest, shortest), strict=True):
            chunks = -(-(frames - given) // config.chunk_frames)
            if longest is not None:
                chunks = min(chunks, (longest - given) // config.chunk_frames)
            pixels, text = self._stacked(clips)
            latents = self._encode(pixels[:, :given]) if given else None
            generated = self._generate(len(clips), chunks, latents, text)
            if latents is not None:
                generated = torch.cat([latents, generated], dim=2)
            true = to_uint8(pixels).cpu().numpy()
            label = "from scratch" if not given else "model"
            for one, other in zip(self._decode(generated), true, strict=True):
                shown.append(_Shown(label, other if given else None, one, given))
        frames = min(frames, *(len(video.generated) for video in shown))
        return [replace(video, generated=video.generated[:frames]) for video in shown]

    def _metrics(self) -> dict[str, dict[str, float]]:
        """The report's ``reconstruction``, ``continuation`` and ``repeat_last_frame``, means over the clips.

        If the source's clips are shorter than a window and a chunk, the context is whatever precedes their last chunk;
        if nothing does, there is no continuation to measure.
        """
        training, chunk = self.preset.training, self.preset.model.chunk_frames
        given, count = self.given, training.validation_clips
        pixels, text = self._clips(count, given + chunk)
        latents, true = self._encode(pixels), to_uint8(pixels).cpu().numpy()
        pairs = {"reconstruction": (self._decode(latents), true)}
        if given:
            continuation = self._decode(self._generate(count, 1, latents[:, :, :given], text))
            pairs["continuation"] = continuation, true[:, given:]
            pairs["repeat_last_frame"] = true[:, given - 1 : given].repeat(chunk, axis=1), true[:, given:]
        return {
            key: {
                name: float(np.mean([measured(name, *pair) for pair in zip(*pairs[key], strict=True)]))
                for name in (training.validation_metrics if key in pairs else ())
            }
            for key in COMPARISONS
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
        return self._stacked([self.data.source.clip(index, frames) for index in range(count)])

    def _clips_of_training_length(self, count: int, frames: int) -> list[Clip]:
        length = min(frames, self.given + self.preset.model.chunk_frames)
        return [self.data.source.clip(index, length) for index in range(count)]

    def _stacked(self, clips: Sequence[Clip]) -> tuple[Tensor, Text]:
        text = self.model.unconditional_caption(len(clips))
        if text is not None and self.data.text_encoder is not None:
            text = self.data.text_encoder([clip.caption for clip in clips], text)
        return torch.stack([clip.frames for clip in clips]).to(self.model.device), text

    def _encode(self, pixels: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, c, T, h, w)."""
        return encode_video(self.data.autoencoder, pixels)

    def _decode(self, latents: Tensor) -> Frame:
        """(B, c, T, h, w) -> (B, T, H, W, C) uint8. The latents of a young model may explode, which is no error."""
        bounded = latents.nan_to_num(0.0).clamp(-LARGEST_SHOWN, LARGEST_SHOWN)
        return decode_video(self.data.autoencoder, bounded).cpu().numpy()


def _halves(clips: list[Clip]) -> tuple[list[Clip], list[Clip]]:
    return clips[: len(clips) // 2], clips[len(clips) // 2 :]


def _moment(videos: Sequence[_Shown], title: str, t: int) -> Frame:
    """One frame of the video of all videos: the truth above the model."""
    rows = [
        Row("truth", [v.true[t] if v.true is not None and t < len(v.true) else None for v in videos]),
        Row("model", [v.generated[t] for v in videos]),
    ]
    columns = ["given" if t < video.given else video.label for video in videos]
    return labelled_sheet(title, columns, rows)
