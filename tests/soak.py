"""A long run: memory, open files, and the cache's cursor and positions after thousands of chunks.

    python tests/soak.py                                   # 2,000 chunks: one video, then three with guidance
    python tests/soak.py --chunks 200 -o memory.png        # shorter, and draws the memory

Exits with 1 if resident memory rises by more than 3 % after the tenth chunk, if files stay open, or if the cache at the
end is not that of a model that recomputes it from the last chunks' latents.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ca2vdm_cli import Pipeline
from ca2vdm_cli.autoencoder import load_autoencoder
from ca2vdm_cli.generate.context import CachedContext, make_context
from ca2vdm_cli.generate.loop import Caption, SeededNoise, generate
from ca2vdm_cli.generate.samplers import sampler_for
from ca2vdm_cli.runtime import resident_memory

SETTLED = 10
"""Chunks after which memory must not rise."""
ALLOWED_RISE = 0.03
"""Largest rise of resident memory, as a share."""
TOLERANCE = 1e-5
"""Largest difference of an output from the recomputed one: float32 rounding."""
STEPS = 2
"""Denoising steps per chunk."""


@dataclass
class Soak:
    """What one long run showed."""

    name: str
    memory: list[int] = field(default_factory=list)
    """Resident bytes after each chunk."""
    files: list[int] = field(default_factory=list)
    """Open files after each chunk."""
    frames: int = 0
    """Frames that the cache has counted."""
    difference: float = math.inf
    """Largest difference of the next step's output from that of a recomputed cache."""

    @property
    def rise(self) -> float:
        """Rise of resident memory after ``SETTLED`` chunks, as a share."""
        return max(self.memory[SETTLED - 1 :]) / self.memory[SETTLED - 1] - 1

    def problems(self, frames: int) -> list[str]:
        """What is wrong after this number of generated frames, if anything."""
        files = set(self.files[SETTLED - 1 :])
        checks = {
            f"memory rises by {self.rise:.1%}": self.rise <= ALLOWED_RISE,
            f"{min(files)} to {max(files)} open files": len(files) == 1,
            f"the cache counts {self.frames} frames, not {frames}": self.frames == frames,
            f"the next step differs by {self.difference:.1e}": self.difference <= TOLERANCE,
        }
        return [problem for problem, fine in checks.items() if not fine]

    def __str__(self) -> str:
        settled, highest = self.memory[SETTLED - 1] / 2**20, max(self.memory[SETTLED - 1 :]) / 2**20
        return (
            f"{self.name}: {len(self.memory)} chunks, {self.frames} frames; {settled:.1f} MiB after chunk {SETTLED}, "
            f"at most {highest:.1f} MiB later ({self.rise:+.2%}); {self.files[-1]} open files; the next step within "
            f"{self.difference:.1e} of a recomputed cache's"
        )


def soak(chunks: int, *, videos: int = 1, guided: bool = False) -> Soak:
    """Generate and decode many chunks of ``tiny`` with random weights, then recompute the cache from the last ones.

    Args:
        chunks: number of chunks, more than ``SETTLED``.
        videos: videos generated together.
        guided: with captions and classifier-free guidance, which doubles the batch.
    """
    pipeline = load(text=guided)
    config, batch = pipeline.config.model, videos * (2 if guided else 1)
    sampler = sampler_for(pipeline.process, pipeline.config.sampling, steps=STEPS)
    cached = make_context(pipeline.model, "cached", batch)
    assert isinstance(cached, CachedContext)
    caption = some_caption(pipeline, videos) if guided else None
    noise = SeededNoise(0, range(videos), config.chunk_shape, pipeline.model.device)
    result = Soak(f"{videos} video{'s' if videos > 1 else ''}{' with guidance' if guided else ''}")
    needed = chunks_to_recompute(cached, chunks)
    last: list[Tensor] = []
    for chunk in generate(cached, pipeline.process, sampler, noise, chunks, caption=caption):
        pipeline.decode(chunk.latents, chunk.first_frame)
        last = [*last[-needed + 1 :], chunk.latents.repeat(batch // videos, 1, 1, 1, 1)]
        result.memory.append(resident_memory())
        result.files.append(len(os.listdir("/proc/self/fd")))
    with torch.inference_mode():
        cached.append(last[-1])
        result.frames, result.difference = cached.frames, next_step_difference(cached, last)
    return result


def load(*, text: bool = False, **settings: Any) -> Pipeline:
    """The preset ``tiny`` in float32 with random weights and a random autoencoder."""
    overrides = {"diffusion.prediction": "v"} | {f"model.{key}": value for key, value in settings.items()}
    overrides |= {"model.text_channels": 16, "model.text_tokens": 8} if text else {}
    pipeline = Pipeline.load("tiny", random_weights=True, overrides=overrides, device="cpu", dtype="float32")
    config = pipeline.config
    assert config.video is not None
    pipeline.autoencoder = load_autoencoder(config.autoencoder, config.video, config.model.in_channels)
    return pipeline


def some_caption(pipeline: Pipeline, videos: int) -> Caption:
    """Random text embeddings, one row per video, with guidance."""
    config, generator = pipeline.config.model, torch.Generator().manual_seed(1)
    embedding = torch.randn(videos, config.text_tokens, config.text_channels, generator=generator)
    return Caption(embedding, torch.ones(embedding.shape[:2]), guidance_scale=3.0)


def chunks_to_recompute(cached: CachedContext, chunks: int) -> int:
    """The number of last chunks from which the cache can be recomputed, beginning with frame 0.

    Keys of block n depend on n windows before them. Slots and positions repeat after some frames; the first of these
    chunks must have the slots and positions of frame 0.
    """
    config, window = cached.model.config, cached.window
    period = math.lcm(window.slots, window.table, max(1, config.spatial_slots))
    enough = -(-(config.depth + 1) * window.context_frames // config.chunk_frames)
    for count in range(enough, chunks):
        if (chunks - count) * config.chunk_frames % period == 0:
            return count
    return chunks


def next_step_difference(cached: CachedContext, last: list[Tensor]) -> float:
    """Largest difference between the next denoising step's outputs of the cache and of one recomputed from latents."""
    recomputed = make_context(cached.model, "cached", cached.cache.batch_size)
    recomputed.set_text(cached.cache.text)
    for latents in last:
        recomputed.append(latents)
    noisy = torch.randn(last[0].shape, generator=torch.Generator().manual_seed(2))
    outputs = []
    for context in (cached, recomputed):
        context.open_chunk()
        outputs.append(context.predict(noisy, torch.full((len(noisy),), 500)))
    return float((outputs[0] - outputs[1]).abs().max())


def draw(runs: list[Soak], path: Path) -> None:
    """Resident memory by chunk, one curve per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for run in runs:
        memory = [count / 2**20 for count in run.memory]
        (line,) = axes.plot(
            range(1, len(memory) + 1), memory, label=f"{run.name} ({run.rise:+.2%} after chunk {SETTLED})"
        )
        axes.axhline(memory[SETTLED - 1] * (1 + ALLOWED_RISE), color=line.get_color(), linestyle=":", linewidth=1)
    levels = [run.memory[SETTLED - 1] / 2**20 for run in runs]
    axes.set(xlabel="chunk (4 frames each)", ylabel="resident memory, MiB (the axis does not begin at 0)")
    axes.set(xlim=(1, max(len(run.memory) for run in runs)), ylim=(0.9 * min(levels), 1.06 * max(levels)))
    axes.set_title("tiny: memory of a long run; dotted lines, 3 % above the tenth chunk", fontsize=10)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description="Generate thousands of chunks, and check memory and positions.")
    parser.add_argument("--chunks", type=int, default=2000, help="chunks of each run, at least 20; default 2000")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="draw the memory")
    arguments = parser.parse_args()
    if arguments.chunks < 2 * SETTLED:
        parser.error(f"--chunks: {arguments.chunks} must be at least {2 * SETTLED}")
    runs, failed = [], False
    for videos, guided in ((1, False), (3, True)):
        run = soak(arguments.chunks, videos=videos, guided=guided)
        print(run, flush=True)
        for problem in run.problems(arguments.chunks * 4):
            failed = True
            print(f"  wrong: {problem}", flush=True)
        runs.append(run)
    if arguments.output is not None:
        draw(runs, arguments.output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
