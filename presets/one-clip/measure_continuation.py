"""Hold out the end of a video, and say how near a continuation comes to it, next to repeating the last frame.

python docs/measure_continuation.py clip.mp4 --hold-out 25 --cut head.y4m       # all but the last 25 frames
python docs/measure_continuation.py clip.mp4 --hold-out 25 --made new.npz --frames 8

PSNR is that of the mean squared error over all frames and channels, in dB, at the video's own size.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np

from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.terminal import note, print_error
from ca2vdm_cli.video_io import open_reader, open_writer


def main(arguments: Sequence[str] | None = None) -> int:
    """Cut or compare; the exit code is 1 where repeating the last frame is nearer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("video", help="the whole video")
    parser.add_argument("--hold-out", type=int, default=25, help="how many frames of its end to hold out")
    parser.add_argument("--cut", help="write the frames before them to this file")
    parser.add_argument("--made", help="the new frames that were made after these (extend --only-new)")
    parser.add_argument("--frames", type=int, default=8, help="how many of the new frames to compare")
    args = parser.parse_args(arguments)
    try:
        with open_reader(args.video) as reader:
            fps, frames = reader.fps, np.stack(list(reader))  # (T, H, W, 3)
        if not 0 < args.frames <= args.hold_out < len(frames):
            raise UsageError(
                f"--hold-out {args.hold_out}: must be at least --frames {args.frames} and less than {len(frames)}, "
                f"the frames of {args.video}"
            )
        head, true = frames[: -args.hold_out], frames[-args.hold_out :][: args.frames]
        if args.cut:
            with open_writer(args.cut, fps=fps or 25) as writer:
                for frame in head:
                    writer.write(frame)
        if not args.made:
            return 0
        with open_reader(args.made) as reader:
            made = np.stack([frame for frame, _ in zip(reader, true, strict=False)])
        if made.shape != true.shape:
            raise UsageError(f"--made {args.made}: {made.shape} frames, height, width are not those of {true.shape}")
    except UserError as error:
        print_error(error)
        return error.exit_code
    ours, repeated = psnr(made, true), psnr(head[-1:], true)
    note(f"first {args.frames} new frames: {ours:.2f} dB; repeating the last frame: {repeated:.2f} dB")
    return 0 if ours > repeated else 1


def psnr(made: np.ndarray, true: np.ndarray) -> float:
    """dB between uint8 frames (T, H, W, 3), or one frame (1, H, W, 3) and each of several."""
    error = float(np.square(made.astype(np.float64) - true).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


if __name__ == "__main__":
    sys.exit(main())
