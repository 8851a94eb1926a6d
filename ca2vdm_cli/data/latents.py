"""Encoded videos on disk: the autoencoder runs over a data set once, and training reads latents.

Shapes: T frames, C channels, H height, W width; c latent channels, h and w latent height and width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ca2vdm_cli.checkpoint import save_tensors
from ca2vdm_cli.config import AutoencoderConfig, Crop
from ca2vdm_cli.errors import UsageError, UserError

from .clips import Clips, VideoClips, reason_of
from .source import ClipSource
from .videos import Video

VERSION = "1"
"""Of the entries; it changes when what they hold does."""
SAMPLE = 64 * 1024
"""Bytes at either end of a file that its key depends on, beside its size and time of change."""
FRAMES = 16
"""Frames that are encoded together."""
ENTRY_BYTES = 2**31
"""Of one entry; of a video whose latents would be larger the beginning is kept."""
_KEY = "key"


class Encoder(Protocol):
    """The half of an autoencoder that is needed."""

    def encode(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, c, h, w)."""


@dataclass(frozen=True)
class CacheReport:
    """What filling a cache came to, in videos."""

    encoded: int
    """Encoded now, the stale ones included."""
    reused: int
    """Found in the cache."""
    stale: dict[str, str]
    """Why an entry was there and could not be used, by video."""


def cache_latents(
    source: ClipSource,
    autoencoder: Encoder,
    config: AutoencoderConfig,
    folder: Path,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LatentClips, CacheReport]:
    """Encode every video of a source that is not in the cache yet.

    An entry is a safetensors file: ``latents`` and, where clips are flipped, ``flipped``, float16 (T, c, h, w) of every
    frame of the video. It is used again only if the video's file, the size and crop of frames, and the autoencoder with
    its weights are all as they were.

    Args:
        source: videos; what is drawn from the latents are its clips, encoded.
        autoencoder: it runs where ``device`` says, and must be there.
        config: the autoencoder's settings.
        folder: the cache; made if it is not there.
        device: where frames go to be encoded; the processor by default.
        progress: called after every video with how many are done, and how many there are.

    Raises:
        UsageError: a source without videos, or with a random crop.
        UserError: nothing is usable, or the cache cannot be written.
    """
    if not isinstance(source, VideoClips):
        raise UsageError(
            "--cache-latents: moving-digits never repeats a clip, so there is nothing to keep; leave it out"
        )
    if source.data.crop is Crop.RANDOM:
        raise UsageError("--cache-latents: data.crop random needs the frames themselves; use stretch, crop or pad")
    settings = {
        "version": VERSION,
        "video": [source.video.height, source.video.width, source.video.channels],
        "crop": source.data.crop.value,
        "flip": source.data.flip,
        "autoencoder": asdict(config),
        "weights": weights_hash(autoencoder),
    }
    encoded, reused = 0, 0
    stale: dict[str, str] = {}
    entries: dict[int, tuple[Path, int]] = {}
    skipped = dict(source.skipped)
    for number, video in enumerate(source.videos):
        path = folder / _entry(video)
        try:
            key = settings | _identity(video)
            frames, problem = _check(path, key)
            if problem:
                stale[video.name] = problem
            if frames:
                reused += 1
            elif video.name not in source.skipped:
                frames = _encode(source, number, autoencoder, path, key, device)
                encoded += 1
            if frames:
                entries[number] = (path, frames)
        except UserError as error:
            if str(error).startswith(f"{path}: "):
                raise
            skipped[video.name] = reason_of(error, video)
        progress(number + 1, len(source.videos))
    return LatentClips(source, entries, skipped), CacheReport(encoded, reused, stale)


def weights_hash(autoencoder: Encoder) -> str:
    """SHA-256 of an autoencoder's weights, their names, types and shapes."""
    digest = hashlib.sha256()
    state = autoencoder.state_dict() if isinstance(autoencoder, nn.Module) else {}
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _entry(video: Video) -> str:
    """The name of a video's entry; a list may have the video many times, with other captions."""
    place = f"{video.file.absolute()}\n{video.part}".encode("utf-8", "surrogateescape")
    return f"{hashlib.sha256(place).hexdigest()[:40]}.safetensors"


def _identity(video: Video) -> dict[str, object]:
    """What tells a video from another, and from what it was before; raises UserError."""
    file = video.file
    digest = hashlib.sha256(video.part.encode("utf-8", "surrogateescape"))
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            digest.update(stream.read(SAMPLE))
            stream.seek(max(0, status.st_size - SAMPLE))
            digest.update(stream.read(SAMPLE))
        for other in video.files[1:]:
            digest.update(f"{other.stat().st_size} {other.stat().st_mtime_ns}\n".encode())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return {
        "file": str(file.absolute()),
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "content": digest.hexdigest(),
    }


def _check(path: Path, key: dict[str, object]) -> tuple[int, str]:
    """Frames of a cache entry, 0 if it cannot be used; and why not, unless there is none."""
    if not path.exists():
        return 0, ""
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[_KEY])
            wanted = json.loads(json.dumps(key))
            for name in wanted:
                if not isinstance(stored, dict) or stored.get(name) != wanted[name]:
                    return 0, f"its {name} has changed"
            shapes = {tuple(file.get_slice(name).get_shape()) for name in _versions(bool(key["flip"]))}
            (shape,) = shapes
            return (int(shape[0]), "") if len(shape) == 4 else (0, "its latents have no shape (T, c, h, w)")
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError):
        return 0, "it cannot be read"


def _versions(flip: bool) -> Sequence[str]:
    return ("latents", "flipped") if flip else ("latents",)


@torch.no_grad()
def _encode(
    source: VideoClips,
    number: int,
    autoencoder: Encoder,
    path: Path,
    key: dict[str, object],
    device: torch.device | None,
) -> int:
    """Encode a video into its entry; returns how many frames could be."""
    parts: dict[str, list[Tensor]] = {name: [] for name in _versions(source.data.flip)}
    size, frames = 0, source.whole(number)
    try:
        while size < ENTRY_BYTES and (some := list(islice(frames, FRAMES))):
            pixels = torch.stack(some).to(device)  # (N, C, H, W)
            for name, found in parts.items():
                latents = autoencoder.encode(pixels.flip(-1) if name == "flipped" else pixels)
                found.append(latents.to("cpu", torch.float16))
                size += 2 * latents.numel()
    except UserError:  # it breaks off: what was whole is kept
        if not parts["latents"]:
            raise
    if not parts["latents"]:
        raise UserError(f"{source.videos[number].file}: no frame could be decoded")
    tensors = {name: torch.cat(found).contiguous() for name, found in parts.items()}
    save_tensors(path, tensors, {_KEY: json.dumps(key)})
    return len(tensors["latents"])


class LatentClips(Clips):
    """The clips of a source of videos as latents, read from a cache; made by ``cache_latents``."""

    def __init__(self, source: VideoClips, entries: dict[int, tuple[Path, int]], skipped: dict[str, str]) -> None:
        super().__init__(source.name, source.videos, skipped, source.data, source.seed, source.frames)
        self._entries = entries
        for video in range(len(self.videos)):
            self._length(video)
        self._check()

    def clip(self, index: int, frames: int) -> Tensor:
        """Clip number ``index``: latents (T, c, h, w) float32."""
        return self._draw(index, frames)[0].float()

    def crop(self, index: int, side: int) -> Tensor:
        """There are no pictures to train an autoencoder on: raises UsageError."""
        raise UsageError("--cache-latents: an autoencoder is trained on pictures; train it first, without the cache")

    def _count(self, video: int) -> int:
        return self._entries[video][1] if video in self._entries else 0

    def _find_end(self, video: int) -> int:
        raise UserError(f"{self._entries[video][0]}: shorter than it was; train again to have it encoded anew")

    def _read(self, video: int, frames: range, flip: bool) -> Tensor:
        path, _ = self._entries[video]
        try:
            with safe_open(path, framework="pt") as file:
                piece = file.get_slice("flipped" if flip else "latents")[frames.start : frames.stop]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read any more ({error}); train again to have it encoded") from error
        return piece[:: frames.step]
