"""Hold out the end of a video, and compare a generated continuation, and the last frame repeated, with it.

python presets/one-clip/measure_continuation.py clip.mp4 --hold-out 25 --cut head.y4m       # all but the last 25 frames
python presets/one-clip/measure_continuation.py clip.mp4 --hold-out 25 --generated new.npz --frames 8

PSNR is computed from the mean squared error over all frames and channels, in dB, at the video's own size.
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
    """Cut or compare; returns the exit code, which is 1 if repeating the last frame is closer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("video", help="the whole video")
    parser.add_argument("--hold-out", type=int, default=25, help="frames to hold out at its end")
    parser.add_argument("--cut", help="write the frames before these to this file")
    parser.add_argument("--generated", help="the generated continuation (extend --only-new)")
    parser.add_argument("--frames", type=int, default=8, help="new frames to compare")
    args = parser.parse_args(arguments)
    try:
        with open_reader(args.video) as reader:
            fps, frames = reader.fps, np.stack(list(reader))  # (T, H, W, 3)
        if not 0 < args.frames <= args.hold_out < len(frames):
            raise UsageError(
                f"--hold-out {args.hold_out}: must be at least --frames {args.frames} and less than {len(frames)}, "
                f"the frames of {args.video}"
            )
        head, truth = frames[: -args.hold_out], frames[-args.hold_out :][: args.frames]
        if args.cut:
            with open_writer(args.cut, fps=fps or 25) as writer:
                for frame in head:
                    writer.write(frame)
        if not args.generated:
            return 0
        with open_reader(args.generated) as reader:
            generated = np.stack([frame for frame, _ in zip(reader, truth, strict=False)])
        if generated.shape != truth.shape:
            raise UsageError(f"--generated {args.generated}: shape {generated.shape} must be {truth.shape}")
    except UserError as error:
        print_error(error)
        return error.exit_code
    continued, repeated = psnr(generated, truth), psnr(head[-1:], truth)
    note(f"first {args.frames} new frames: {continued:.2f} dB; repeating the last frame: {repeated:.2f} dB")
    return 0 if continued > repeated else 1


def psnr(generated: np.ndarray, truth: np.ndarray) -> float:
    """PSNR in dB of uint8 frames (T, H, W, 3), or of one frame (1, H, W, 3) repeated, against (T, H, W, 3)."""
    error = float(np.square(generated.astype(np.float64) - truth).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


if __name__ == "__main__":
    sys.exit(main())
