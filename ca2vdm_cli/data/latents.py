"""A cache of encoded videos on disk: the autoencoder encodes a data set once, and training reads the latents.

Shapes: T frames, C channels, H height, W width; c latent channels, h and w latent height and width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.config import AutoencoderConfig, Crop
from ca2vdm_cli.errors import UsageError, UserError, as_user_error

from .clips import Clips, VideoClips
from .source import Clip, ClipSource
from .videos import Video

VERSION = "2"
"""Version of the entries' contents."""
SAMPLE = 64 * 1024
"""Bytes at each end of a file that its key covers, besides its size and modification time."""
FRAMES = 16
"""Frames encoded per call."""
ENTRY_BYTES = 2**31
"""Largest entry. If a video's latents would be larger, only its beginning is cached."""
_KEY, _DAMAGE = "key", "damage"


class Encoder(Protocol):
    """The encoding half of an autoencoder."""

    def encode(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, c, h, w)."""


@dataclass(frozen=True)
class CacheReport:
    """Result of filling a cache, in numbers of videos."""

    encoded: int
    """Newly encoded, including the stale ones."""
    reused: int
    """Taken from the cache."""
    stale: dict[str, str]
    """Why existing entries could not be used, by video."""


def cache_latents(
    source: ClipSource,
    autoencoder: Encoder,
    config: AutoencoderConfig,
    folder: Path,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LatentClips, CacheReport]:
    """Encode the videos of a source that are not in the cache yet.

    An entry is a safetensors file with ``latents`` and, if clips are flipped, ``flipped``: float16 (T, c, h, w) for all
    frames of the video. It is reused only if the video's file, the frame size, the crop, and the autoencoder's settings
    and weights are unchanged, and if it has the checksum that it was written with.

    Args:
        source: the videos. The clips drawn from the cache are this source's clips, encoded.
        autoencoder: the encoder, on ``device``.
        config: the autoencoder's settings.
        folder: the cache; created if missing.
        device: where frames are encoded; the CPU by default.
        progress: called with the number of finished videos and the total: before the first and after each.

    Raises:
        UsageError: the source has no videos, or a random crop.
        UserError: no video is usable, or the cache cannot be written.
    """
    check_cacheable(source)
    assert isinstance(source, VideoClips)
    settings = {
        "version": VERSION,
        "video": [source.video.height, source.video.width, source.video.channels],
        "crop": source.data.crop.value,
        "flip": source.data.flip,
        "autoencoder": asdict(config),
        "weights": weights_hash(autoencoder),
    }
    encoded = reused = 0
    stale: dict[str, str] = {}
    entries: dict[int, tuple[Path, int]] = {}
    skipped, damaged = dict(source.skipped), {}
    progress(0, len(source.videos))
    for index, video in enumerate(source.videos):
        path = folder / _entry(video)
        try:
            key = settings | _identity(video)
            frames, problem = _check(path, key)
            if problem:
                stale[video.name] = problem
            if frames:
                reused += 1
            elif video.name not in source.skipped:
                frames = _encode(source, index, autoencoder, path, key, device)
                encoded += 1
            if frames:
                entries[index] = (path, frames)
                damaged[video.name] = _damage(path)
        except UserError as error:
            if str(error).startswith(f"{path}: "):
                raise
            skipped[video.name] = video.reason(error)
        progress(index + 1, len(source.videos))
    clips = LatentClips(source, entries, skipped)
    clips.damaged = {name: damage for name, damage in damaged.items() if damage}
    return clips, CacheReport(encoded, reused, stale)


def check_cacheable(source: ClipSource) -> None:
    """Raises UsageError if the latents of a source can't be cached: it has no videos, or a random crop."""
    if not isinstance(source, VideoClips):
        raise UsageError(
            "cache_latents: moving-digits never repeats a clip, so there is nothing to cache; leave it out"
        )
    if source.data.crop is Crop.RANDOM:
        raise UsageError("cache_latents: data.crop random needs the frames themselves; use stretch, crop or pad")


def weights_hash(autoencoder: Encoder) -> str:
    """SHA-256 of an autoencoder's weights with their names, dtypes and shapes.

    Weights called ``decoder.…`` don't count: a decoder can be trained longer without changing any latent.
    """
    digest = hashlib.sha256()
    state = autoencoder.state_dict() if isinstance(autoencoder, nn.Module) else {}
    for name, value in sorted(state.items()):
        if name.startswith("decoder."):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _entry(video: Video) -> str:
    """File name of a video's entry. A video that a list names with several captions has one entry."""
    place = f"{video.file.absolute()}\n{video.part}".encode("utf-8", "surrogateescape")
    return f"{hashlib.sha256(place).hexdigest()[:40]}.safetensors"


def _identity(video: Video) -> dict[str, object]:
    """What identifies a video and changes when the file does; raises UserError."""
    file = video.file
    digest = hashlib.sha256(video.part.encode("utf-8", "surrogateescape"))
    with as_user_error(f"{file}: cannot be read"):
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            digest.update(stream.read(SAMPLE))
            stream.seek(max(0, status.st_size - SAMPLE))
            digest.update(stream.read(SAMPLE))
        for other in video.files[1:]:
            digest.update(f"{other.stat().st_size} {other.stat().st_mtime_ns}\n".encode())
    return {
        "file": str(file.absolute()),
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "content": digest.hexdigest(),
    }


def _check(path: Path, key: dict[str, object]) -> tuple[int, str]:
    """Number of frames of a cache entry, or 0 and why it cannot be used; 0 and "" if there is no entry."""
    if not path.exists():
        return 0, ""
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[_KEY])
        expected = json.loads(json.dumps(key))
        for name in expected:
            if not isinstance(stored, dict) or stored.get(name) != expected[name]:
                return 0, f"its {name} has changed"
        tensors, _ = load_tensors(path)  # compares the checksum
        (shape,) = {tuple(tensors[name].shape) for name in _versions(bool(key["flip"]))}
        return (int(shape[0]), "") if len(shape) == 4 else (0, "its latents do not have shape (T, c, h, w)")
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError):
        return 0, "it cannot be read"
    except UserError:
        return 0, "it is damaged"


def _damage(path: Path) -> str:
    """How much of the video a valid entry holds if the video is damaged, else ""."""
    with safe_open(path, framework="pt") as file:
        return str((file.metadata() or {}).get(_DAMAGE, ""))


def _versions(flip: bool) -> Sequence[str]:
    return ("latents", "flipped") if flip else ("latents",)


@torch.no_grad()
def _encode(
    source: VideoClips,
    index: int,
    autoencoder: Encoder,
    path: Path,
    key: dict[str, object],
    device: torch.device | None,
) -> int:
    """Encode a video into its entry; returns the number of frames."""
    parts: dict[str, list[Tensor]] = {name: [] for name in _versions(source.data.flip)}
    size = 0
    for batch in _batches(source.whole(index)):
        pixels = torch.stack(batch).to(device)  # (N, C, H, W)
        for name, part in parts.items():
            latents = autoencoder.encode(pixels.flip(-1) if name == "flipped" else pixels)
            part.append(latents.to("cpu", torch.float16))
            size += 2 * latents.numel()
        if size >= ENTRY_BYTES:
            break
    if not parts["latents"]:
        raise UserError(f"{source.videos[index].file}: no frame could be decoded")
    tensors = {name: torch.cat(part).contiguous() for name, part in parts.items()}
    encoded, total = len(tensors["latents"]), source.videos[index].count()
    damage = f"{encoded} of {total} frames can be decoded" if encoded < total and size < ENTRY_BYTES else ""
    save_tensors(path, tensors, {_KEY: json.dumps(key), _DAMAGE: damage})
    return encoded


def _batches(frames: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """Up to ``FRAMES`` frames at a time, until the first that cannot be read; raises only if no frame precedes it."""
    count, batch = 0, []
    try:
        for frame in frames:
            count += 1
            batch.append(frame)
            if len(batch) == FRAMES:
                yield batch
                batch = []
    except UserError:
        if not count:
            raise
    if batch:
        yield batch


class LatentClips(Clips):
    """The clips of a ``VideoClips`` source as latents from a cache. Created by ``cache_latents``."""

    def __init__(self, source: VideoClips, entries: dict[int, tuple[Path, int]], skipped: dict[str, str]) -> None:
        super().__init__(source.name, source.videos, skipped, source.data, source.seed, source.frames)
        self._entries = entries
        for video in range(len(self.videos)):
            self._length(video)
        self._check()

    def clip(self, index: int, length: int) -> Clip:
        """Clip number ``index`` with T = ``length`` frames: latents (T, c, h, w) float32."""
        latents, caption = self._draw(index, length)[0]
        return Clip(latents.float(), caption)

    def crop(self, index: int, side: int) -> Tensor:
        """Raises UsageError: there are no pictures to train an autoencoder on."""
        raise UsageError("cache_latents: an autoencoder is trained on frames; train it first, without the cache")

    def _count(self, video: int) -> int:
        return self._entries[video][1] if video in self._entries else 0

    def _find_end(self, video: int) -> int:
        raise UserError(f"{self._entries[video][0]}: shorter than before; start training again to encode it anew")

    def _read(self, video: int, frames: range, flip: bool) -> Tensor:
        path, _ = self._entries[video]
        advice = "start training again to encode it anew"
        with (
            as_user_error(f"{path}: can no longer be read", advice, (SafetensorError, OSError)),
            safe_open(path, framework="pt") as file,
        ):
            piece: Tensor = file.get_slice("flipped" if flip else "latents")[frames.start : frames.stop]
            return piece[:: frames.step]
