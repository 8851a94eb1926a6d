"""The Python API, as the README shows it."""

from __future__ import annotations

import pydoc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ca2vdm_cli
from ca2vdm_cli.__main__ import main
from ca2vdm_cli.autoencoder import load_autoencoder
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.generate.context import RecomputedContext
from ca2vdm_cli.generate.samplers import DrawNoise
from ca2vdm_cli.pipeline import Pipeline, VideoChunk

CPU: Any = {"device": "cpu", "backend": "eager", "dtype": "float32"}
CHUNK, WINDOW = 4, 9  # of the tiny preset


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset after three steps at a high learning rate, so that its videos depend on the context."""
    folder = tmp_path_factory.mktemp("trained") / "weights"
    settings = ["--set", "training.learning_rate=0.03", "--set", "training.autoencoder_steps=2"]
    flags = ["--device", "cpu", "--backend", "eager", "--quiet", *settings]
    assert main(["train", "--preset", "tiny", "--steps", "3", "--out", str(folder), *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def pipeline(weights: Path) -> Pipeline:
    return Pipeline.load(weights, overrides=["sampling.steps=3"], **CPU)


@pytest.fixture(scope="module")
def given() -> np.ndarray:
    """A clip (T, H, W, channels) at the model's size, longer than its window."""
    return np.random.default_rng(0).integers(0, 256, (12, 32, 32, 1), np.uint8)


def joined(chunks: list[VideoChunk]) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in chunks], axis=1)


def apart(frames: np.ndarray, others: np.ndarray) -> int:
    assert frames.shape == others.shape
    return int(np.abs(frames.astype(int) - others).max())


def test_public_names() -> None:
    assert ca2vdm_cli.Pipeline is Pipeline
    assert {"Pipeline", "RunOptions", "VideoChunk", "UserError", "load_preset", "backends"} <= set(dir(ca2vdm_cli))
    assert all(hasattr(ca2vdm_cli, name) for name in ca2vdm_cli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        ca2vdm_cli.Pipelines  # noqa: B018
    assert issubclass(UsageError, UserError)


def test_help_explains_every_option() -> None:
    text = pydoc.render_doc(ca2vdm_cli.RunOptions)
    method = pydoc.render_doc(Pipeline.sample)
    for option in ca2vdm_cli.RunOptions.__annotations__:
        assert re.search(rf"^ .*\b{option}: \w+", text, re.MULTILINE), option
        assert re.search(rf"\b{option}\b", method), option


def test_sample_yields_chunks(pipeline: Pipeline) -> None:
    chunks = list(pipeline.sample(frames=10, seed=1))
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [chunk.frames.shape for chunk in chunks] == [(1, 4, 32, 32, 1), (1, 4, 32, 32, 1), (1, 2, 32, 32, 1)]
    assert {chunk.frames.dtype for chunk in chunks} == {np.dtype(np.uint8)}
    assert all(chunk.denoise_seconds > 0 and chunk.decode_seconds > 0 for chunk in chunks)
    assert chunks[0].write_seconds < chunks[2].write_seconds  # nothing precedes the first chunk
    assert {chunk.context_bytes for chunk in chunks} == {2 * 2 * (WINDOW + CHUNK + 3) * 16 * 48 * 4}


def test_chunks_come_one_at_a_time(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    chunks = pipeline.sample(10**6, on_step=lambda chunk, step: seen.append((chunk, step)))
    assert seen == []
    next(chunks)
    assert seen == [(0, 1), (0, 2), (0, 3)]
    next(chunks)
    assert seen[3:] == [(1, 1), (1, 2), (1, 3)]


def test_a_pipeline_can_be_reused(pipeline: Pipeline, given: np.ndarray) -> None:
    first = joined(list(pipeline.sample(6)))
    interleaved = pipeline.sample(6)
    begun = next(interleaved)
    list(pipeline.extend(given, 3))
    assert apart(joined([begun, *interleaved]), first) == 0


def test_videos_are_batched(pipeline: Pipeline) -> None:
    both = joined(list(pipeline.sample(6, videos=[0, 3])))
    assert both.shape == (2, 6, 32, 32, 1)
    assert apart(both[1:], joined(list(pipeline.sample(6, videos=[3])))) <= 1
    assert apart(both[:1], both[1:]) > 20


@pytest.mark.parametrize("settings", [[], ["model.text_channels=16", "model.text_tokens=8"]], ids=["plain", "text"])
def test_latents_do_not_depend_on_what_is_generated_beside_them(settings: list[str], given: np.ndarray) -> None:
    """Not even on the number of videos, which a matrix product's rounding could depend on."""
    overrides = ["diffusion.prediction=v", "sampling.steps=3", *settings]
    pipeline = Pipeline.load("tiny", random_weights=True, overrides=overrides, pixels=False, **CPU)
    config = pipeline.config
    assert config.video is not None
    pipeline.autoencoder = load_autoencoder(config.autoencoder, config.video, config.model.in_channels)
    latents: list[torch.Tensor] = []
    decode = pipeline.decode
    pipeline.decode = lambda latent, *frame: (latents.append(latent), decode(latent, *frame))[1]  # type: ignore

    def generate(videos: list[int]) -> torch.Tensor:
        latents.clear()
        for _ in pipeline.extend(given[:5], 16, videos=videos):
            pass
        return torch.cat(latents, dim=2)

    alone = {k: generate([k]) for k in (0, 1, 2)}
    for videos in ([1, 0], [2, 0, 1], [0, 0, 1, 1, 2]):
        together = generate(videos)
        for k, video in zip(videos, together, strict=True):
            assert torch.equal(video, alone[k][0]), (k, videos)


def test_first_frame(pipeline: Pipeline, given: np.ndarray) -> None:
    chunks = list(pipeline.sample(10, first_frame=given[0], videos=[0, 1]))
    assert [chunk.frames.shape[1] for chunk in chunks] == [5, 4, 1]  # the given frame is part of the first chunk
    assert chunks[0].encode_seconds > 0
    video = joined(chunks)
    assert apart(video[:, :1], np.stack([given[:1]] * 2)) == 0
    alone = list(pipeline.sample(1, first_frame=given[0]))
    assert len(alone) == 1
    assert apart(alone[0].frames, given[None, :1]) == 0


def test_extend_yields_the_new_frames(pipeline: Pipeline, given: np.ndarray) -> None:
    chunks = list(pipeline.extend(given, 6))
    assert [chunk.frames.shape[1] for chunk in chunks] == [4, 2]
    assert chunks[0].encode_seconds > 0 == chunks[1].encode_seconds
    assert apart(joined(list(pipeline.extend(given[-WINDOW:], 6))), joined(chunks)) == 0  # older frames are not used
    assert apart(joined(list(pipeline.extend(given[:1], 6))), joined(chunks)) > 1


def test_options(pipeline: Pipeline, given: np.ndarray) -> None:
    frames = joined(list(pipeline.extend(given, 8)))
    recomputed = list(pipeline.extend(given, 8, strategy="recompute"))
    assert recomputed[0].context_bytes == WINDOW * 4 * 8 * 8 * 4  # latents, not keys and values
    assert apart(joined(recomputed)[:, :4], frames[:, :4]) <= 1
    changes: list[dict[str, Any]] = [{"seed": 1}, {"steps": 5}, {"sampler": "ddim"}, {"context_frames": 4}]
    for change in changes:
        assert apart(joined(list(pipeline.extend(given, 8, **change))), frames) > 1


def test_load_by_preset_and_by_checkpoint(pipeline: Pipeline, weights: Path) -> None:
    expected = joined(list(pipeline.sample(4)))
    sources: list[dict[str, Path]] = [
        {"preset": weights / "preset.yaml"},
        {"checkpoint": weights},
        {"checkpoint": weights / "ema.safetensors"},
        {"preset": weights, "checkpoint": weights / "ema.safetensors"},
    ]
    for source in sources:
        again = Pipeline.load(**source, overrides=["sampling.steps=3"], **CPU)  # type: ignore[arg-type]
        assert apart(joined(list(again.sample(4))), expected) == 0
        assert again.trained


def test_random_weights_depend_on_the_seed() -> None:
    def total(seed: int) -> float:
        model = Pipeline.load("tiny", random_weights=True, seed=seed, **CPU).model
        assert all(parameter.count_nonzero() for parameter in model.parameters())
        return sum(parameter.double().sum().item() for parameter in model.parameters())

    assert total(0) == total(0) != total(1)


class Halving(ca2vdm_cli.Sampler):
    """Ignores the network and halves the noise in every step."""

    name, description = "mine", "halves the noise"

    def __init__(self, process: Any, steps: int, last_timestep: int = 0) -> None:
        super().__init__(process, steps, last_timestep)
        self.timesteps = list(range(steps, 0, -1))

    def step(self, index: int, x: torch.Tensor, output: torch.Tensor, noise: DrawNoise) -> torch.Tensor:
        return x / 2


class Forgetful(RecomputedContext):
    """Starts every chunk from an empty context."""

    name, description = "mine", "remembers nothing"

    def append(self, latents: torch.Tensor) -> None:
        pass


class Windowless(Forgetful):
    """Forgets to call its base class's constructor."""

    name = "windowless"

    def __init__(self, *_: object) -> None:
        pass


class Gray(ca2vdm_cli.Autoencoder):
    """Decodes everything to gray."""

    name, description = "mine", "gray"

    def __init__(self, config: Any, video: Any, in_channels: int) -> None:
        super().__init__(config, video, in_channels)
        self.size = (video.channels, video.height, video.width)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.new_zeros(len(frames), 4, 8, 8)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.new_zeros(len(latents), *self.size)


@pytest.fixture
def registered() -> Iterator[None]:
    """A sampler, a context and an autoencoder called ``mine``, registered in Python without a plug-in package."""
    entries = [(ca2vdm_cli.samplers, Halving), (ca2vdm_cli.contexts, Forgetful), (ca2vdm_cli.autoencoders, Gray)]
    for registry, entry in entries:
        registry.register(entry)
    yield
    for registry, _ in entries:
        registry.unregister("mine")
        assert "mine" not in registry


@pytest.mark.usefixtures("registered")
def test_entries_registered_in_python_are_used(pipeline: Pipeline, weights: Path) -> None:
    few, many = (joined(list(pipeline.sample(4, sampler="mine", steps=steps))) for steps in (1, 20))
    assert apart(few, many) > 1, "halved 20 times, no noise is left"
    assert apart(many, pipeline.decode(torch.zeros(1, 4, 4, 8, 8))) <= 1
    forgotten = list(pipeline.sample(8, strategy="mine"))
    assert forgotten[1].context_bytes == 0
    assert apart(joined(forgotten)[:, 4:], joined(list(pipeline.sample(8)))[:, 4:]) > 1
    settings = ["autoencoder.kind=mine", "autoencoder_weights=", "sampling.steps=1"]
    gray = Pipeline.load(weights, overrides=settings, **CPU)
    assert set(np.unique(joined(list(gray.sample(4))))) == {128}


def test_names_that_are_not_registered_are_refused(pipeline: Pipeline, weights: Path) -> None:
    with pytest.raises(UsageError, match="sampler: 'mine' is not one of"):
        pipeline.sample(4, sampler="mine")
    with pytest.raises(UsageError, match="strategy: there is no context 'mine'; known: cached"):
        pipeline.sample(4, strategy="mine")
    with pytest.raises(UsageError, match=r"autoencoder\.kind: there is no autoencoder 'mine'"):
        Pipeline.load(weights, overrides=["autoencoder.kind=mine"], **CPU)


WRONG: list[tuple[Callable[[Any, Any], object], str]] = [
    (lambda p, g: p.sample(0), "at least one"),
    (lambda p, g: p.sample(0, first_frame=g[0]), "at least one"),
    (lambda p, g: p.sample(4, steps=1001), "steps: 1001 must be from 1 to 1000"),
    (lambda p, g: p.sample(4, context_frames=10), "context_frames: 10 is more than the 9"),
    (lambda p, g: p.sample(4, first_frame=g), "given frames"),
    (lambda p, g: p.sample(4, first_frame=g[0, :, :16]), r"uint8 \(1, 32, 16, 1\) must be uint8 \(frames, 32, 32, 1\)"),
    (lambda p, g: p.extend(g[:0], 4), "at least one"),
    (lambda p, g: p.extend(g / 255, 4), "float64 .* must be uint8"),
    (lambda p, g: p.extend(g.repeat(3, 3), 4), r"\(12, 32, 32, 3\) must be uint8 \(frames, 32, 32, 1\)"),
    (lambda p, g: p.extend(g.tolist(), 4), "given frames: they must be a NumPy array, not list"),
    (lambda p, g: p.extend(np.uint8(1), 4), "given frames: they must be a NumPy array, not uint8"),
    (lambda p, g: p.sample("8"), "frames: '8' must be a whole number"),
    (lambda p, g: p.sample(8.0), "frames: 8.0 must be a whole number"),
    (lambda p, g: p.sample("1", first_frame=g[0]), "frames: '1' must be a whole number"),
    (lambda p, g: p.sample(4, videos=2), "videos: 2 must be a sequence of whole numbers"),
    (lambda p, g: p.sample(4, videos="01"), "videos: '01' must be a sequence of whole numbers"),
    (lambda p, g: p.sample(4, videos=[]), "videos: there must be at least one"),
    (lambda p, g: p.sample(1, first_frame=g[0], videos=[]), "videos: there must be at least one"),
    (lambda p, g: p.sample(4, videos=[-1]), "videos: -1 must be at least 0"),
    (lambda p, g: p.sample(4, seed=None), "seed: None must be a whole number"),
    (lambda p, g: p.sample(4, seed=-1), "seed: -1 must be at least 0"),
    (lambda p, g: p.sample(4, steps="8"), "steps: '8' must be a whole number"),
    (lambda p, g: p.sample(4, context_frames=0), "context frames: 0 must be at least one"),
    (lambda p, g: p.extend(g, 4, context_frames="4"), "context frames: '4' must be a whole number"),
    (lambda p, g: p.sample(4, sampler=1), "sampler: 1 must be text"),
    (lambda p, g: p.sample(4, strategy=["cached"]), r"strategy: \['cached'\] must be text"),
    (lambda p, g: p.sample(4, prompt=b"a"), "prompt: b'a' must be text"),
    (lambda p, g: p.sample(4, prompt="a", guidance="7"), "guidance: '7' must be a number"),
    (lambda p, g: p.sample(4, prompt="a", guidance=float("nan")), "guidance: nan must be a number"),
    (lambda p, g: p.sample(4, caption="a"), "caption: it must be a ca2vdm_cli.generate.loop.Caption"),
    (lambda p, g: p.sample(4, on_step=3), "on_step: 3 must be a function"),
    (lambda p, g: p.sample(4, sead=3), "sead: there is no such option; did you mean seed?"),
    (lambda p, g: p.sample(4, colour=3), "colour: there is no such option; known: videos, seed, "),
]


@pytest.mark.parametrize(("ask", "expected"), WRONG, ids=range(len(WRONG)))
def test_an_invalid_request_fails_before_the_first_chunk(
    pipeline: Pipeline, given: np.ndarray, ask: Callable[[Pipeline, np.ndarray], object], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        ask(pipeline, given)


def test_weights_that_need_a_first_frame(weights: Path, given: np.ndarray) -> None:
    settings = ["diffusion.unconditional_start=false", "sampling.steps=2"]
    pipeline = Pipeline.load(weights, overrides=settings, **CPU)
    with pytest.raises(UsageError, match="give a first frame"):
        pipeline.sample(4)
    assert joined(list(pipeline.sample(4, first_frame=given[0]))).shape[1] == 4


def test_absolute_positions_limit_the_length(weights: Path) -> None:
    settings = ["model.temporal_positions=absolute", "sampling.steps=1"]
    pipeline = Pipeline.load(weights, overrides=settings, **CPU)
    assert joined(list(pipeline.sample(12))).shape[1] == 12
    with pytest.raises(UsageError, match="absolute positions allow at most 13 frames in whole chunks of 4"):
        pipeline.sample(13)


def test_preset_without_weights() -> None:
    with pytest.raises(UsageError, match="preset tiny: it has no weights; train some"):
        Pipeline.load("tiny", **CPU)
    pipeline = Pipeline.load("bench-small", random_weights=True, overrides=["model.depth=1"], **CPU)
    assert not pipeline.trained
    with pytest.raises(UsageError, match="works on latents only and produces no frames"):
        pipeline.sample(4)


def test_given_frames_are_encoded_once_and_a_few_at_a_time(
    pipeline: Pipeline, given: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    autoencoder = pipeline.autoencoder
    assert autoencoder is not None
    encode = autoencoder.encode

    def counting(frames: torch.Tensor) -> torch.Tensor:
        sizes.append(len(frames))
        return encode(frames)

    frames = joined(list(pipeline.extend(given, 4, videos=[0, 1])))
    monkeypatch.setattr("ca2vdm_cli.video_codec.FRAMES_AT_ONCE", 4)
    monkeypatch.setattr(autoencoder, "encode", counting)
    again = joined(list(pipeline.extend(given, 4, videos=[0, 1])))
    assert sizes == [4, 4, 1]  # a window of 9, once for both videos
    assert apart(again, frames) <= 1


def test_a_context_without_a_window_is_named(pipeline: Pipeline, request: pytest.FixtureRequest) -> None:
    ca2vdm_cli.contexts.register(Windowless)
    request.addfinalizer(lambda: ca2vdm_cli.contexts.unregister("windowless"))
    with pytest.raises(UserError, match="context 'windowless' of Python code has no model; set it in create"):
        pipeline.sample(4, strategy="windowless")


def test_wrong_arguments_end_in_a_line(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="dtype: 'fp16' is not one of auto, float32, bfloat16, float16"):
        Pipeline.load("tiny", dtype="fp16", random_weights=True)
    assert list(pipeline.sample(1, strategy=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"preset": 5}, "preset: 5 must be a name or a path"),
        ({"checkpoint": 5}, "checkpoint: 5 must be a name or a path"),
        ({"overrides": 5}, "overrides: 5 must be a mapping such as"),
        ({"overrides": [5]}, r"overrides: \[5\] must be a mapping such as"),
        ({"overrides": "a=b"}, "overrides: 'a' is not a key of a preset"),
        ({"overrides": {"model.depht": 1}}, "overrides: 'model.depht' is not a key .* did you mean model.depth"),
        ({"backend": 5}, "backend: 5 must be text"),
        ({"device": "meta"}, r"device: meta is not available here \(it has shapes, but no values\); try cpu"),
        ({"device": 1.5}, "device: 1.5 is not available here"),
        ({"dtype": torch.float64}, "dtype: 'float64' is not one of auto, float32"),
        ({"dtype": 32}, "dtype: 32 is not one of auto, float32"),
        ({"seed": "0"}, "seed: '0' must be a whole number"),
    ],
    ids=str,
)
def test_wrong_arguments_of_load(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        Pipeline.load(**{"preset": "tiny", "random_weights": True, **arguments})


def test_arguments_in_other_types() -> None:
    """PyTorch's dtypes and devices, NumPy's integers, and settings as a mapping, nested or not."""
    pipeline = Pipeline.load(
        *("tiny",),
        overrides={"model": {"depth": 1}, "sampling.steps": 2, "model.sink_frames": 2, "training.prefix_lengths": [0]},
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        backend="eager",
        random_weights=True,
        seed=np.int64(1),  # type: ignore[arg-type]
    )
    config = pipeline.config
    assert (config.model.depth, config.sampling.steps, config.model.sink_frames) == (1, 2, 2)
    assert config.training.prefix_lengths == (0,)
    assert pipeline.model.dtype is torch.bfloat16
    assert config.video is not None
    pipeline.autoencoder = load_autoencoder(config.autoencoder, config.video, config.model.in_channels)
    numbers: Any = {"videos": np.arange(2), "seed": np.uint8(3), "steps": np.int32(1), "context_frames": np.int16(8)}
    assert joined(list(pipeline.sample(np.int64(5), **numbers))).shape == (2, 5, 32, 32, 1)  # type: ignore[arg-type]
