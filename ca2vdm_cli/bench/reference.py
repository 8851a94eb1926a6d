"""Recorded runs: safetensors files with a model's configuration, weights, inputs and outputs.

They come from the published code, or from any other implementation to compare with. The metadata's key ``config`` is
JSON; tensors are named ``weights.*``, ``input.*`` and ``expected.*``. Absent tensors are not checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ca2vdm_cli.checkpoint import check_finite_weights, load_tensors, load_weights, match_weights
from ca2vdm_cli.config import DiffusionConfig, ModelConfig, Preset
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.generate.context import make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.loop import Caption, generate
from ca2vdm_cli.generate.samplers import AncestralSampler
from ca2vdm_cli.loading import build_model, model_state
from ca2vdm_cli.memory import check_generation, generation_needs
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.model.transformer import CausalVideoTransformer

INPUTS = {
    "window_clean": "B C P h w",
    "window_noisy": "B C l h w",
    "window_timestep": "B",
    "first_frames": "B C F h w",
    "initial_noise": "A B C l h w",
    "step_noise": "A N B C l h w",
    "timesteps": "N",
    "text_embedding": "B 1 M E",
    "text_mask": "B M",
}
"""Shapes of the recorded inputs; equal letters are equal sizes."""
WHOLE_NUMBERS = ("window_timestep", "timesteps", "text_mask")
MAX_GUIDANCE = 1e6


@dataclass(frozen=True)
class Comparison:
    """One recorded tensor compared with ours."""

    name: str
    """The tensor's name without ``expected.``"""
    difference: float
    """Largest absolute difference."""
    per_chunk: tuple[float, ...] = ()
    """For whole videos, the largest difference in each chunk."""


class RecordedNoise:
    """The noise of a recorded run, in the order in which it was drawn."""

    def __init__(self, initial: Tensor, step: Tensor) -> None:
        self._initial, self._step = initial, step  # (A, B, C, L, h, w), (A, N, B, C, L, h, w)
        self._chunk = 0

    def chunk(self, index: int) -> None:
        self._chunk = max(0, index)

    def initial(self, process: NoiseProcess) -> Tensor:
        return self._initial[self._chunk]

    def step(self, index: int) -> Tensor:
        return self._step[self._chunk, index]

    def perturb(self, process: NoiseProcess, latents: Tensor) -> Tensor:
        return latents


class RecordedRun:
    """A recorded run, read and checked.

    Args:
        path: the file.

    Raises:
        UserError: the file is not a recorded run, or its configuration is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, metadata = load_tensors(path)
        self.unread: tuple[str, ...] = ()
        """Recorded weights that the model does not read; known once ``model`` has loaded them."""
        try:
            raw: dict[str, Any] = dict(json.loads(metadata["config"]))
        except (KeyError, ValueError, TypeError, RecursionError):
            raise UserError(f"{path}: not a recorded run: its metadata has no JSON 'config'") from None
        try:
            self.config = _model_config(raw)
            self.guidance_scale = float(raw.get("guidance_scale", 1.0))
            self.process = NoiseProcess(DiffusionConfig(train_timesteps=int(raw.get("train_timesteps", 1000))))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise UserError(f"{path}: config: {'.'.join(map(str, problem['loc']))} {problem['msg']}") from None
        except (KeyError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise UserError(f"{path}: its config is not supported ({type(error).__name__}: {error})") from None
        if not str(raw.get("beta_schedule", "linear 1e-4..2e-2")).startswith("linear"):
            raise UserError(f"{path}: beta_schedule {raw['beta_schedule']!r} is not supported; only linear is")
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise UserError(f"{path}: guidance_scale {self.guidance_scale} must be from 0 to {MAX_GUIDANCE:.0f}")
        self._check_tensors()

    def model(
        self, backend: Backend, device: torch.device, dtype: torch.dtype, *, force: bool = False
    ) -> CausalVideoTransformer:
        """A model with the recorded weights; ``force`` tries to run it even if it needs more memory than there is."""
        preset = Preset(description="recorded", model=self.config)
        videos = 2 * max((x.shape[0] for k, x in self.tensors.items() if k.endswith(".first_frames")), default=1)
        needs = generation_needs(
            preset, dtype, device, scores=backend.writes_scores, videos=videos, contexts=("cached", "recompute")
        )
        check_generation(needs, device, force=force)
        model = build_model(self.config, backend)
        self.unread = load_weights(model, self._weights(), str(self.path)).unread
        return model.to(device, dtype)

    def compare(self, model: CausalVideoTransformer) -> Iterator[Comparison]:
        """Rerun everything that was recorded and compare, one tensor at a time."""
        for strategy in ("recompute", "cached"):
            window = self._expected(f"window_{strategy}")
            if window is not None:
                yield _compare(f"window_{strategy}", self._window(model, strategy), window)
            video = self._expected(f"video_{strategy}")
            if video is not None:
                given = self._input("first_frames").shape[2]
                ours = self._video(model, strategy)
                yield _compare(f"video_{strategy}", ours, video, given, self.config.chunk_frames)

    def _weights(self) -> dict[str, Tensor]:
        return {k.removeprefix("weights."): v for k, v in self.tensors.items() if k.startswith("weights.")}

    def _check_tensors(self) -> None:
        """Raise ``UserError`` if weights or inputs don't have the shapes of the configuration, before it is built."""
        match_weights(
            model_state(self.config), self._weights(), str(self.path), advice="its config does not fit its weights"
        )
        config = self.config
        sizes = {"C": config.in_channels, "l": config.chunk_frames, "M": config.text_tokens, "E": config.text_channels}
        sizes |= {"h": config.latent_height, "w": config.latent_width}
        for name, letters in INPUTS.items():
            tensor = self.tensors.get(f"input.{name}")
            if tensor is None:
                continue
            shape, axes = tuple(tensor.shape), letters.split()
            fits = len(shape) == len(axes) and 0 not in shape
            if not fits or any(size != sizes.setdefault(axis, size) for axis, size in zip(axes, shape, strict=True)):
                needed = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
                raise UserError(f"{self.path}: input.{name} has shape {shape}; it must be ({needed})")
            if tensor.is_floating_point() == (name in WHOLE_NUMBERS):
                raise UserError(f"{self.path}: input.{name} has the wrong dtype, {str(tensor.dtype)[6:]}")
            check_finite_weights(f"input.{name}", tensor, str(self.path))

    def _expected(self, name: str) -> Tensor | None:
        return self.tensors.get(f"expected.{name}")

    def _input(self, name: str) -> Tensor:
        try:
            return self.tensors[f"input.{name}"]
        except KeyError:
            raise UserError(f"{self.path}: has no tensor input.{name}, which its expected.* tensors need") from None

    def _caption(self, guidance_scale: float) -> Caption | None:
        if not self.config.text_channels:
            return None
        return Caption(self._input("text_embedding")[:, 0], self._input("text_mask"), guidance_scale)

    @torch.inference_mode()
    def _window(self, model: CausalVideoTransformer, strategy: str) -> Tensor:
        """One denoising forward after a clean prefix, which is appended frame 0 first, then a chunk at a time."""
        clean, noisy = self._input("window_clean").to(model.device), self._input("window_noisy").to(model.device)
        context = make_context(model, strategy, clean.shape[0])
        caption = self._caption(1.0)
        if caption is not None:
            context.set_text(model.text_keys_values(caption.embedding.to(model.device), caption.mask.to(model.device)))
        context.append(clean[:, :, :1])
        for part in clean[:, :, 1:].split(self.config.chunk_frames, dim=2):
            context.append(part)
        context.open_chunk()
        return context.predict(noisy, self._input("window_timestep").to(model.device)).float()

    @torch.inference_mode()
    def _video(self, model: CausalVideoTransformer, strategy: str) -> Tensor:
        given = self._input("first_frames").to(model.device)
        initial, step = self._input("initial_noise").to(model.device), self._input("step_noise").to(model.device)
        timesteps = [int(t) for t in self._input("timesteps").flatten()]
        decreasing, length = all(a > b for a, b in pairwise(timesteps)), self.process.config.train_timesteps
        if not timesteps or not decreasing or timesteps[-1] < 0 or timesteps[0] >= length:
            raise UserError(f"{self.path}: input.timesteps must decrease, from below {length} to 0 or more")
        sampler = AncestralSampler(self.process, len(timesteps), timesteps=timesteps)
        caption = self._caption(self.guidance_scale)
        halves = 2 if caption is not None and caption.guided else 1
        context = make_context(model, strategy, given.shape[0] * halves)
        chunks = generate(
            context, self.process, sampler, RecordedNoise(initial, step), len(initial), given=given, caption=caption
        )
        return torch.cat([given, *(chunk.latents for chunk in chunks)], dim=2)


def _model_config(raw: dict[str, Any]) -> ModelConfig:
    """The model's configuration from the recorded settings."""
    prefix = str(raw["prefix_enhanced_spatial_attention"])
    frames = int(prefix.removeprefix("prev_frames_")) if prefix.startswith("prev_frames_") else 1
    patch = raw["patch_size"]
    if patch[0] != 1 or patch[1] != patch[2]:
        raise ValueError(f"patch_size: {patch} must be [1, p, p]")
    return ModelConfig(
        depth=raw["depth"],
        hidden_size=raw["hidden_size"],
        num_heads=raw["num_heads"],
        mlp_ratio=raw.get("mlp_ratio", 4.0),
        patch_size=patch[1],
        in_channels=raw["in_channels"],
        latent_height=raw["latent_height"],
        latent_width=raw["latent_width"],
        context_frames=raw["max_context_frames"],
        chunk_frames=raw["chunk_frames"],
        position_table=raw.get("temporal_positions") or 0,
        temporal_positions=raw["temporal_embedding"],
        spatial_prefix="prev_frames_k" if prefix.startswith("prev_frames_") else prefix,  # type: ignore[arg-type]
        spatial_prefix_frames=frames,
        causality=raw.get("causal", "causal"),
        mask_channel=bool(raw.get("mask_channels", 0)),
        text_channels=raw.get("text_channels", 0),
        text_tokens=raw.get("text_tokens", 0),
        learn_variance=raw.get("predicts_variance", True),
    )


def _compare(name: str, ours: Tensor, recorded: Tensor, given: int = 0, chunk: int = 0) -> Comparison:
    if ours.shape != recorded.shape:
        raise UserError(f"expected.{name}: recorded shape {tuple(recorded.shape)} is not ours, {tuple(ours.shape)}")
    difference = (ours.cpu() - recorded).abs()
    chunks = difference[:, :, given:].split(chunk, dim=2) if chunk else ()
    return Comparison(name, difference.max().item(), tuple(part.max().item() for part in chunks))
