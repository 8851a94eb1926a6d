"""``sample`` and ``extend``: generate chunk by chunk, write each chunk as soon as it is finished, and report."""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ca2vdm_cli import STARTED
from ca2vdm_cli.config import VideoConfig
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.interrupts import held_interrupts
from ca2vdm_cli.pipeline import Pipeline, RunOptions, VideoChunk
from ca2vdm_cli.processes import group, launched, share_of
from ca2vdm_cli.runtime import dtype_name, peak_memory
from ca2vdm_cli.terminal import ProgressBar, note, print_json, print_run_report, status
from ca2vdm_cli.video_io import (
    Aspect,
    Frame,
    Geometry,
    Size,
    VideoReader,
    VideoWriter,
    open_reader,
    open_writer,
    to_channels,
)

from .outcome import merged, with_finished_frames

FrameMap = Callable[[Frame], Frame]
"""Turns a frame into one of another size."""
BATCH = 4
"""Videos that are generated together. It does not change what they look like."""
TIMED_PARTS = ("input", "denoise", "cache_write", "decode", "encode", "output")
"""Parts of a run that are timed in the report."""


class LoadOptions(TypedDict):
    """The flags that determine which model to load, as arguments of ``Pipeline.load``."""

    preset: str | None
    checkpoint: Path | None
    overrides: list[str]
    backend: str
    device: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The flags that determine where the videos go and what the command prints."""

    path: str | None
    format: str | None
    fps: float | None
    overwrite: bool
    as_json: bool
    quiet: bool

    def targets(self, num_videos: int, default: str) -> list[str]:
        """One output per video; several are numbered. Without ``-o`` it is the first unused name."""
        path = self.path
        if path == "-" and (num_videos > 1 or self.as_json):
            other = "--num-videos" if num_videos > 1 else "--json"
            raise UsageError(f"-o -: standard output holds one video and nothing else; leave out {other}")
        if path == "-" and sys.stdout.isatty():
            raise UsageError("-o -: standard output is a terminal; pipe it into a player, or name a file")
        if path is None:
            if launched()[1] > 1:
                raise UsageError("-o: required when several processes share the videos, because each writes its own")
            suffix = "/" if self.format == "png" else f".{self.format or 'mp4'}"
            names = (f"{default}{'' if n == 0 else f'-{n}'}{suffix}" for n in count())
            path = next(n for n in names if not any(Path(p).exists() for p in _numbered(n, num_videos)))
        return _numbered(path, num_videos)


def _numbered(path: str, num_videos: int) -> list[str]:
    if num_videos == 1:
        return [path]
    width = max(2, len(str(num_videos - 1)))
    if path.endswith("/") or Path(path).is_dir():
        return [f"{path.rstrip('/')}/{k:0{width}d}/" for k in range(num_videos)]
    file = Path(path)
    return [str(file.with_name(f"{file.stem}-{k:0{width}d}{file.suffix}")) for k in range(num_videos)]


def run_sample(
    *,
    load: LoadOptions,
    options: RunOptions,
    output: OutputOptions,
    frames: int | None,
    num_videos: int,
    first_frame: str | None,
) -> None:
    """``ca2vdm sample``."""
    pipeline, video = _load(load, quiet=output.quiet)
    given = None if first_frame is None else _first_frame(first_frame, video)
    run = Generation(pipeline, options, output, frames, num_videos, name="sample", fps=video.fps)
    with run.open_outputs():
        run.generate(partial(pipeline.sample, run.frames, first_frame=given), to_output=lambda frame: frame)
    run.report()


def run_extend(
    *,
    load: LoadOptions,
    options: RunOptions,
    output: OutputOptions,
    frames: int | None,
    num_videos: int,
    source: str,
    only_new: bool,
    aspect: Aspect,
    size: str | None,
) -> None:
    """``ca2vdm extend``."""
    pipeline, video = _load(load, quiet=output.quiet)
    with open_reader(source) as reader:
        to_model, input_to_output, to_output = _frame_maps(reader, (video.height, video.width), aspect, size)
        name = "extended" if source == "-" else f"{Path(source).stem}-extended"
        run = Generation(pipeline, options, output, frames, num_videos, name=name, fps=reader.fps or video.fps)
        blank = np.zeros((1, video.height, video.width, video.channels), np.uint8)
        pipeline.extend(blank, run.frames, **options)  # rejects an invalid request before the input is read
        if not run.targets:  # another process's share
            run.report()
            return
        window: deque[Frame] = deque(maxlen=options.get("context_frames") or pipeline.config.model.context_frames)
        with run.open_outputs():
            with run.timed_input():
                for frame in reader:
                    run.input_frames += 1
                    window.append(to_channels(to_model(frame), video.channels))
                    if not only_new:
                        run.copy(input_to_output(frame))
            if reader.frame_count and run.input_frames < 0.98 * reader.frame_count:
                note(f"{source}: {run.input_frames} of {reader.frame_count} frames could be read", quiet=run.quiet)
            run.generate(partial(pipeline.extend, np.stack(window), run.frames), to_output)
    run.report()


def _load(load: LoadOptions, *, quiet: bool) -> tuple[Pipeline, VideoConfig]:
    group()  # waits for the other processes
    with status("loading", quiet=quiet):
        pipeline = Pipeline.load(**load)
    if pipeline.config.video is None:
        raise UsageError(f"preset {pipeline.preset.name}: it works on latents only and produces no frames; use bench")
    return pipeline, pipeline.config.video


def _first_frame(source: str, video: VideoConfig) -> Frame:
    with open_reader(source) as reader:
        geometry = Geometry((reader.height, reader.width), (video.height, video.width), Aspect.STRETCH)
        return to_channels(geometry.to_model(next(reader)), video.channels)


def _frame_maps(
    reader: VideoReader, model: Size, aspect: Aspect, size: str | None
) -> tuple[FrameMap, FrameMap, FrameMap]:
    """Maps from the input to the model, from the input to the output, and from the model to the output."""
    geometry = Geometry((reader.height, reader.width), model, aspect)
    if size is None:
        return geometry.to_model, geometry.input_to_output, geometry.from_model
    if size == "model":
        return geometry.to_model, geometry.to_model, lambda frame: frame
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not match or min(output_size := (int(match[2]), int(match[1]))) < 1:
        raise UsageError(f"--size {size}: must be WIDTHxHEIGHT such as 640x360, or model")
    resize = Geometry(geometry.output_size, output_size, Aspect.STRETCH).to_model
    return (
        geometry.to_model,
        lambda frame: resize(geometry.input_to_output(frame)),
        lambda frame: resize(geometry.from_model(frame)),
    )


class Generation:
    """This process's share of the videos of a run, the files they go to, and the time each part of the run took.

    Args:
        pipeline: the model.
        options: the flags that say how to generate, as arguments of ``Pipeline.sample`` and ``Pipeline.extend``.
        output: the flags about the output.
        frames: frames to generate for each video; the preset's number by default.
        num_videos: videos of all processes together.
        name: name of the output if the flags give none, without suffix.
        fps: frames per second of the output if the flags give none.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: RunOptions,
        output: OutputOptions,
        frames: int | None,
        num_videos: int,
        *,
        name: str,
        fps: float | Fraction,
    ) -> None:
        self.pipeline, self.options, self.output = pipeline, options, output
        self.fps = fps if output.fps is None else output.fps
        self.frames = frames or pipeline.config.sampling.frames
        self.steps = options.get("steps") or pipeline.config.sampling.steps
        self.num_videos, self.videos = num_videos, share_of(num_videos)
        targets = output.targets(num_videos, name)
        self.targets = [targets[k] for k in self.videos]
        self.writers: list[VideoWriter] = []
        rank, _ = launched()
        self.quiet = output.quiet or rank > 0  # the first process reports, on its own videos
        self.input_frames = self.new_frames = self.context_bytes = 0
        self.first_chunk_seconds: float | None = None
        self.seconds = dict.fromkeys(TIMED_PARTS, 0.0)

    @contextmanager
    def open_outputs(self) -> Iterator[None]:
        """Open the output of each video. After an interrupt, what is finished stays playable."""
        with ExitStack() as stack:
            for target in self.targets:
                writer = open_writer(target, format=self.output.format, fps=self.fps, overwrite=self.output.overwrite)
                self.writers.append(stack.enter_context(writer))
            try:
                yield
            except KeyboardInterrupt:
                stack.close()
                names = ", ".join(writer.name for writer in self.writers if writer.frames)
                result = f"{self.new_frames} new frames are in {names}"
                note(f"interrupted: {result if self.new_frames else 'no new frame was generated'}", quiet=self.quiet)
                raise
            except Exception as error:
                group().fail()
                with suppress(UserError, OSError):
                    stack.close()
                written = [writer.name for writer in self.writers if writer.frames]
                shown = with_finished_frames(error, self.new_frames, written)
                if shown is error:
                    raise
                raise shown from error

    @contextmanager
    def timed_input(self) -> Iterator[None]:
        """Count the time of this block as time for reading the input."""
        began = time.perf_counter()
        with status("reading", quiet=self.quiet):
            yield
        self.seconds["input"] = time.perf_counter() - began

    def copy(self, frame: Frame) -> None:
        """Write a frame of the input to all outputs."""
        for writer in self.writers:
            writer.write(frame, copied=True)

    def generate(self, run: Callable[..., Iterator[VideoChunk]], to_output: FrameMap) -> None:
        """Generate the videos in batches, and write them.

        Args:
            run: generates the chunks of some videos, given ``RunOptions``.
            to_output: converts a generated frame to the output's size.
        """
        steps_per_video = -(-self.frames // self.pipeline.config.model.chunk_frames) * self.steps
        batches = range(0, len(self.videos), BATCH)
        # in a pipe the next command shows its own progress, and two bars on one terminal would garble each other
        quiet = self.quiet or (self.targets == ["-"] and stat.S_ISFIFO(os.fstat(1).st_mode))
        frames = self.frames * len(self.videos)
        with ProgressBar("sampling", steps_per_video * len(batches), frames, quiet=quiet) as bar:
            for first in batches:
                videos, writers = self.videos[first : first + BATCH], self.writers[first : first + BATCH]
                for chunk in run(**self.options, videos=videos, on_step=lambda *_: bar.advance()):
                    self._write(chunk, writers, to_output)
                    bar.advance(steps=0, finished=self.new_frames)
                for writer in writers:
                    writer.close()

    def _write(self, chunk: VideoChunk, writers: list[VideoWriter], to_output: FrameMap) -> None:
        began = time.perf_counter()
        for writer, video in zip(writers, chunk.frames, strict=True):
            for frame in video:
                # hold interrupts so that a frame is written and counted, or neither; but a pipe may block for long
                with nullcontext() if writer.is_pipe else held_interrupts():
                    writer.write(to_output(frame))
                    self.new_frames += 1
        if self.first_chunk_seconds is None:
            self.first_chunk_seconds = time.perf_counter() - STARTED
        self.context_bytes = max(self.context_bytes, chunk.context_bytes)
        self.seconds["output"] += time.perf_counter() - began
        self.seconds["denoise"] += chunk.denoise_seconds
        self.seconds["cache_write"] += chunk.write_seconds
        self.seconds["decode"] += chunk.decode_seconds
        self.seconds["encode"] += chunk.encode_seconds

    def report(self) -> None:
        """Print what was generated and how long it took: as JSON, for people, or not at all."""
        reports = group().gather(self._own_report())
        if self.output.as_json and reports:
            print_json(merged(reports))
        elif not self.quiet and reports:
            print_run_report(merged(reports))

    def _own_report(self) -> dict[str, Any]:
        pipeline, options = self.pipeline, self.options
        seconds = time.perf_counter() - STARTED
        strategy = options.get("strategy") or "cached"
        return {
            "frames": self.frames,
            "input_frames": self.input_frames,
            "num_videos": len(self.targets),
            "processes": launched()[1],
            "seconds": seconds,
            "first_chunk_seconds": self.first_chunk_seconds,
            "frames_per_second": self.new_frames / seconds,
            "peak_memory_bytes": peak_memory(pipeline.model.device),
            "cache_bytes": self.context_bytes if strategy == "cached" else 0,
            "context_bytes": self.context_bytes,
            "weights_bytes": pipeline.weights_bytes,
            "output": self.targets[0] if self.num_videos == len(self.targets) == 1 else self.targets,
            "preset": pipeline.preset.name,
            "backend": pipeline.backend.name,
            "device": str(pipeline.model.device),
            "dtype": dtype_name(pipeline.model.dtype),
            "strategy": strategy,
            "sampler": options.get("sampler") or pipeline.config.sampling.sampler,
            "steps": self.steps,
            "seed": options.get("seed", 0),
            "prompt": options.get("prompt"),
            "context_frames": options.get("context_frames") or pipeline.config.model.context_frames,
            **{f"{name}_seconds": spent for name, spent in self.seconds.items()},
            "startup_seconds": max(0.0, seconds - sum(self.seconds.values())),
        }
