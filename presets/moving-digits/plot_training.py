"""Draw a run's training curve: loss of every step, its running mean, and the learning rate (needs matplotlib).

python presets/moving-digits/plot_training.py runs/digits -o curve.png

Steps with different numbers of trained frames get separate running means, since a clip's first chunk alone has a
different loss from all of its chunks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.terminal import note, print_error
from ca2vdm_cli.training.run_folder import METRICS_FILE

SMOOTHED = 50
"""Steps of the running mean."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the log, draw the curve and print where it ends; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help=f"a run's folder, with {METRICS_FILE} in it")
    parser.add_argument("-o", "--output", type=Path, default=Path("curve.png"), help="the picture")
    args = parser.parse_args(arguments)
    try:
        steps, losses, rates, frames = read(args.run / METRICS_FILE)
        draw(steps, losses, rates, frames, args.output)
    except UserError as error:
        print_error(error)
        return error.exit_code
    first, last = losses[0], running_mean(losses)[-1]
    note(f"{args.output}: {len(steps)} steps, {frames.sum():,.0f} trained frames, loss {first:.3f} to {last:.4f}")
    return 0


def read(path: Path) -> list[np.ndarray]:
    """Steps, losses, learning rates and numbers of trained frames, (N,) each.

    Raises:
        UserError: not a training log, or an empty one.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        columns = [np.array([row[key] for row in rows], float) for key in ("step", "loss", "learning_rate", "frames")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not the log of a training run ({type(error).__name__})") from error
    if not rows:
        raise UserError(f"{path}: contains no training step yet")
    return columns


def running_mean(losses: np.ndarray) -> np.ndarray:
    """Mean of the last ``SMOOTHED`` losses at each step, or of as many as there are: (N,)."""
    total = np.concatenate([[0.0], np.cumsum(losses)])
    last = np.arange(1, len(losses) + 1)
    first = np.maximum(last - SMOOTHED, 0)
    return (total[last] - total[first]) / (last - first)


def draw(steps: np.ndarray, losses: np.ndarray, rates: np.ndarray, frames: np.ndarray, output: Path) -> None:
    """Draw the loss on a logarithmic axis, and the learning rate below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    above.plot(steps, losses, color="0.8", linewidth=0.6, label="each step")
    for count in np.unique(frames):
        same = frames == count
        above.plot(steps[same], running_mean(losses[same]), label=f"mean of {SMOOTHED} steps of {count:.0f} frames")
    above.set(yscale="log", ylabel="loss")
    above.grid(alpha=0.3, which="both")
    above.legend()
    below.plot(steps, rates, color="tab:green")
    below.set(xlabel="step", ylabel="AdamW's learning rate", ylim=(0, None))
    below.grid(alpha=0.3)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
