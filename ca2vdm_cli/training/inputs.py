"""What a run is trained on: clips, the encoders that they need, and what a resumed run remembers about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ca2vdm_cli.autoencoder import Autoencoder
from ca2vdm_cli.config import Preset
from ca2vdm_cli.data import Clips, ClipSource, cache_latents, open_clips
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.text_encoder import TextEncoder

from .callbacks import TrainingCallbacks
from .checkpoints import Checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Inputs:
    """What a run is trained on, which a resumed run remembers."""

    data: str | Path | ClipSource | None
    validation_data: str | Path | ClipSource | None
    cache_latents: str | Path | None
    teacher: str | Path | None
    given_seed: int | None

    def resumed(self, last: Checkpoint | None) -> Inputs:
        """The inputs of the run to resume, except for what is given now.

        Raises:
            UsageError: a seed that differs from the run's, no such teacher, or a clip source that can't be restored.
        """
        facts = {} if last is None else last.facts
        if not isinstance(self.seed, int) or not 0 <= self.seed <= LARGEST_SEED:
            raise UsageError(f"seed: {self.seed!r} must be a whole number from 0 to {LARGEST_SEED}")
        if self.given_seed is not None and facts.get("seed", str(self.given_seed)) != str(self.given_seed):
            raise UsageError(f"seed: {self.given_seed} is not the resumed run's seed, {facts['seed']}; leave it out")
        teacher = self.teacher or facts.get("teacher")
        if teacher is not None and not Path(teacher).exists():
            raise UsageError(f"teacher: {teacher}: no such file or folder; name the teacher's weights, or its run")
        if self.data is None and "clip_source" in facts:
            raise UsageError(f"data: the run was trained on a {facts['clip_source']} object; pass one to resume it")
        if self.validation_data is None and "validation_source" in facts:
            source = facts["validation_source"]
            raise UsageError(f"validation_data: the run was validated on a {source} object; pass one to resume it")
        return Inputs(
            facts.get("origin") if self.data is None else self.data,
            facts.get("validation") if self.validation_data is None else self.validation_data,
            self.cache_latents or facts.get("latents"),
            teacher,
            int(facts["seed"]) if "seed" in facts else self.given_seed,
        )

    @property
    def seed(self) -> int:
        """Seed of all randomness."""
        return self.given_seed or 0

    @property
    def facts(self) -> dict[str, str]:
        """What a checkpoint remembers about them."""
        paths = {
            "origin": self.data,
            "validation": self.validation_data,
            "latents": self.cache_latents,
            "teacher": self.teacher,
        }
        facts = {name: str(Path(path).resolve()) for name, path in paths.items() if isinstance(path, (str, Path))}
        if self.data is not None and "origin" not in facts:
            facts["clip_source"] = type(self.data).__name__
        if self.validation_data is not None and "validation" not in facts:
            facts["validation_source"] = type(self.validation_data).__name__
        return facts


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes."""

    accelerator: Accelerator
    backend: Backend
    dtype: torch.dtype
    """Of matrix products."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device


# Clips, and what encodes them


def open_source(data: str | Path | ClipSource | None, config: Preset, seed: int, argument: str) -> ClipSource:
    """Clips of a data set, of an object, or of the preset's synthetic data.

    Raises:
        UsageError: no such data set, or the object's clips don't fit the preset.
    """
    if data is None or isinstance(data, (str, Path)):
        return open_clips(None if data is None else Path(data), config, seed, config.clip_frames)
    assert config.video is not None
    if not callable(getattr(data, "clip", None)):
        raise UsageError(f"{argument}: {data!r} is neither a path nor an object with the methods of ClipSource")
    shape = tuple(data.clip(0, 1).frames.shape)
    expected = (1, config.video.channels, config.video.height, config.video.width)
    if shape != expected:
        raise UsageError(f"{argument}: a clip of one frame has shape {shape}; it must be {expected} (T, C, H, W)")
    return data


def open_text_encoder(
    config: Preset, source: ClipSource, machine: Machine, callbacks: TrainingCallbacks
) -> TextEncoder | None:
    """The text encoder, or None without captions."""
    with machine.accelerator.main_process_first():  # it may have to be downloaded
        if config.text is not None:
            return TextEncoder(config.text, config.model, machine.device, machine.dtype)
    if config.model.text_channels and isinstance(source, Clips) and any(v.caption for v in source.videos):
        callbacks.note("text: the data has captions, but the preset names no text encoder; they are not used")
    return None


def cached_clips(
    source: ClipSource,
    autoencoder: Autoencoder,
    config: Preset,
    folder: Path,
    device: torch.device,
    callbacks: TrainingCallbacks,
) -> ClipSource:
    """The clips as latents, from videos that are encoded once and cached in ``folder``."""
    clips, report = cache_latents(source, autoencoder, config.autoencoder, folder, device, callbacks.on_encoded)
    for name, reason in report.stale.items():
        callbacks.note(f"{folder}: the entry of {name} is stale ({reason}) and was encoded again")
    callbacks.note(f"{folder}: encoded {report.encoded} videos, reused the latents of {report.reused}")
    return clips
