"""The Python API: a model with its autoencoder and settings, ready to generate video. The commands are thin wrappers.

    pipeline = Pipeline.load("moving-digits")
    for chunk in pipeline.sample(frames=600, seed=1):
        show(chunk.frames)  # (videos, frames, height, width, channels) uint8

Shapes: pixels (B videos, T frames, H, W, 1 or 3 channels), latents (B, C, T, h, w).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from .arguments import (
    check_function,
    check_names,
    check_number,
    check_overrides,
    check_text,
    whole_number,
    whole_numbers,
)
from .autoencoder import Autoencoder, autoencoders, load_autoencoder
from .config import Preset
from .errors import UsageError
from .generate.checks import check_latents
from .generate.context import Context, contexts, make_context
from .generate.diffusion import NoiseProcess
from .generate.journal import Journal, continued, run_facts
from .generate.loop import Caption, LatentChunk, SeededNoise, generate, stored_caption
from .generate.samplers import sampler_for
from .loading import build_model, find_weights, randomize
from .memory import check_generation, generation_needs
from .model.attention import Backend
from .model.transformer import CausalVideoTransformer
from .plugins import choose_backend
from .presets import LoadedPreset, Overrides
from .runtime import Dtype, resolve_device, resolve_dtype, synchronize
from .text_encoder import TextEncoder
from .video_codec import decode_video, encode_video, to_floats

Frames = np.ndarray
"""uint8 pixels (B, T, H, W, channels)."""


class RunOptions(TypedDict, total=False):
    """Options of ``Pipeline.sample`` and ``Pipeline.extend``; all have a default.

    Args:
        videos: which videos to generate together; video 0 by default. Video k of a seed does not depend on the others;
            docs/getting-started.md says how exactly.
        seed: seed of all randomness; 0 by default.
        steps: number of denoising steps; the preset's by default.
        sampler: name of a sampler; the preset's by default.
        strategy: name of a context; ``cached`` by default.
        context_frames: window in frames; the preset's by default.
        prompt: what all videos show, for presets with a text encoder; the stored unconditional caption by default.
        guidance: how strongly to follow the prompt; the preset's by default.
        caption: text embeddings, one row per video, instead of a prompt.
        on_step: called with (chunk index, steps done).
        journal: a folder that keeps each finished chunk. The same call later reads them from there and generates the
            rest.
    """

    videos: Sequence[int]
    seed: int
    steps: int | None
    sampler: str | None
    strategy: str
    context_frames: int | None
    prompt: str | None
    guidance: float | None
    caption: Caption | None
    on_step: Callable[[int, int], None] | None
    journal: Journal | str | Path | None


@dataclass(frozen=True)
class VideoChunk:
    """Finished frames, in order. The last chunk of a run is cut to the requested length."""

    index: int
    """Number of the chunk, from 0."""
    frames: Frames
    """(B, T, H, W, channels) uint8."""
    denoise_seconds: float
    """Time spent in the denoising steps."""
    write_seconds: float
    """Time spent writing the preceding frames to the context."""
    decode_seconds: float
    """Time to decode the chunk."""
    encode_seconds: float
    """Time to encode the given frames; 0 except in the first chunk."""
    context_bytes: int
    """Bytes kept from chunk to chunk: keys and values, or latents."""
    from_journal: bool = False
    """Whether it was read from the journal instead of generated."""


class Pipeline:
    """A causal video diffusion model with everything needed to generate video; see ``load``.

    Args:
        preset: the settings.
        model: the network.
        autoencoder: converts between pixels and latents; None to work on latents only.
        trained: whether the weights are trained ones.
    """

    def __init__(
        self, preset: LoadedPreset, model: CausalVideoTransformer, autoencoder: Autoencoder | None, *, trained: bool
    ) -> None:
        self.preset, self.model, self.autoencoder, self.trained = preset, model, autoencoder, trained
        self.config: Preset = preset.config
        self.process = NoiseProcess(self.config.diffusion)
        self.force = False
        """Whether to go on even if the estimate says that there is too little memory."""
        self._text_encoder: TextEncoder | None = None  # loaded for the first prompt

    @classmethod
    def load(
        cls,
        preset: str | Path | Preset | LoadedPreset | None = None,
        *,
        checkpoint: str | Path | None = None,
        overrides: Overrides = (),
        backend: str = "auto",
        device: str | torch.device = "auto",
        dtype: Dtype | str | torch.dtype = Dtype.AUTO,
        random_weights: bool = False,
        pixels: bool = True,
        seed: int = 0,
        force: bool = False,
    ) -> Pipeline:
        """Load a preset and its weights.

        Args:
            preset: name, file or folder; by default the ``preset.yaml`` beside the checkpoint, else the default preset.
            checkpoint: weights (safetensors) to use instead of the preset's, or the folder of a training run.
            overrides: settings, as ``{"model.context_frames": 9}`` or as ``["model.context_frames=9"]``.
            backend: name, or ``auto`` for the best available one.
            device: name, ``auto``, or a ``torch.device``.
            dtype: dtype of the model's weights, activations and cache: a name, ``auto``, or a ``torch.dtype``.
            random_weights: allow a preset without weights; they are then drawn from ``seed`` (for benchmarks).
            pixels: whether to load the autoencoder; without it there are latents only.
            seed: seed of random weights.
            force: go on even if the estimate says that there is too little memory, now and when generating.

        Raises:
            UsageError: an argument names something that does not exist or does not fit.
            UserError: the weights can't be read.
        """
        check_overrides(overrides)
        check_text("backend", backend)
        for name, value in (("preset", preset), ("checkpoint", checkpoint)):
            if not isinstance(value, (str, Path, Preset, LoadedPreset, type(None))):
                raise UsageError(f"{name}: {value!r} must be a name or a path")
        seed = whole_number("seed", seed)
        loaded, weights = find_weights(preset, checkpoint, overrides)
        if weights is None and not random_weights:
            raise UsageError(
                f"preset {loaded.name}: it has no weights; train some (ca2vdm train --preset {loaded.name}), import "
                "some (ca2vdm import) and give them with `checkpoint`, or choose a preset with weights (ca2vdm presets)"
            )
        loaded = replace(loaded, weights_path=weights)
        torch_device = resolve_device(str(device))
        torch_dtype = resolve_dtype(dtype, torch_device)
        chosen = choose_backend(backend, torch_device, torch_dtype)
        needs = generation_needs(
            loaded.config,
            torch_dtype,
            torch_device,
            scores=chosen.writes_scores,
            weights_file_bytes=0 if weights is None else weights.stat().st_size,
        )
        check_generation(needs, torch_device, force=force)
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
            torch.manual_seed(seed)
            model = build_model(loaded.config.model, chosen, weights=weights)
            if weights is None:
                randomize(model)
        model.to(torch_device, torch_dtype)
        autoencoder = _load_autoencoder(loaded, torch_device) if pixels and weights is not None else None
        pipeline = cls(loaded, model, autoencoder, trained=weights is not None)
        pipeline.force = force
        return pipeline

    def check_memory(
        self, contexts: Sequence[str] = ("cached",), videos: int = 1, context_frames: int | None = None
    ) -> None:
        """Raise ``UsageError`` if these contexts together need more memory than there is, unless ``force`` is set."""
        needs = generation_needs(
            self.config,
            self.model.dtype,
            self.model.device,
            scores=self.backend.writes_scores,
            videos=videos,
            context_frames=context_frames,
            contexts=contexts,
        )
        check_generation(needs, self.model.device, force=self.force, loaded=True)

    @property
    def backend(self) -> Backend:
        """The backend that runs the model."""
        return self.model.backend

    @property
    def weights_bytes(self) -> int:
        """Bytes of the model's and the autoencoder's weights in memory."""
        modules = [self.model] if self.autoencoder is None else [self.model, self.autoencoder]
        return sum(t.nbytes for module in modules for t in module.state_dict().values())

    def sample(
        self, frames: int, *, first_frame: Frames | None = None, **options: Unpack[RunOptions]
    ) -> Iterator[VideoChunk]:
        """Generate videos from scratch, or from a given first frame.

        Args:
            frames: length in frames, including the given one; any number.
            first_frame: (H, W, channels) uint8 at the model's size; needed by weights that were not trained to start
                from an empty context.
            options: videos, seed, steps, sampler, strategy, context_frames, prompt, guidance, caption, on_step,
                journal; see ``help(ca2vdm_cli.RunOptions)``.

        Raises:
            UsageError: the request can't be met.
        """
        if first_frame is None and not self.config.diffusion.unconditional_start:
            raise UsageError(
                f"preset {self.preset.name}: these weights were not trained to start from an empty context; "
                "give a first frame"
            )
        if first_frame is None:
            return self._run(frames, None, options)
        given = self._checked(first_frame, dimensions=3)
        if whole_number("frames", frames, 1) == 1:
            whole_numbers("videos", options.get("videos", (0,)), 0)
            return iter([VideoChunk(0, _repeat(given, options), 0.0, 0.0, 0.0, 0.0, 0)])
        return _after(_repeat(given, options), self._run(frames - 1, given, options))

    def extend(self, given: Frames, frames: int, **options: Unpack[RunOptions]) -> Iterator[VideoChunk]:
        """Continue a video; only the new frames are yielded.

        Args:
            given: (T, H, W, channels) uint8 at the model's size; the last ones that fit the window are used.
            frames: number of new frames.
            options: videos, seed, steps, sampler, strategy, context_frames, prompt, guidance, caption, on_step,
                journal; see ``help(ca2vdm_cli.RunOptions)``.

        Raises:
            UsageError: a request that can't be met.
        """
        window = options.get("context_frames") or self.config.model.context_frames
        return self._run(frames, self._checked(given)[-whole_number("context frames", window, 1) :], options)

    def _checked(self, given: Frames, dimensions: int = 4) -> Frames:
        """Check frames from the caller, (T, H, W, channels) or one (H, W, channels)."""
        self._autoencoder()
        video = self.config.video
        assert video is not None
        if not isinstance(given, np.ndarray):
            raise UsageError(f"given frames: they must be a NumPy array, not {type(given).__name__}")
        if dimensions == 3:
            given = given[None]
        size = (video.height, video.width, video.channels)
        if given.dtype != np.uint8 or given.ndim != 4 or not len(given) or given.shape[1:] != size:
            raise UsageError(
                f"given frames: {given.dtype} {given.shape} must be uint8 "
                f"(frames, {', '.join(map(str, size))}), at least one"
            )
        return given

    def _run(self, frames: int, given: Frames | None, options: RunOptions) -> Iterator[VideoChunk]:
        """Generate frames after the given ones (T, H, W, channels), which are the same for all videos.

        The whole request is checked at once, so that an invalid one fails before the first chunk is requested.
        """
        self._autoencoder()
        options = _checked_options(options)
        frames = whole_number("frames", frames, 1)
        length, sampling = self.config.model.chunk_frames, self.config.sampling
        sampler = sampler_for(self.process, sampling, name=options.get("sampler"), steps=options.get("steps"))
        videos = whole_numbers("videos", options.get("videos", (0,)), 0)
        strategy = options.get("strategy") or "cached"
        contexts.check(strategy, "strategy")
        caption = self._caption(options, len(videos))
        rows = len(videos) * (2 if caption is not None and caption.guided else 1)
        self.check_memory((strategy,), rows, options.get("context_frames"))
        context = make_context(
            self.model,
            strategy,
            rows,
            context_frames=options.get("context_frames"),
            timesteps=sampler.timesteps,
        )
        chunks = math.ceil(frames / length)
        context.window.check_length((0 if given is None else len(given)) + chunks * length)
        noise = SeededNoise(options.get("seed", 0), videos, self.config.model.chunk_shape, self.model.device)
        run = partial(
            generate, context, self.process, sampler, noise, chunks, caption=caption, on_step=options.get("on_step")
        )
        journal = options.get("journal")
        if journal is not None:
            journal = journal if isinstance(journal, Journal) else Journal(journal)
            if not context.repeatable:
                raise UsageError(f"strategy: {strategy} cannot be resumed, so it takes no journal; use cached")
            seed, prompt = options.get("seed", 0), options.get("prompt")
            extra = {"videos": videos, "seed": seed, "strategy": strategy, "prompt": prompt}
            journal.check(extra | run_facts(self.config, context, sampler, caption, given))
            run = partial(continued, journal, context, self.process, noise, chunks, run)
        return self._stream(frames, videos, given, context, run, journal)

    def _caption(self, options: RunOptions, videos: int) -> Caption | None:
        """The caption that the videos follow; None for a model without text."""
        prompt, guidance, caption = options.get("prompt"), options.get("guidance"), options.get("caption")
        if prompt is None:
            if guidance is not None:
                raise UsageError("guidance: there is no prompt to follow; give one with `prompt`")
            return caption or stored_caption(self.model, videos)
        if caption is not None:
            raise UsageError("prompt: a caption is given too; leave out one of them")
        stored, config = self.model.unconditional_caption(videos), self.config
        if stored is None:
            raise UsageError(f"preset {self.preset.name}: its model takes no text; leave out the prompt")
        if config.text is None:
            raise UsageError(
                f"preset {self.preset.name}: it names no text encoder; leave out the prompt, or set text.path"
            )
        if self._text_encoder is None:
            dtype = torch.bfloat16 if self.model.dtype is torch.bfloat16 else torch.float32
            self._text_encoder = TextEncoder(config.text, config.model, self.model.device, dtype)
        text = self._text_encoder([prompt] * videos, stored)
        return Caption(*text, config.sampling.guidance if guidance is None else guidance)

    def _stream(
        self,
        frames: int,
        videos: list[int],
        given: Frames | None,
        context: Context,
        run: Callable[..., Iterator[LatentChunk]],
        journal: Journal | None,
    ) -> Iterator[VideoChunk]:
        """Encode the given frames, then decode chunk after chunk until there are enough frames."""
        began = time.perf_counter()
        latents = None if given is None else self.encode(given[None]).expand(len(videos), -1, -1, -1, -1)
        synchronize(self.model.device)
        encode_seconds = time.perf_counter() - began
        for chunk in run(given=latents):
            check_latents(chunk.latents, chunk.first_frame, videos, self.model.dtype)
            if journal is not None and not chunk.from_journal:
                journal.keep(chunk, context)
            decoding = time.perf_counter()
            pixels = self.decode(chunk.latents[:, :, :frames], chunk.first_frame)
            frames -= pixels.shape[1]
            yield VideoChunk(
                chunk.index,
                pixels,
                chunk.denoise_seconds,
                chunk.write_seconds,
                time.perf_counter() - decoding,
                encode_seconds,
                context.nbytes,
                chunk.from_journal,
            )
            encode_seconds = 0.0

    @torch.inference_mode()
    def encode(self, frames: Frames) -> Tensor:
        """Pixels (B, T, H, W, channels) uint8 at the model's size -> latents (B, C, T, h, w).

        Raises:
            UserError: a latent is NaN or infinite.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(self.model.device)
        return encode_video(self._autoencoder(), to_floats(pixels))

    @torch.inference_mode()
    def decode(self, latents: Tensor, first_frame: int = 0) -> Frames:
        """Latents (B, C, T, h, w) -> pixels (B, T, H, W, channels) uint8.

        Args:
            latents: of one or several videos.
            first_frame: number of their first frame, for errors.

        Raises:
            UserError: a pixel is NaN or infinite.
        """
        return decode_video(self._autoencoder(), latents, first_frame).cpu().numpy()

    def _autoencoder(self) -> Autoencoder:
        if self.autoencoder is None:
            raise UsageError(f"preset {self.preset.name}: it works on latents only and produces no frames")
        return self.autoencoder


def _load_autoencoder(preset: LoadedPreset, device: torch.device) -> Autoencoder | None:
    """The preset's autoencoder; None for a preset that works on latents only."""
    config, weights = preset.config, preset.autoencoder_weights_path
    if config.video is None:
        return None
    if autoencoders[config.autoencoder.kind].trained_here and weights is None:
        raise UsageError(
            f"preset {preset.name}: its autoencoder has no weights; use the folder of a training run as preset, or "
            "set autoencoder_weights to a file beside the preset"
        )
    return load_autoencoder(config.autoencoder, config.video, config.model.in_channels, weights).to(device)


def _checked_options(options: RunOptions) -> RunOptions:
    """The options with Python's own integers, after a check of their types.

    Raises:
        UsageError: one is unknown or of another type.
    """
    check_names(options, list(RunOptions.__annotations__))
    checked = options.copy()
    checked["seed"] = whole_number("seed", options.get("seed", 0), 0)
    if (steps := options.get("steps")) is not None:
        checked["steps"] = whole_number("steps", steps, 1)
    if (window := options.get("context_frames")) is not None:
        checked["context_frames"] = whole_number("context frames", window, 1)
    for name in ("sampler", "strategy", "prompt"):
        check_text(name, options.get(name))
    check_number("guidance", options.get("guidance"))
    check_function("on_step", options.get("on_step"))
    if not isinstance(options.get("caption"), Caption | None):
        raise UsageError("caption: it must be a ca2vdm_cli.generate.loop.Caption; for text use `prompt`")
    return checked


def _repeat(given: Frames, options: RunOptions) -> Frames:
    """Repeat the given frames (T, H, W, channels) for each video: (B, T, H, W, channels)."""
    return np.stack([given] * len(options.get("videos", (0,))))


def _after(given: Frames, chunks: Iterator[VideoChunk]) -> Iterator[VideoChunk]:
    """Prepend the given frames to the first chunk."""
    first = next(chunks)
    yield replace(first, frames=np.concatenate([given, first.frames], axis=1))
    yield from chunks
