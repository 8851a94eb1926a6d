"""The Python API: a model, its autoencoder and its settings, ready to make video. The commands are thin over it.

    pipeline = Pipeline.load("moving-digits")
    for chunk in pipeline.sample(frames=600, seed=1):
        show(chunk.frames)  # (videos, frames, height, width, channels) uint8

Shapes: B videos, T frames, H, W, 1 or 3 channels for pixels; B, C, T, h, w for latents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from .autoencoder import FRAMES_AT_ONCE, Autoencoder, autoencoders, load_autoencoder
from .checkpoint import load_tensors, load_weights
from .config import Preset
from .errors import UsageError, UserError
from .generate.context import Context, contexts, make_context
from .generate.diffusion import NoiseProcess
from .generate.loop import Caption, LatentChunk, SeededNoise, generate, stored_caption
from .generate.samplers import sampler_for
from .model.attention import Backend
from .model.transformer import CausalVideoTransformer
from .plugins import choose_backend
from .presets import DEFAULT_PRESET, PRESET_FILE, LoadedPreset, load_preset
from .runtime import Dtype, resolve_device, resolve_dtype, synchronize
from .text_encoder import TextEncoder

Frames = np.ndarray
"""uint8 pixels (B, T, H, W, channels)."""


class RunOptions(TypedDict, total=False):
    """How to make videos; everything has a default."""

    videos: Sequence[int]
    """Which videos to make together; by default video 0. Video k of a seed is always the same."""
    seed: int
    """Of all randomness; 0 by default."""
    steps: int | None
    """Denoising steps; the preset's by default."""
    sampler: str | None
    """By name; the preset's by default."""
    strategy: str | str
    """``cached`` (the default) or ``recompute``."""
    context_frames: int | None
    """Window in frames; the preset's by default."""
    prompt: str | None
    """What all the videos show, for presets with a text encoder; by default the stored unconditional caption."""
    guidance: float | None
    """How strongly the prompt is followed; the preset's by default."""
    caption: Caption | None
    """Text embeddings, one row a video, in place of a prompt."""
    on_step: Callable[[int, int], None] | None
    """Called with (chunk, steps done)."""


@dataclass(frozen=True)
class VideoChunk:
    """Frames that are finished, in order. Chunks of one run have different lengths: the last one is cut to size."""

    index: int
    """Which chunk, from 0."""
    frames: Frames
    """(B, T, H, W, channels) uint8."""
    denoise_seconds: float
    write_seconds: float
    """Time to make the frames before it context (the cache write)."""
    decode_seconds: float
    encode_seconds: float
    """Time to encode the given frames; 0 but for the first chunk."""
    context_bytes: int
    """Bytes kept between chunks: keys and values, or the latents that are fed again."""


class Pipeline:
    """A causal video diffusion model with everything around it. Made by ``load``."""

    def __init__(
        self,
        preset: LoadedPreset,
        model: CausalVideoTransformer,
        autoencoder: Autoencoder | None,
        *,
        trained: bool,
    ) -> None:
        self.preset, self.model, self.autoencoder, self.trained = preset, model, autoencoder, trained
        self.config: Preset = preset.config
        self.process = NoiseProcess(self.config.diffusion)
        self._text_encoder: TextEncoder | None = None  # loaded for the first prompt

    @classmethod
    def load(
        cls,
        preset: str | Path | None = None,
        *,
        checkpoint: str | Path | None = None,
        overrides: Sequence[str] = (),
        backend: str = "auto",
        device: str = "auto",
        dtype: Dtype | str = Dtype.AUTO,
        random_weights: bool = False,
        pixels: bool = True,
        seed: int = 0,
    ) -> Pipeline:
        """Load a preset and its weights.

        Args:
            preset: name, file or folder; by default that of the checkpoint's folder, else the default preset.
            checkpoint: weights (safetensors) to use instead of the preset's, or the folder of a training run.
            overrides: settings such as ``model.context_frames=9``.
            backend: name, or ``auto`` for the best that works here.
            device: name, or ``auto``.
            dtype: number format of the model.
            random_weights: allow a preset without weights (benchmarks), initialised from ``seed``.
            pixels: load the autoencoder too; without it there are latents only.
            seed: of random weights.

        Raises:
            UsageError: what was asked for does not exist or does not fit.
            UserError: weights that can't be read.
        """
        loaded, weights = find_weights(preset, checkpoint, overrides)
        if weights is None and not random_weights:
            raise UsageError(
                f"preset {loaded.name}: it has no weights; train some (ca2vdm train --preset {loaded.name}), import "
                "some (ca2vdm import) and name them with --checkpoint, or choose a preset that has (ca2vdm presets)"
            )
        where = resolve_device(device)
        number = resolve_dtype(Dtype(dtype), where)
        with torch.random.fork_rng(devices=[]):  # weights are made on the processor
            torch.manual_seed(seed)
            model = CausalVideoTransformer(loaded.config.model, choose_backend(backend, where, number))
            if weights is None:
                randomize(model)
        if weights is not None:
            load_weights(model, load_tensors(weights)[0], str(weights))
        model = model.to(where, number).eval().requires_grad_(False)
        autoencoder = _load_autoencoder(loaded, where) if pixels and weights is not None else None
        return cls(loaded, model, autoencoder, trained=weights is not None)

    @property
    def backend(self) -> Backend:
        """How the model runs."""
        return self.model.backend

    @property
    def weights_bytes(self) -> int:
        """Bytes of the model's and the autoencoder's weights in memory."""
        modules = [self.model, *([self.autoencoder] if isinstance(self.autoencoder, torch.nn.Module) else [])]
        return sum(t.nbytes for module in modules for t in module.state_dict().values())

    def sample(
        self, frames: int, *, first_frame: Frames | None = None, **options: Unpack[RunOptions]
    ) -> Iterator[VideoChunk]:
        """Make videos from nothing, or from a given first frame.

        Args:
            frames: length in frames, the given one included; any number.
            first_frame: (H, W, channels) uint8 at the model's size; needed by weights that were not trained to begin
                from an empty context.
            options: see ``RunOptions``.

        Raises:
            UsageError: a request that can't be met.
        """
        if first_frame is None and not self.config.diffusion.unconditional_start:
            raise UsageError(
                f"preset {self.preset.name}: these weights were not trained to begin from nothing; "
                "give --first-frame IMAGE (or a video, whose first frame is taken)"
            )
        if first_frame is None:
            return self._run(frames, None, options)
        given = self._checked(first_frame[None])
        if frames == 1:
            return iter([VideoChunk(0, _repeat(given, options), 0.0, 0.0, 0.0, 0.0, 0)])
        return _after(_repeat(given, options), self._run(frames - 1, given, options))

    def extend(self, given: Frames, frames: int, **options: Unpack[RunOptions]) -> Iterator[VideoChunk]:
        """Continue a video; yields the new frames only.

        Args:
            given: (T, H, W, channels) uint8 at the model's size; what fits the window of it is used.
            frames: how many new frames.
            options: see ``RunOptions``.

        Raises:
            UsageError: a request that can't be met.
        """
        window = options.get("context_frames") or self.config.model.context_frames
        return self._run(frames, self._checked(given)[-window:], options)

    def _checked(self, given: Frames) -> Frames:
        """Frames from the caller, if there are any and they are what the autoencoder takes."""
        self._autoencoder()
        video = self.config.video
        assert video is not None
        if given.dtype != np.uint8 or given.shape != (len(given) or 1, video.height, video.width, video.channels):
            raise UsageError(
                f"given frames: {given.dtype} {given.shape} must be uint8 (frames, {video.height}, {video.width}, "
                f"{video.channels}), at least one"
            )
        return given

    def _run(self, frames: int, given: Frames | None, options: RunOptions) -> Iterator[VideoChunk]:
        """Check everything now, so that a wrong request fails before the first chunk is asked for.

        All the videos begin with the same given frames (T, H, W, channels).
        """
        self._autoencoder()
        if unknown := sorted(options.keys() - RunOptions.__annotations__.keys()):
            raise TypeError(f"unknown option {unknown[0]}; known: {', '.join(RunOptions.__annotations__)}")
        if frames < 1:
            raise UsageError("frames: there must be at least one to make")
        model, sampling = self.config.model, self.config.sampling
        solver = sampler_for(self.process, sampling, name=options.get("sampler"), steps=options.get("steps"))
        videos = list(options.get("videos", (0,)))
        if not videos:
            raise UsageError("videos: there must be at least one to make")
        strategy = options.get("strategy", "cached")
        contexts.check(strategy, "strategy")
        caption = self._caption(options, len(videos))
        context = make_context(
            self.model,
            strategy,
            len(videos) * (2 if caption is not None and caption.guided else 1),
            context_frames=options.get("context_frames"),
            timesteps=solver.timesteps,
        )
        chunks = math.ceil(frames / model.chunk_frames)
        start = 0 if given is None else len(given)
        context.window.check_length(start + chunks * model.chunk_frames)
        shape = (model.in_channels, model.chunk_frames, model.latent_height, model.latent_width)
        noise = SeededNoise(options.get("seed", 0), videos, shape, self.model.device)

        def latents(given: Tensor | None) -> Iterator[LatentChunk]:
            return generate(
                context,
                self.process,
                solver,
                noise,
                chunks,
                given=given,
                caption=caption,
                on_step=options.get("on_step"),
            )

        return self._stream(frames, len(videos), given, context, latents)

    def _caption(self, options: RunOptions, videos: int) -> Caption | None:
        """What the videos are conditioned on; None for a model without text."""
        prompt, guidance, caption = options.get("prompt"), options.get("guidance"), options.get("caption")
        if prompt is None:
            if guidance is not None:
                raise UsageError("guidance: there is no prompt to follow; give one (--prompt TEXT)")
            return caption or stored_caption(self.model, videos)
        if caption is not None:
            raise UsageError("prompt: there is a caption already; leave one of them out")
        stored, config = self.model.unconditional_caption(videos), self.config
        if stored is None:
            raise UsageError(f"preset {self.preset.name}: its model has no text; leave out the prompt")
        if config.text is None:
            raise UsageError(
                f"preset {self.preset.name}: it names no text encoder; leave out the prompt, or --set text.path=FOLDER"
            )
        if self._text_encoder is None:
            kind = torch.bfloat16 if self.model.dtype is torch.bfloat16 else torch.float32
            self._text_encoder = TextEncoder(config.text, config.model, self.model.device, kind)
        text = self._text_encoder([prompt] * videos, stored)
        return Caption(*text, config.sampling.guidance if guidance is None else guidance)

    def _stream(
        self,
        frames: int,
        videos: int,
        given: Frames | None,
        context: Context,
        run: Callable[[Tensor | None], Iterator[LatentChunk]],
    ) -> Iterator[VideoChunk]:
        """Encode what is given, and decode chunk after chunk until there are enough frames."""
        began = time.perf_counter()
        latents = None if given is None else self.encode(given[None]).expand(videos, -1, -1, -1, -1)
        synchronize(self.model.device)
        encode_seconds = time.perf_counter() - began
        for chunk in run(latents):
            check_finite(chunk.latents, chunk.first_frame, self.model.dtype)
            decoding = time.perf_counter()
            pixels = self.decode(chunk.latents[:, :, :frames])
            frames -= pixels.shape[1]
            yield VideoChunk(
                chunk.index,
                pixels,
                chunk.denoise_seconds,
                chunk.write_seconds,
                time.perf_counter() - decoding,
                encode_seconds,
                context.nbytes,
            )
            encode_seconds = 0.0

    @torch.inference_mode()
    def encode(self, frames: Frames) -> Tensor:
        """Pixels (B, T, H, W, channels) uint8 at the model's size -> latents (B, C, T, h, w)."""
        autoencoder, latents = self._autoencoder(), []
        for part in torch.from_numpy(np.ascontiguousarray(frames)).flatten(0, 1).split(FRAMES_AT_ONCE):
            pixels = part.to(self.model.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents.append(autoencoder.encode(pixels))
        return torch.cat(latents).unflatten(0, frames.shape[:2]).transpose(1, 2)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Frames:
        """Latents (B, C, T, h, w) -> pixels (B, T, H, W, channels) uint8."""
        pixels = self._autoencoder().decode(latents.transpose(1, 2).flatten(0, 1))
        pixels = pixels.unflatten(0, (latents.shape[0], latents.shape[2])).permute(0, 1, 3, 4, 2)
        out: Frames = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return out

    def _autoencoder(self) -> Autoencoder:
        if self.autoencoder is None:
            raise UsageError(f"preset {self.preset.name}: it works on latents only and makes no pictures")
        return self.autoencoder


def find_weights(
    preset: str | Path | None, checkpoint: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[LoadedPreset, Path | None]:
    """The preset and the weights file that ``--preset`` and ``--checkpoint`` mean together.

    A checkpoint that lies beside a ``preset.yaml``, as training leaves it, brings that preset with it.
    """
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.is_dir():
        if not (path / PRESET_FILE).is_file():
            raise UsageError(f"--checkpoint {path}: a folder without {PRESET_FILE}; name the weights file itself")
        if preset is not None:
            raise UsageError(f"--checkpoint {path}: the folder has a preset of its own; leave out --preset {preset}")
        loaded = load_preset(path, overrides)
        return loaded, loaded.weights_path
    if path is not None and not path.is_file():
        raise UsageError(f"--checkpoint {path}: no such file")
    if preset is None and path is not None and (path.parent / PRESET_FILE).is_file():
        preset = path.parent
    loaded = load_preset(preset or DEFAULT_PRESET, overrides)
    return loaded, path or loaded.weights_path


def _load_autoencoder(preset: LoadedPreset, device: torch.device) -> Autoencoder | None:
    """The preset's autoencoder, or None for a preset that works on latents only."""
    config = preset.config
    if config.video is None:
        return None
    if autoencoders[config.autoencoder.kind].trained_here and preset.autoencoder_weights_path is None:
        raise UsageError(
            f"preset {preset.name}: its autoencoder has no weights; use --preset with the folder of a training run, or "
            "name a file beside the preset as autoencoder_weights"
        )
    weights = preset.autoencoder_weights_path
    return load_autoencoder(config.autoencoder, config.video, config.model.in_channels, weights).to(device)


def check_finite(made: Tensor, frame: int, dtype: torch.dtype) -> None:
    """Stop at numbers that are none, which would be written as black frames and compared as equal.

    Args:
        made: by the model.
        frame: number of the first frame of it.
        dtype: the model's.

    Raises:
        UserError: there are some.
    """
    if not made.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        advice = "use other weights" if dtype is torch.float32 else "try --dtype float32, or other weights"
        raise UserError(f"frame {frame}: the model's output is not finite in {kind}; {advice}")


@torch.no_grad()
def randomize(model: CausalVideoTransformer) -> None:
    """Random weights in every branch (those that start at zero included), so that exactness checks can fail."""
    for parameter in model.parameters():
        if parameter.count_nonzero() == 0:
            if parameter.ndim > 1:
                torch.nn.init.xavier_uniform_(parameter, gain=0.5)  # all of it saturates the attention of deep models
            else:
                torch.nn.init.normal_(parameter, std=0.02)


def _repeat(given: Frames, options: RunOptions) -> Frames:
    """The same given frames (T, H, W, channels) for each of the videos: (B, T, H, W, channels)."""
    return np.stack([given] * len(options.get("videos", (0,))))


def _after(given: Frames, chunks: Iterator[VideoChunk]) -> Iterator[VideoChunk]:
    """The given frames, joined to the first chunk."""
    first = next(chunks)
    yield replace(first, frames=np.concatenate([given, first.frames], axis=1))
    yield from chunks
