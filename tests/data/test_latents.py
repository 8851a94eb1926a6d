"""The latent cache: its clips are the source's clips, encoded, and stale entries are noticed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ca2vdm_cli.autoencoder import ConvAutoencoder, load_autoencoder
from ca2vdm_cli.config import Crop, DataConfig, Preset
from ca2vdm_cli.data import CacheReport, ClipLoader, ClipSource, LatentClips, cache_latents, open_clips
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.video_io import open_writer

FRAMES = 4


def preset(**data: Any) -> Preset:
    changed: Preset = replace(load_preset("tiny").config, data=DataConfig(**data))
    return changed


@pytest.fixture
def autoencoder() -> ConvAutoencoder:
    config = preset()
    assert config.video is not None
    torch.manual_seed(0)
    model = load_autoencoder(config.autoencoder, config.video, config.model.in_channels)
    assert isinstance(model, ConvAutoencoder)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos of noise, one that is too short, and a file that is not a video."""
    draw = np.random.default_rng(0)
    for name, count in (("a", 20), ("b", 13), ("short", 2)):
        with open_writer(tmp_path / f"videos/{name}.mp4", fps=8) as writer:
            for _ in range(count):
                writer.write(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    (tmp_path / "videos/broken.mp4").write_bytes(b"nothing")
    return tmp_path / "videos"


def fill(source: ClipSource, autoencoder: ConvAutoencoder, folder: Path) -> tuple[LatentClips, CacheReport]:
    return cache_latents(source, autoencoder, preset().autoencoder, folder.parent / "cache")


@pytest.mark.parametrize("data", [{}, {"stride": 3, "flip": True, "crop": Crop.CROP}])
def test_cached_latents_are_those_of_the_clips(
    folder: Path, autoencoder: ConvAutoencoder, data: dict[str, Any]
) -> None:
    source = open_clips(folder, preset(**data), 5, FRAMES)
    clips, report = fill(source, autoencoder, folder)
    assert (report.encoded, report.reused, report.stale) == (2, 0, {})
    assert clips.skipped.keys() == {"short.mp4", "broken.mp4"}
    for index in range(8):
        latents = autoencoder.encode(source.clip(index, FRAMES).frames)
        assert clips.clip(index, FRAMES).frames.dtype == torch.float32
        torch.testing.assert_close(clips.clip(index, FRAMES).frames, latents, atol=1e-2, rtol=1e-2)
    with ClipLoader(clips, FRAMES, 2, workers=1) as loader:
        assert torch.equal(next(loader).clips[1], clips.clip(1, FRAMES).frames)
    with pytest.raises(UsageError, match="an autoencoder is trained on frames"):
        clips.crop(0, 8)


def test_an_entry_is_reused_until_something_changes(folder: Path, autoencoder: ConvAutoencoder) -> None:
    source = open_clips(folder, preset(), 0, FRAMES)
    first, _ = fill(source, autoencoder, folder)
    expected = first.clip(0, FRAMES).frames

    def again(source: ClipSource = source) -> CacheReport:
        report = fill(source, autoencoder, folder)[1]
        assert report.encoded + report.reused == 2
        return report

    assert again().reused == 2
    times = os.stat(folder / "a.mp4")
    os.utime(folder / "a.mp4", ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    assert again().stale == {"a.mp4": "its modified has changed"}
    assert again(open_clips(folder, preset(crop=Crop.PAD), 0, FRAMES)).stale.keys() == {"a.mp4", "b.mp4"}
    assert set(again().stale.values()) == {"its crop has changed"}
    with torch.no_grad():
        next(autoencoder.parameters()).add_(1)
    assert set(again().stale.values()) == {"its weights has changed"}
    assert not torch.equal(fill(source, autoencoder, folder)[0].clip(0, FRAMES).frames, expected)
    for entry in (folder.parent / "cache").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    assert set(again().stale.values()) == {"it cannot be read"}
    assert not again().stale and len(list((folder.parent / "cache").iterdir())) == 2
    with torch.no_grad():
        next(autoencoder.decoder.parameters()).add_(1)  # no latent depends on it
    assert again().reused == 2


def test_an_entry_with_a_flipped_bit_is_encoded_again(folder: Path, autoencoder: ConvAutoencoder) -> None:
    source = open_clips(folder, preset(), 0, FRAMES)
    expected = fill(source, autoencoder, folder)[0].clip(0, FRAMES).frames
    for entry in (folder.parent / "cache").iterdir():
        content = bytearray(entry.read_bytes())
        content[-100] ^= 1
        entry.write_bytes(content)
    clips, report = fill(source, autoencoder, folder)
    assert report.encoded == 2 and set(report.stale.values()) == {"it is damaged"}
    assert torch.equal(clips.clip(0, FRAMES).frames, expected)


def test_progress_begins_before_the_first_video(folder: Path, autoencoder: ConvAutoencoder) -> None:
    calls: list[tuple[int, int]] = []
    source = open_clips(folder, preset(), 0, FRAMES)
    cache = folder.parent / "cache"
    cache_latents(
        source, autoencoder, preset().autoencoder, cache, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 4) for done in range(5)]


def test_what_cannot_be_cached(folder: Path, autoencoder: ConvAutoencoder) -> None:
    with pytest.raises(UsageError, match="moving-digits never repeats a clip"):
        fill(open_clips(None, preset(), 0, FRAMES), autoencoder, folder)
    with pytest.raises(UsageError, match="random needs the frames themselves"):
        fill(open_clips(folder, preset(crop=Crop.RANDOM), 0, FRAMES), autoencoder, folder)
    (folder.parent / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        fill(open_clips(folder, preset(), 0, FRAMES), autoencoder, folder)


def test_an_entry_that_goes_missing(folder: Path, autoencoder: ConvAutoencoder) -> None:
    clips, _ = fill(open_clips(folder, preset(), 0, FRAMES), autoencoder, folder)
    for entry in (folder.parent / "cache").iterdir():
        entry.unlink()
    with pytest.raises(UserError, match=r"can no longer be read .* training again"):
        clips.clip(0, FRAMES)


class Counting:
    """An encoder without weights that counts its frames."""

    def __init__(self) -> None:
        self.frames = 0

    def encode(self, frames: Tensor) -> Tensor:
        self.frames += len(frames)
        return frames[:, :, ::8, ::8]


def test_images_and_arrays_have_entries_of_their_own(tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).integers(0, 255, (6, 3, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "a.npy", arrays)
    encoder = Counting()
    source = open_clips(tmp_path / "a.npy", preset(), 0, FRAMES)
    clips, report = cache_latents(source, encoder, preset().autoencoder, tmp_path / "cache")
    assert report.encoded == 3 and encoder.frames == 18
    torch.testing.assert_close(
        clips.clip(2, FRAMES).frames, source.clip(2, FRAMES).frames[:, :, ::8, ::8], atol=1e-3, rtol=1e-3
    )
    for video in range(2):
        for t in range(5):
            with open_writer(tmp_path / f"frames/{video}", fps=8, format="png", overwrite=True) as writer:
                for _ in range(t + 1):
                    writer.write(arrays[t, video])
    source = open_clips(tmp_path / "frames", preset(), 0, FRAMES)
    cache_latents(source, encoder, preset().autoencoder, tmp_path / "cache")
    file = tmp_path / "frames/1/frame_000003.png"
    file.write_bytes((tmp_path / "frames/0/frame_000003.png").read_bytes())
    os.utime(file, ns=(1, 1))
    report = cache_latents(source, encoder, preset().autoencoder, tmp_path / "cache")[1]
    assert report.stale == {"1": "its content has changed"} and report.reused == 1


def test_a_video_with_many_captions_is_encoded_once(folder: Path, autoencoder: ConvAutoencoder) -> None:
    lines = [json.dumps({"path": "a.mp4", "text": text}) for text in ("one", "two", "three")]
    (folder / "list.jsonl").write_text("\n".join(lines))
    clips, report = fill(open_clips(folder / "list.jsonl", preset(), 0, FRAMES), autoencoder, folder)
    assert (report.encoded, report.reused) == (1, 2)
    assert len(list((folder.parent / "cache").iterdir())) == 1
    assert {clips.clip(index, FRAMES).caption for index in range(12)} == {"one", "two", "three"}
    (folder / "list.jsonl").write_text("\n".join(['{"path": "b.mp4"}', *lines]))
    _, report = fill(open_clips(folder / "list.jsonl", preset(), 0, FRAMES), autoencoder, folder)
    assert (report.encoded, report.reused) == (1, 3)
