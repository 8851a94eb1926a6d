"""Measure generated moving digits against real sequences; exit code 0 if every target is met, 1 if not, 2 on misuse.

    python presets/moving-digits/measure_digits.py             # the default weights: 32 videos of 600 frames
    python presets/moving-digits/measure_digits.py --checkpoint runs/digits --frames 120 --videos 4 --sheet sheet.png
    python presets/moving-digits/measure_digits.py --real      # real sequences instead: meets every target

Real sequences are the preset's ``MovingDigits`` with other seeds, as uint8 like the generated ones. All thresholds come
from one set of them; the column "real" is another set.

Ink is everything brighter than 10 % of white; the centre is its centre of mass. A glyph is a square around the centre,
as large as a digit's image and resampled to 28×28 pixels, so that the position doesn't matter.

Classifier: a small CNN on glyphs, trained from the seed within a minute. It learns from the images in digits.png that
the preset does NOT use, with random rotation, scale, shear, shift, brightness, blur and noise, so it has never seen the
digits that it judges. If its accuracy on real frames is below 98 %, nothing is measured.

A frame is legible if it passes four rules:
1. count: there is one connected blob (8 neighbours) brighter than half of white; specks smaller than 5 % of the
   smallest real blob are not counted;
2. size: the blob's area lies within the real range of its class, widened by 15 %, and so do the height and the width of
   its bounding box, widened by 10 %;
3. confidence: the classifier's confidence in its class is at least the real frames' 0.5th percentile minus 0.1;
4. match: the glyph's normalized cross-correlation with a glyph of that class (the best of the preset's images and of
   shifts up to 1 pixel in steps of a quarter) is at least the real frames' 0.5th percentile minus 0.05, so that a
   melted shape that happens to please the classifier does not count.

Identity: a digit is recognized at a frame if at least 3 of the 5 frames around it (at the end, of the last 5) are of
one class, with the confidence of rule 3. A video keeps its digit if the same digit is recognized at both ends.

Fréchet distance: between Gaussians fitted to the first 17 frames of 512 real sequences and to the first, or last, 17
frames of the videos. Features of a frame: the classifier's 32 features of the glyph. Features of a frame difference:
the same 32, for the difference of two consecutive frames, divided by the mean speed and cut out around the centre of
the earlier frame. Each difference counts forward and backward: real motion looks the same both ways, and this reduces
the randomness of only 32 directions. Positions are not included: 32 of them say little about a distribution, and they
are measured below. The distance of the last frames may be 1.25 times that of the first. For differences, it may also be
as large as the largest of 40 real sets of the same size: the directions of 32 digits are random, and even real
sequences sometimes exceed 1.25. Classes are random too, but the same at both ends of a video that keeps its digit.

Speed: the distance that the centre moves between two frames 8 apart, except across a bounce. Bounce: a reversal of
direction along an axis (motion slower than a quarter of the slowest speed has no direction); its position is the
turning point. Real ranges: the 0.5th to 99.5th percentile of real values, extended for speeds to the preset's range and
by 10 %, for bounces (at each border) by one pixel.

Shapes: V videos, T frames, N frames of any video, H height, W width, F features, G = 28 side of a glyph.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import ca2vdm_cli
from ca2vdm_cli.config import Preset
from ca2vdm_cli.data import MovingDigits, digit_images
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.loading import find_weights
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.presets import to_mapping
from ca2vdm_cli.runtime import Dtype
from ca2vdm_cli.terminal import note, output_console, print_error

LEGIBLE_BAR, IDENTITY_BAR, FRECHET_BAR, RANGE_BAR, ACCURACY_BAR = 0.99, 0.9, 1.25, 0.95, 0.98
OUTER = (0.005, 0.995)
"""Quantiles that bound a real range."""
SHIPPED, MOST_USED = 20, 15
"""Images of each class in digits.png, and how many a preset may use so that enough are left for the classifier."""
GLYPH, FEATURES = 28, 32
DARK, BRIGHT = 0.1, 0.5
"""Brightness above which a pixel is ink, and part of a blob; white is 1."""
SPECK = 0.05
SIZE_MARGINS = np.array([0.15, 0.1, 0.1])
"""Margins of area, height and width."""
CONFIDENCE_MARGIN, MATCH_MARGIN = 0.1, 0.05
SHIFTS = np.arange(-1, 1.01, 0.25)
KINDS = ("frames", "differences")
WINDOW, VOTES, SPAN = 17, 5, 8
"""Numbers of frames: compared at each end of a video, voting for a class, and between two positions of a speed."""
SPEED_MARGIN, PLACE_MARGIN = 0.1, 1.0
TRAIN_STEPS, TRAIN_BATCH = 600, 100
REFERENCE, MOTION, COMPARISON, STAND_IN, FLOOR = range(1_000_001, 1_000_006)
"""Seeds of real sequences, added to ``--seed``; training uses small seeds."""
REFERENCE_VIDEOS, MOTION_VIDEOS, MOTION_FRAMES, FLOOR_SETS = 512, 64, 600, 40
SHEET_VIDEOS, SHEET_FRAMES = 8, 24


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the flags, measure, and print errors; returns the exit code."""
    args = parse(arguments)
    try:
        return run(args)
    except UserError as error:
        print_error(error)
        return error.exit_code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", help="name, file or folder; by default moving-digits")
    parser.add_argument("--checkpoint", type=Path, help="weights to use instead of the preset's, or a run's folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="videos generated together")
    parser.add_argument("--device", default="auto", help="device to generate on")
    parser.add_argument("--dtype", choices=[kind.value for kind in Dtype], default="auto", help="dtype to generate in")
    parser.add_argument("--real", action="store_true", help="measure real sequences instead of generated ones")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw the first videos, with a real one below")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Reject flags that would otherwise fail after minutes.

    Raises:
        UsageError: an invalid flag.
    """
    for flag, least in (("frames", 2 * WINDOW), ("videos", 2), ("batch", 1), ("seed", 0)):
        if getattr(args, flag) < least:
            raise UsageError(f"--{flag} {getattr(args, flag)} must be at least {least}")
    for flag in ("json", "sheet"):
        path = getattr(args, flag)
        if path and not path.parent.is_dir():
            raise UsageError(f"--{flag} {path}: the folder {path.parent} does not exist; create it first")
    if args.sheet and not cv2.haveImageWriter(str(args.sheet)):
        raise UsageError(f"--sheet {args.sheet}: must be an image file such as sheet.png")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code.

    Raises:
        UserError: the preset can't be measured, or the classifier is not accurate enough.
    """
    check(args)
    loaded, weights = find_weights(args.preset, args.checkpoint, args.set)
    config = loaded.config
    judge = Judge(config, args.seed, args.videos)
    note(f"classifier: {judge.accuracy:.2%} of real frames right, trained in {judge.train_seconds:.0f} s")
    comparison = Sheet(real_videos(config, args.seed + COMPARISON, args.videos, args.frames), 1)
    stand_in = real_videos(config, args.seed + STAND_IN, args.videos, args.frames)
    videos = Sheet(stand_in if args.real else generated_videos(args), SHEET_VIDEOS)
    generated, real = judge.measure(videos), judge.measure(comparison)
    measures = compare(judge, generated, real)
    show(measures)
    if args.sheet:
        draw([*videos.first, *comparison.first], args.sheet)
    if args.json:
        report = {
            "preset": loaded.name,
            "preset_sha256": hashlib.sha256(json.dumps(to_mapping(config), sort_keys=True).encode()).hexdigest(),
            "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights and not args.real else None,
            "versions": {"ca2vdm": ca2vdm_cli.__version__, "torch": torch.__version__, "numpy": np.__version__},
            **{key: getattr(args, key) for key in ("videos", "frames", "seed", "real")},
            "classifier": {"accuracy": judge.accuracy, "train_seconds": judge.train_seconds},
            "thresholds": judge.thresholds(),
            "measures": [vars(measure) for measure in measures],
            "generated": generated.report(),
            "real_sequences": real.report(),
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(measure.passed is False for measure in measures) else 0


# Videos


def real_videos(config: Preset, seed: int, videos: int, frames: int) -> Iterator[np.ndarray]:
    """Real sequences, one at a time: (T, H, W) uint8."""
    assert config.synthetic_data is not None and config.video is not None
    source = MovingDigits(config.synthetic_data, config.video, seed)
    for index in range(videos):
        clip = source.clip(index, frames).frames.numpy()[:, 0]
        yield ((clip + 1) * 127.5).round().astype(np.uint8)


def generated_videos(args: argparse.Namespace) -> Iterator[np.ndarray]:
    """Generated videos, one at a time: (T, H, W) uint8; colours are averaged."""
    pipeline = Pipeline.load(
        args.preset, checkpoint=args.checkpoint, overrides=args.set, device=args.device, dtype=args.dtype
    )
    for first in range(0, args.videos, args.batch):
        indices = range(first, min(first + args.batch, args.videos))
        began = time.perf_counter()
        chunks = [chunk.frames for chunk in pipeline.sample(args.frames, videos=indices, seed=args.seed)]
        note(f"videos {indices[0]} to {indices[-1]}: {time.perf_counter() - began:.0f} s")
        yield from np.concatenate(chunks, axis=1).mean(-1).round().astype(np.uint8)


class Sheet:
    """Passes videos through and keeps the first few."""

    def __init__(self, videos: Iterator[np.ndarray], keep: int) -> None:
        self.videos, self.keep = videos, keep
        self.first: list[np.ndarray] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        for frames in self.videos:
            if len(self.first) < self.keep:
                self.first.append(frames)
            yield frames


# Glyphs


def to_ink(frames: np.ndarray) -> Tensor:
    """(N, H, W) uint8 -> float32 in [0, 1], with nearly black set to 0 so that a gray haze has no weight."""
    return ((torch.from_numpy(frames).float() / 255 - DARK) / (1 - DARK)).clamp(min=0)


def centres(ink: Tensor) -> Tensor:
    """Centre of mass of (N, H, W): (N, 2) pixels, y and x; the middle of an empty frame."""
    height, width = ink.shape[1:]
    ink = ink.double() + 1e-9
    mass = ink.sum((1, 2))
    y = ink.sum(2) @ torch.arange(height, dtype=torch.float64) / mass
    x = ink.sum(1) @ torch.arange(width, dtype=torch.float64) / mass
    return torch.stack([y, x], 1)


def cut(pictures: Tensor, around: Tensor, size: float) -> Tensor:
    """Squares of ``size`` pixels around positions (N, 2) of images (N, H, W), black outside: (N, G, G)."""
    height, width = pictures.shape[1:]
    steps = (torch.arange(GLYPH) - (GLYPH - 1) / 2) * size / GLYPH
    y, x = (around[:, axis, None].float() + steps for axis in (0, 1))  # (N, G)
    y, x = (2 * y + 1) / height - 1, (2 * x + 1) / width - 1
    grid = torch.stack([x[:, None].expand(-1, GLYPH, -1), y[:, :, None].expand(-1, -1, GLYPH)], -1)
    return functional.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]


# Classifier


class Classifier(nn.Module):
    """Glyphs (N, G, G) -> scores (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),  # 14
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),  # 7
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, FEATURES),
        )
        self.head = nn.Linear(FEATURES, 10)

    def features(self, glyphs: Tensor) -> Tensor:
        """(N, F)."""
        return self.body(glyphs[:, None])

    def forward(self, glyphs: Tensor) -> Tensor:
        return self.head(self.features(glyphs).relu())


def train_classifier(images: Tensor, seed: int) -> Classifier:
    """Train on augmented copies of images (10, n, G, G), n of each class; deterministic in the seed."""
    classes = torch.arange(10).repeat_interleave(images.shape[1])
    images = images.flatten(0, 1)
    images = cut(images, centres(images), GLYPH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, TRAIN_STEPS)
        for _ in range(TRAIN_STEPS):
            chosen = torch.randint(len(images), (TRAIN_BATCH,))
            loss = functional.cross_entropy(model(vary(images[chosen])), classes[chosen], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def vary(images: Tensor) -> Tensor:
    """Rotate, scale, shear, shift, brighten, blur and add noise, each image (N, G, G) independently."""

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(len(images)).uniform_(low, high)

    angle, shear = draw(-0.3, 0.3), draw(-0.25, 0.25)
    tall, wide = draw(0.8, 1.25), draw(0.8, 1.25)
    top = torch.stack([wide * angle.cos(), wide * (shear - angle.sin()), draw(-0.12, 0.12)], 1)
    bottom = torch.stack([tall * angle.sin(), tall * angle.cos(), draw(-0.12, 0.12)], 1)
    grid = functional.affine_grid(torch.stack([top, bottom], 1), [len(images), 1, GLYPH, GLYPH], align_corners=False)
    changed = functional.grid_sample(images[:, None], grid, align_corners=False)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
    blurred = functional.conv2d(changed, kernel, padding=1)
    strength, brightness, noise = (draw(*span)[:, None, None, None] for span in ((0, 1), (0.7, 1.3), (0, 0.1)))
    changed = (changed + strength * (blurred - changed)) * brightness
    return (changed + noise * torch.randn_like(changed)).clamp(0, 1)[:, 0]


# Legible frames


def find_blobs(frame: np.ndarray, speck: float) -> tuple[int, int, int, int]:
    """Number of blobs in a frame (H, W) not smaller than a speck; area, height and width of the largest."""
    bright = (frame > 255 * BRIGHT).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=8)
    blobs = [row for row in stats[1:] if row[cv2.CC_STAT_AREA] >= speck]
    if not blobs:
        return 0, 0, 0, 0
    largest = max(blobs, key=lambda row: int(row[cv2.CC_STAT_AREA]))
    sizes = (cv2.CC_STAT_AREA, cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH)
    area, height, width = (int(largest[key]) for key in sizes)
    return len(blobs), area, height, width


def make_templates(images: Tensor) -> Tensor:
    """Glyphs of n images (10, n, G, G) at all shifts, each with mean 0 and length 1: (10, G², n · shifts)."""
    images = images.flatten(0, 1)
    shifts = torch.tensor([(y, x) for y in SHIFTS for x in SHIFTS])
    around = (centres(images)[:, None] + shifts).flatten(0, 1)
    glyphs = cut(images.repeat_interleave(len(shifts), 0), around, GLYPH)
    return unit(glyphs).unflatten(0, (10, -1)).transpose(1, 2).contiguous()


def best_match(glyphs: Tensor, templates: Tensor) -> Tensor:
    """Normalized cross-correlation of glyphs (N, G, G) with the best of their templates (N, G², any): (N,)."""
    return (unit(glyphs)[:, None] @ templates)[:, 0].max(1).values


def unit(glyphs: Tensor) -> Tensor:
    """Mean 0 and length 1: (N, G, G) -> (N, G²)."""
    flat = glyphs.flatten(1)
    return functional.normalize(flat - flat.mean(1, keepdim=True))


# Motion


@dataclass(frozen=True)
class Bounce:
    """A point where a path reverses along an axis."""

    frame: int
    axis: int
    """0 is y, 1 is x."""
    far: bool
    """Whether it reverses from rising to falling, as at the lower or right border."""
    place: float


def find_bounces(path: np.ndarray, slowest: float) -> list[Bounce]:
    """All reversals of a path (T, 2) along either axis."""
    steps = path[SPAN:] - path[:-SPAN]
    signs = np.sign(steps) * (np.abs(steps) > SPAN * slowest / 4)  # (T - SPAN, 2)
    bounces = []
    for axis in (0, 1):
        known = np.flatnonzero(signs[:, axis])
        for a, b in pairwise(known):
            if signs[a, axis] != signs[b, axis]:
                piece, far = path[a : b + SPAN + 1, axis], bool(signs[a, axis] > 0)
                turn = int(piece.argmax() if far else piece.argmin())
                bounces.append(Bounce(int(a) + turn, axis, far, float(piece[turn])))
    return bounces


def find_speeds(path: np.ndarray, slowest: float) -> np.ndarray:
    """Speeds along a path (T, 2) in pixels per frame, except near its bounces."""
    speeds = np.linalg.norm(path[SPAN:] - path[:-SPAN], axis=1) / SPAN
    straight = np.ones(len(speeds), bool)
    for bounce in find_bounces(path, slowest):
        straight[max(0, bounce.frame - SPAN) : bounce.frame + 1] = False
    return speeds[straight]


# Fréchet distance


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features, (any, F) each."""
    a, b = (values.reshape(-1, values.shape[-1]).astype(np.float64) for values in (a, b))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared
    return max(0.0, float(apart))


# Judging


@dataclass
class Look:
    """Measurements of each frame of one video."""

    classes: np.ndarray
    """The classifier's class of each frame, (T,)."""
    confidence: np.ndarray
    """Its confidence, (T,)."""
    match: np.ndarray
    """Best normalized cross-correlation with a real glyph of the class, (T,)."""
    blobs: np.ndarray
    """Number of blobs; area, height and width of the largest: (T, 4)."""
    path: np.ndarray
    """Centres of the ink, (T, 2)."""
    features: dict[str, np.ndarray]
    """Features of frames, (T, F), and of differences, forward and backward, (T - 1, 2, F)."""


@dataclass
class Result:
    """Measurements of V videos."""

    rules: dict[str, np.ndarray]
    """Which frames pass each rule, (V, T)."""
    begin: list[int | None]
    """The digit recognized at frame 16 of each video."""
    end: list[int | None]
    """The digit recognized at its end."""
    distances: dict[str, tuple[float, float]]
    """Fréchet distances of the first and last frames, for frames and for differences."""
    speeds: np.ndarray
    bounces: list[Bounce]
    speeds_within: float
    bounces_within: float
    """0 if there is no bounce."""

    @property
    def legible(self) -> np.ndarray:
        """Which frames pass all rules, (V, T)."""
        return np.logical_and.reduce(list(self.rules.values()))

    @property
    def keeps_digit(self) -> list[bool]:
        """Which videos keep their digit."""
        return [a is not None and a == b for a, b in zip(self.begin, self.end, strict=True)]

    def report(self) -> dict[str, Any]:
        """Everything as plain types."""
        return {
            "legible": float(self.legible.mean()),
            "rules": {rule: float(keeps.mean()) for rule, keeps in self.rules.items()},
            "identity": float(np.mean(self.keeps_digit)),
            "frechet": {kind: {"first": a, "last": b, "ratio": b / a} for kind, (a, b) in self.distances.items()},
            "speeds": {"within": self.speeds_within, "quantiles": quantiles(self.speeds)},
            "bounces": {
                "within": self.bounces_within,
                "all": [{"frame": b.frame, "axis": "yx"[b.axis], "far": b.far, "place": b.place} for b in self.bounces],
            },
            "videos": [
                {"begin": begin, "end": end, "legible": float(legible.mean())}
                for begin, end, legible in zip(self.begin, self.end, self.legible, strict=True)
            ],
        }


class Judge:
    """A classifier and thresholds from real sequences.

    Raises:
        UserError: the preset does not have exactly one moving digit or leaves too few images for the classifier, or the
            classifier is not accurate enough.
    """

    def __init__(self, config: Preset, seed: int, videos: int = 32) -> None:
        data = config.synthetic_data
        if data is None or config.video is None or data.digits != 1:
            raise UsageError("preset: synthetic_data.digits must be 1; digits that may overlap can't be measured")
        if (used := data.images_per_class) > MOST_USED:
            raise UsageError(
                f"synthetic_data.images_per_class: {used} must be at most {MOST_USED}, to leave some for the classifier"
            )
        self.data = data
        images = torch.from_numpy(digit_images(SHIPPED)).unflatten(0, (10, SHIPPED))
        began = time.perf_counter()
        self.classifier = train_classifier(images[:, used:], seed)
        self.train_seconds = time.perf_counter() - began
        self.templates = make_templates(images[:, :used])
        self._calibrate_looks(real_videos(config, seed + REFERENCE, REFERENCE_VIDEOS, WINDOW))
        self._calibrate_motion(real_videos(config, seed + MOTION, MOTION_VIDEOS, MOTION_FRAMES))
        self.floor: dict[str, list[float]] = {kind: [] for kind in KINDS}
        others = real_videos(config, seed + FLOOR, FLOOR_SETS * videos, WINDOW)
        for _ in range(FLOOR_SETS):
            looks = [self.look(frames) for frames in islice(others, videos)]
            for kind in KINDS:
                self.floor[kind].append(self.distances(looks, kind)[0])

    def _calibrate_looks(self, videos: Iterable[np.ndarray]) -> None:
        """Set the accuracy, the thresholds of legibility, and the real features."""
        frames = list(videos)
        looks = [self.look(clip) for clip in frames]
        classes, confidence, match, blobs = (
            np.concatenate([getattr(look, name) for look in looks])
            for name in ("classes", "confidence", "match", "blobs")
        )
        truth = np.repeat([self.true_class(clip) for clip in frames], WINDOW)
        self.accuracy = float((classes == truth).mean())
        if self.accuracy < ACCURACY_BAR:
            raise UserError(
                f"classifier: {self.accuracy:.2%} of real frames right, {ACCURACY_BAR:.0%} needed; try another --seed"
            )
        self.speck = SPECK * blobs[:, 1].min()
        sizes = [blobs[truth == digit, 1:] for digit in range(10)]
        self.least_size = np.stack([size.min(0) for size in sizes]) * (1 - SIZE_MARGINS)  # (10, 3)
        self.most_size = np.stack([size.max(0) for size in sizes]) * (1 + SIZE_MARGINS)
        self.least_confidence = float(np.quantile(confidence, OUTER[0])) - CONFIDENCE_MARGIN
        self.least_match = float(np.quantile(match, OUTER[0])) - MATCH_MARGIN
        self.reference = {kind: np.concatenate([look.features[kind] for look in looks]) for kind in KINDS}

    def _calibrate_motion(self, videos: Iterable[np.ndarray]) -> None:
        """Set the ranges of speeds and of bounce positions."""
        paths = [centres(to_ink(frames)).numpy() for frames in videos]
        slowest = self.data.min_speed
        low, high = np.quantile(np.concatenate([find_speeds(path, slowest) for path in paths]), OUTER)
        low, high = min(low, slowest), max(high, self.data.max_speed)
        self.speed_range = float(low * (1 - SPEED_MARGIN)), float(high * (1 + SPEED_MARGIN))
        bounces = [bounce for path in paths for bounce in find_bounces(path, slowest)]
        self.bounce_ranges: dict[tuple[int, bool], tuple[float, float]] = {}
        for axis, far in product((0, 1), (False, True)):
            places = [bounce.place for bounce in bounces if (bounce.axis, bounce.far) == (axis, far)]
            if not places:
                raise UsageError("preset: real digits never bounce; give them room with synthetic_data.digit_size")
            low, high = np.quantile(places, OUTER)
            self.bounce_ranges[axis, far] = float(low - PLACE_MARGIN), float(high + PLACE_MARGIN)

    def thresholds(self) -> dict[str, Any]:
        """All thresholds as plain types."""
        return {
            "speck": float(self.speck),
            "least_area_height_width": self.least_size.round(2).tolist(),
            "most_area_height_width": self.most_size.round(2).tolist(),
            "least_confidence": self.least_confidence,
            "least_match": self.least_match,
            "speeds": self.speed_range,
            "bounces": [
                {"axis": "yx"[axis], "far": far, "places": span} for (axis, far), span in self.bounce_ranges.items()
            ],
            "frechet_of_real_sets": self.floor,
        }

    @torch.inference_mode()
    def look(self, frames: np.ndarray) -> Look:
        """Measure the frames (T, H, W) uint8 of a video."""
        ink = to_ink(frames)
        path = centres(ink)
        glyphs = cut(ink, path, self.data.digit_size)
        confidence, classes = self.classifier(glyphs).softmax(1).max(1)
        speed = (self.data.min_speed + self.data.max_speed) / 2
        moved = (ink[1:] - ink[:-1]) / speed
        moved = torch.cat([cut(moved, path[:-1], self.data.digit_size), cut(-moved, path[1:], self.data.digit_size)])
        features = {
            "frames": self.classifier.features(glyphs),
            "differences": self.classifier.features(moved).unflatten(0, (2, -1)).transpose(0, 1),
        }
        return Look(
            classes=classes.numpy(),
            confidence=confidence.numpy(),
            match=best_match(glyphs, self.templates[classes]).numpy(),
            blobs=np.array([find_blobs(frame, getattr(self, "speck", 1)) for frame in frames]),
            path=path.numpy(),
            features={kind: value.numpy() for kind, value in features.items()},
        )

    def true_class(self, frames: np.ndarray) -> int:
        """The class of a real video, without the classifier: that of the glyph that its first frame matches best."""
        ink = to_ink(frames[:1])
        glyph = cut(ink, centres(ink), self.data.digit_size)
        return int(best_match(glyph.expand(10, -1, -1), self.templates).argmax())

    def rules(self, look: Look) -> dict[str, np.ndarray]:
        """Which frames pass each rule of legibility, (T,) each."""
        sizes = look.blobs[:, 1:]
        right_size = (sizes >= self.least_size[look.classes]) & (sizes <= self.most_size[look.classes])
        return {
            "count": look.blobs[:, 0] == 1,
            "size": right_size.all(1),
            "confidence": look.confidence >= self.least_confidence,
            "match": look.match >= self.least_match,
        }

    def recognize(self, look: Look, frames: slice) -> int | None:
        """The digit that most of the given frames show with confidence, or None."""
        sure = look.classes[frames][look.confidence[frames] >= self.least_confidence]
        votes = np.bincount(sure, minlength=10)
        return int(votes.argmax()) if votes.max() > VOTES // 2 else None

    def measure(self, videos: Iterable[np.ndarray]) -> Result:
        """Measure all videos, (T, H, W) uint8 each, one at a time."""
        looks = [self.look(frames) for frames in videos]
        rules = [self.rules(look) for look in looks]
        middle = slice(WINDOW - 1 - VOTES // 2, WINDOW + VOTES // 2)
        slowest, ranges = self.data.min_speed, self.bounce_ranges
        speeds = np.concatenate([find_speeds(look.path, slowest) for look in looks])
        bounces = [bounce for look in looks for bounce in find_bounces(look.path, slowest)]
        right_place = [low <= b.place <= high for b in bounces for low, high in [ranges[b.axis, b.far]]]
        low, high = self.speed_range
        return Result(
            rules={rule: np.stack([passed[rule] for passed in rules]) for rule in rules[0]},
            begin=[self.recognize(look, middle) for look in looks],
            end=[self.recognize(look, slice(-VOTES, None)) for look in looks],
            distances={kind: self.distances(looks, kind) for kind in KINDS},
            speeds=speeds,
            bounces=bounces,
            speeds_within=float(((speeds >= low) & (speeds <= high)).mean()) if len(speeds) else 0.0,
            bounces_within=float(np.mean(right_place)) if bounces else 0.0,
        )

    def distances(self, looks: Sequence[Look], kind: str) -> tuple[float, float]:
        """Distance of the real features to those of the first frames of all videos, and to those of the last."""
        size = WINDOW if kind == "frames" else WINDOW - 1
        first, last = (
            np.concatenate([look.features[kind][piece] for look in looks])
            for piece in (slice(size), slice(-size, None))
        )
        return frechet(self.reference[kind], first), frechet(self.reference[kind], last)


# Report


@dataclass(frozen=True)
class Measure:
    """One row of the table."""

    name: str
    generated: str
    real: str
    bar: str = ""
    passed: bool | None = None
    """None for a row without a bar."""


def compare(judge: Judge, generated: Result, real: Result) -> list[Measure]:
    """The rows of the table."""
    both = (generated, real)

    def share(name: str, values: Iterable[float], bar: float | None = None) -> Measure:
        ours, theirs = values
        text = "" if bar is None else f"≥ {bar:.0%}"
        return Measure(name, f"{ours:.1%}", f"{theirs:.1%}", text, None if bar is None else bool(ours >= bar))

    rows = [share("frames with one legible digit", (float(r.legible.mean()) for r in both), LEGIBLE_BAR)]
    rows += [share(f"  rule: {rule}", (float(r.rules[rule].mean()) for r in both)) for rule in generated.rules]
    rows += [share("videos that keep their digit", (float(np.mean(r.keeps_digit)) for r in both), IDENTITY_BAR)]
    for kind in KINDS:
        ours, theirs = (f"{a:.3g} → {b:.3g} (×{b / a:.2f})" for a, b in (r.distances[kind] for r in both))
        first, last = generated.distances[kind]
        usual, most = float(np.median(judge.floor[kind])), max(judge.floor[kind])
        bar, limit = f"≤ ×{FRECHET_BAR}", FRECHET_BAR * first
        if kind == "differences":
            bar, limit = f"{bar} or ≤ {most:.3g}", max(limit, most)
        passed = last <= limit
        rows += [Measure(f"Fréchet distance of {kind}, first → last", ours, theirs, bar, passed)]
        rows += [Measure("  real sets of this size: median, most", "", f"{usual:.3g}, {most:.3g}")]
    low, high = judge.speed_range
    rows += [share(f"speeds within {low:.2f}–{high:.2f} px/frame", (r.speeds_within for r in both), RANGE_BAR)]
    ours, theirs = (" / ".join(f"{value:.2f}" for value in quantiles(r.speeds)) for r in both)
    rows += [Measure("  0.5 % / median / 99.5 %", ours, theirs)]
    rows += [share("bounces at the borders", (r.bounces_within for r in both), RANGE_BAR)]
    rows += [Measure("  how many", str(len(generated.bounces)), str(len(real.bounces)))]
    return rows


def quantiles(values: np.ndarray) -> list[float]:
    """The outer quantiles, which bound a real range, and the median."""
    return np.quantile(values, (OUTER[0], 0.5, OUTER[1])).tolist() if len(values) else []


def show(rows: Sequence[Measure]) -> None:
    """Print the table."""
    table = Table("measure", "generated", "real", "target", "")
    for row in rows:
        verdict = {True: "[green]pass", False: "[red]FAIL", None: ""}[row.passed]
        table.add_row(row.name, row.generated, row.real, row.bar, verdict)
    output_console().print(table)


def draw(videos: Sequence[np.ndarray], path: Path) -> None:
    """Write a contact sheet: a row of evenly spaced frames of each video, (T, H, W) uint8."""
    rows = []
    for frames in videos:
        chosen = frames[np.linspace(0, len(frames) - 1, SHEET_FRAMES).round().astype(int)]
        rows.append(np.concatenate(list(np.pad(chosen, ((0, 0), (0, 1), (0, 1)), constant_values=64)), axis=1))
    if not cv2.imwrite(str(path), np.concatenate(rows)):
        raise UserError(f"--sheet {path}: cannot be written; check permissions and free space")


if __name__ == "__main__":
    sys.exit(main())
