"""Generate the README's pictures: an animated GIF of eight 600-frame videos, and a contact sheet of them.

python presets/moving-digits/make_gallery.py                 # docs/images/moving-digits.gif and contact-sheet.png

The videos are numbers 0 to 7 of seed 0, those of ``ca2vdm sample --frames 600 --num-videos 8``. The GIF shows every
fourth frame at 12.5 frames per second, which is 1.7 times the preset's speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

from ca2vdm_cli import Pipeline, UserError
from ca2vdm_cli.terminal import note, print_error
from ca2vdm_cli.video_io import open_writer

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
VIDEOS, COLUMNS = 8, 4
STRIDE, FPS = 4, 12.5
"""Every STRIDE-th frame is in the GIF, played at FPS."""
SCALE, GAP = 2, 4
"""Enlargement of a video's pixels, and pixels between videos."""
LEVELS = 8
"""Gray levels in the GIF."""
PAPER, TEXT = 255, 90
"""Gray levels of the background and of labels."""
LABEL, MARGIN = 18, 50
"""Height of a line of labels, and width of the column of labels."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample the videos and write both pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=600, help="frames per video")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    args = parser.parse_args(arguments)
    try:
        pipeline = Pipeline.load("moving-digits")
        chunks = pipeline.sample(args.frames, videos=range(VIDEOS), seed=args.seed)
        videos = np.concatenate([chunk.frames for chunk in chunks], axis=1)[..., 0]  # (V, T, H, W)
    except UserError as error:
        print_error(error)
        return error.exit_code
    args.out.mkdir(parents=True, exist_ok=True)
    animation, sheet = args.out / "moving-digits.gif", args.out / "contact-sheet.png"
    write_animation(videos, animation)
    cv2.imwrite(str(sheet), contact_sheet(videos), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    note(f"{animation}: {animation.stat().st_size / 1e6:.2f} MB; {sheet}: {sheet.stat().st_size / 1e6:.2f} MB")
    return 0


def write_animation(videos: np.ndarray, path: Path) -> None:
    """The videos (V, T, H, W) side by side in a grid, with the frame's number below."""
    last = videos.shape[1] - 1
    with open_writer(str(path), fps=FPS, overwrite=True) as writer:
        for frame in [*range(0, last, STRIDE), last]:
            image = grid([enlarge(video[frame]) for video in videos], COLUMNS)
            image = (image / 255 * (LEVELS - 1)).round() / (LEVELS - 1) * 255
            footer = label(f"frame {frame + 1} of {last + 1}", image.shape[1])
            progress = round(image.shape[1] * frame / max(last, 1))
            image[-GAP:, :progress] = TEXT
            writer.write(to_rgb(np.concatenate([image, footer])))


def contact_sheet(videos: np.ndarray) -> np.ndarray:
    """A column per video (V, T, H, W), a row for every hundredth frame, with labels: (height, width) uint8."""
    count = videos.shape[1]
    side = videos.shape[-1] + GAP
    header = [label("frame", MARGIN), *(label(f"video {index}", side) for index in range(len(videos)))]
    lines = [np.concatenate(header, axis=1)]
    for frame in sorted({*range(0, count, 100), count - 1}):
        images = grid(videos[:, frame], len(videos))
        name = np.full((images.shape[0], MARGIN), PAPER, np.uint8)
        middle = (images.shape[0] - LABEL) // 2
        name[middle : middle + LABEL] = label(str(frame + 1), MARGIN)
        lines.append(np.concatenate([name, images], axis=1))
    return np.concatenate(lines)


def enlarge(image: np.ndarray) -> np.ndarray:
    """(H, W) uint8 at SCALE times its size."""
    size = (image.shape[1] * SCALE, image.shape[0] * SCALE)
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def grid(images: Iterable[np.ndarray], columns: int) -> np.ndarray:
    """Images of one size (H, W) in rows of ``columns``, with a gap to the right of and below each."""
    framed = [np.pad(image, ((0, GAP), (0, GAP)), constant_values=PAPER) for image in images]
    return np.concatenate(
        [np.concatenate(framed[first : first + columns], axis=1) for first in range(0, len(framed), columns)]
    )


def label(text: str, width: int) -> np.ndarray:
    """A line of text on the background: (LABEL, width) uint8."""
    line = np.full((LABEL, width), PAPER, np.uint8)
    cv2.putText(line, text, (4, LABEL - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.42, TEXT, 1, cv2.LINE_AA)
    return line


def to_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8."""
    return np.repeat(image.astype(np.uint8)[..., None], 3, axis=-1)


if __name__ == "__main__":
    sys.exit(main())
