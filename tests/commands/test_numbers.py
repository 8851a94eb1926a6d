"""Numbers that go wrong in the middle of a run: it stops at that chunk, says where, and keeps what was finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_kit import GENERATE, Refused, apart, ca2vdm, load
from torch import Tensor

import ca2vdm_cli
from ca2vdm_cli import Pipeline, UserError
from ca2vdm_cli.autoencoder import ConvAutoencoder
from ca2vdm_cli.generate.checks import LARGEST_LATENT, check_latents
from ca2vdm_cli.generate.samplers import AncestralSampler, DrawNoise

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

Fault = Callable[[Tensor], Tensor]
GOOD_CHUNKS = 2


def put(value: float) -> Fault:
    """Replace one value of a tensor."""

    def fault(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[-1] = value
        return x

    return fault


def use_up_memory(x: Tensor) -> Tensor:
    return torch.empty(2**50) + x


class FaultySampler(AncestralSampler):
    """Its third chunk goes wrong in the last step."""

    name, description = "faulty", ""
    fault: Fault
    chunks = 0

    def step(self, index: int, x: Tensor, output: Tensor, noise: DrawNoise) -> Tensor:
        x = super().step(index, x, output, noise)
        last = index == len(self.timesteps) - 1
        type(self).chunks += last
        return self.fault(x) if last and self.chunks > GOOD_CHUNKS else x


class FaultyAutoencoder(ConvAutoencoder):
    """The third chunk that it decodes goes wrong before the values are clamped."""

    name, description = "faulty", ""
    fault: Fault
    chunks = 0

    def reconstruct(self, latents: Tensor) -> Tensor:
        pixels = super().reconstruct(latents)
        type(self).chunks += 1
        return self.fault(pixels) if self.chunks > GOOD_CHUNKS else pixels


@pytest.fixture
def faulty() -> Iterator[Callable[[Fault], None]]:
    """``faulty(fault)``: registers a sampler and an autoencoder called ``faulty`` whose third chunk goes wrong."""
    parts: tuple[tuple[Any, Any], ...] = (
        (ca2vdm_cli.samplers, FaultySampler),
        (ca2vdm_cli.autoencoders, FaultyAutoencoder),
    )

    def register(fault: Fault) -> None:
        for registry, entry in parts:
            entry.fault, entry.chunks = staticmethod(fault), 0
            registry.register(entry)

    yield register
    for registry, entry in parts:
        registry.unregister(entry.name)


LATENTS = ["--sampler", "faulty"]
PIXELS = ["--set", "autoencoder.kind=faulty"]


@pytest.mark.parametrize(
    ("where", "fault", "expected"),
    [
        (LATENTS, put(float("nan")), "frame 11: the model's output is not finite in float32; use other weights"),
        (LATENTS, put(float("-inf")), "frame 11: the model's output is not finite in float32; use other weights"),
        (LATENTS, put(-2e6), "frame 11: the model's output has exploded to 2.0e+06 in float32; use other weights"),
        (PIXELS, put(float("nan")), "frame 11: the autoencoder's pixels are not finite; check its weights"),
        (PIXELS, put(float("inf")), "frame 11: the autoencoder's pixels are not finite; check its weights"),
        (PIXELS, use_up_memory, "out of memory; use a smaller batch, window or size (ca2vdm plan says what fits)"),
    ],
)
def test_a_run_stops_at_the_chunk_that_goes_wrong(
    weights: Path,
    refused: Refused,
    faulty: Callable[[Fault], None],
    where: list[str],
    fault: Fault,
    expected: str,
) -> None:
    sample = ["sample", "--preset", weights, *GENERATE, "--frames", "16", "--quiet"]
    assert ca2vdm(*sample, "-o", "good.npz") == 0
    faulty(fault)
    line = refused(1, *sample, *where, "-o", "bad.npz")
    assert line == f"error: {expected}; 8 finished frames are in bad.npz"
    assert apart(load("bad.npz"), load("good.npz")[:8]) == [0] * 8


def test_the_video_is_named(weights: Path, faulty: Callable[[Fault], None]) -> None:
    faulty(put(float("nan")))
    pipeline = Pipeline.load(weights, device="cpu", backend="eager", dtype="bfloat16")
    frames = pipeline.sample(16, videos=[3, 7], steps=2, sampler="faulty")
    assert len([next(frames) for _ in range(GOOD_CHUNKS)]) == GOOD_CHUNKS
    with pytest.raises(UserError, match=r"frame 11 of video 7: .* in bfloat16; try dtype float32, or other weights"):
        next(frames)


def test_given_frames_whose_latents_are_not_finite(weights: Path) -> None:
    pipeline = Pipeline.load(weights, device="cpu", backend="eager", dtype="float32")
    assert pipeline.autoencoder is not None
    pipeline.autoencoder.encode = lambda frames: torch.full((len(frames), 4, 8, 8), float("nan"))  # type: ignore
    with pytest.raises(UserError, match="frame 0: the autoencoder's latents are not finite; check its weights"):
        next(pipeline.extend(np.zeros((2, 32, 32, 1), np.uint8), 4))


def test_healthy_latents_pass() -> None:
    latents = torch.full((1, 1, 2, 1, 1), LARGEST_LATENT)
    check_latents(latents, 0, [0], torch.float32)
    with pytest.raises(UserError, match=r"frame 5: .* exploded to 1\.0e\+05"):
        check_latents(torch.cat([latents[:, :, :1], -1.001 * latents], dim=2), 4, [0], torch.float32)


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32() -> None:
    """The default weights, until the window slides; docs/performance.md has the figures for 600 frames."""
    videos = []
    for dtype in ("float32", "bfloat16"):
        pipeline = Pipeline.load("moving-digits", device="cpu", dtype=dtype)
        chunks = pipeline.sample(24, steps=2)
        videos.append(np.concatenate([chunk.frames[0] for chunk in chunks]).astype(float))
    errors = ((videos[0] - videos[1]) ** 2).mean(axis=(1, 2, 3))
    assert errors.max() > 0 and 10 * np.log10(255**2 / errors.max()) > 30, "PSNR in dB of the worst frame"


SHORT_OF_MEMORY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv.pop(1)),) * 2)
from ca2vdm_cli.__main__ import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce the limit")
@pytest.mark.parametrize("mebibytes", [60, 400])
def test_too_little_memory_to_load(mebibytes: int) -> None:
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(mebibytes * 2**20), "sample", "--frames", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expected = "error: out of memory while loading the program; free some, or allow it more (ulimit -v)\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


@pytest.mark.slow
def test_a_deleted_working_folder(tmp_path: Path) -> None:
    script = "import os, sys; os.rmdir(os.getcwd()); from ca2vdm_cli.__main__ import main; sys.exit(main())"
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, "sample"], cwd=tmp_path / "gone", capture_output=True, text=True, timeout=60
    )
    expected = "error: the working directory no longer exists; change to another\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_meta_is_no_device(refused: Refused) -> None:
    for command in ("sample", "bench", "plan", "backends"):
        line = refused(2, command, "--device", "meta")
        assert line == "error: --device: meta is not available here (it has shapes, but no values); try cpu"


@pytest.mark.slow
def test_variables_of_a_launcher_that_are_left_over(weights: Path) -> None:
    """RANK and WORLD_SIZE without an address: this process is the only one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    command = [sys.executable, "-m", "ca2vdm_cli", "sample", "--preset", str(weights), "--frames", "3"]
    command += [*map(str, GENERATE), "-o", "video.npz", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    report = json.loads(done.stdout)
    assert (report["output"], report["processes"], len(load("video.npz"))) == ("video.npz", 1, 3), done.stderr
