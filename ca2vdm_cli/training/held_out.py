"""The clips that validation reads, and whether training sees them too."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ca2vdm_cli.config import Preset, Split
from ca2vdm_cli.data import Clip, Clips, ClipSource, MovingDigits, open_clips
from ca2vdm_cli.errors import UsageError, UserError

from .inputs import Inputs, open_source

HELD_OUT = 1_000_003
"""Added to the seed of held-out synthetic clips."""


@dataclass(frozen=True)
class HeldOut:
    """Clips to validate on."""

    source: ClipSource
    path: Path | None
    """Where they are, if they come from files."""
    config: Preset
    """How they are read from ``path``."""
    seed: int
    seen: str
    """Which of them training sees too, as a phrase; empty if none."""

    def clips(self, count: int, frames: int) -> list[Clip]:
        """The first clips, all of the same length: ``frames``, or less if the videos are shorter."""
        source, length = self.source, frames
        if self.path is not None:
            source, length = self._longest(self.path, frames)
        elif not isinstance(source, MovingDigits):  # a source of the user's, which may have short clips only
            length = min(frames, self.config.clip_frames)
        return [source.clip(index, length) for index in range(count)]

    def _longest(self, path: Path, frames: int) -> tuple[ClipSource, int]:
        """A source of clips of ``frames`` frames, or half as much more than training's, or as many as training's."""
        shortest = self.config.clip_frames
        for length in (frames, (frames + shortest) // 2):
            if length > shortest:
                try:
                    return open_clips(path, self.config, self.seed, length), length
                except UserError:  # no video is that long
                    continue
        return self.source, min(frames, shortest)


def held_out_clips(inputs: Inputs, source: ClipSource, config: Preset) -> HeldOut:
    """Clips to validate on: those of the validation data, or else of the training data's test split.

    If the validation data has a test split, that split is used. Synthetic clips are held-out ones. If nothing is held
    out, the clips are the training data's.

    Args:
        inputs: names the data.
        source: what is trained on, as pixels.
        config: the preset.
    """
    held_out, data, seed = inputs.validation_data, inputs.data, inputs.seed
    if held_out is None and data is None:
        return HeldOut(open_source(None, config, seed + HELD_OUT, "data"), None, config, seed, "")
    test = replace(config, data=replace(config.data, split=Split.TEST))
    clips, place = source, data
    if held_out is not None:
        place = held_out
        try:
            clips, config = open_source(held_out, test, seed, "validation_data"), test
        except UsageError:  # it has no splits
            clips = open_source(held_out, config, seed, "validation_data")
    elif isinstance(data, (str, Path)) and config.data.split is Split.TRAIN:
        with suppress(UserError):  # it has no splits, or no usable test video
            clips, config = open_source(data, test, seed, "data"), test
    path = Path(place) if isinstance(place, (str, Path)) else None
    return HeldOut(clips, path, config, seed, _seen(clips, source))


def _seen(clips: ClipSource, source: ClipSource) -> str:
    """Which held-out clips are trained on."""
    if clips is source:
        return "all of them"
    if not (isinstance(clips, Clips) and isinstance(source, Clips)):
        return ""
    trained = {(video.file.resolve(), video.part) for video in source.videos}
    places = {(video.file.resolve(), video.part) for video in clips.videos}
    both = len(trained & places)
    return f"{both} of its {len(places)} videos" if both else ""
