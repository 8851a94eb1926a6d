"""Text: embeddings of captions and prompts, training on captions, and videos from prompts.

The encoder is a tiny T5 with random weights (``t5`` in conftest.py); a caption has at most 6 tokens. Shapes: embeddings
(B, M, E), masks (B, M).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ca2vdm_cli import text_encoder
from ca2vdm_cli.__main__ import main
from ca2vdm_cli.autoencoder import Autoencoder
from ca2vdm_cli.config import ModelConfig, TextConfig
from ca2vdm_cli.data import Clip
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.generate.context import make_context
from ca2vdm_cli.generate.loop import Caption, SeededNoise, generate
from ca2vdm_cli.generate.samplers import make_sampler
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.pipeline import Pipeline
from ca2vdm_cli.plugins import backends
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.processes import make_accelerator
from ca2vdm_cli.text_encoder import TextEncoder
from ca2vdm_cli.training.batches import TrainingData
from ca2vdm_cli.training.run_folder import RunFolder
from ca2vdm_cli.training.trainer import Trainer
from ca2vdm_cli.video_io import open_reader, open_writer

CPU = torch.device("cpu")
CHANNELS, TOKENS = 16, 6
RUN = ["--device", "cpu", "--backend", "eager", "--quiet"]


@pytest.fixture
def config(make_config: Callable[..., ModelConfig]) -> ModelConfig:
    return make_config(text_channels=CHANNELS, text_tokens=TOKENS)


@pytest.fixture
def encoder(t5: Path, config: ModelConfig) -> TextEncoder:
    return TextEncoder(TextConfig(str(t5)), config, CPU)


def stored(captions: int) -> tuple[Tensor, Tensor]:
    """An unconditional caption that is easy to recognize."""
    return torch.full((captions, TOKENS, CHANNELS), 7.0), torch.ones(captions, TOKENS, dtype=torch.bool)


# --------------------------------------------------------------------------------------------------------- embeddings
def test_embeddings_equal_the_encoders_in_a_padded_batch(encoder: TextEncoder, t5: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    captions = ["a white square moves", "black", "a black square moves a white square"]
    tokenizer = AutoTokenizer.from_pretrained(t5)
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(t5)(**tokens).last_hidden_state
    embeddings, mask = encoder(captions, stored(3))
    assert embeddings.shape == (3, TOKENS, CHANNELS) and mask.sum(1).tolist() == [5, 2, 6]
    assert torch.equal(mask, tokens["attention_mask"].bool())
    assert torch.allclose(embeddings[mask], expected[mask], atol=1e-5)
    assert embeddings[~mask].count_nonzero() == 0


def test_an_embedding_depends_neither_on_the_batch_nor_on_the_cache(
    encoder: TextEncoder, t5: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = ["a white square", "black", "a", "white square moves", "black"]
    together, _ = encoder(captions, stored(5))
    monkeypatch.setattr(text_encoder, "CACHE_BYTES", 3 * 4 * CHANNELS)  # three tokens
    small = TextEncoder(TextConfig(str(t5)), config, CPU)
    for _ in range(2):
        for row, caption in enumerate(captions):
            assert torch.equal(small([caption], stored(1))[0][0], together[row])


def test_embeddings_are_cached_up_to_a_limit(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encoder.model.register_forward_hook(lambda *_: encoded.append(1))
    monkeypatch.setattr(text_encoder, "CACHE_BYTES", 6 * 4 * CHANNELS)  # three captions of one word and an end token
    encoder(["a", "black", "white", "a", "black"], stored(5))
    assert len(encoded) == 3
    encoder(["square"], stored(1))  # evicts the least recently used: white
    encoder(["a", "black", "square"], stored(3))
    assert len(encoded) == 4
    encoder(["white"], stored(1))
    assert len(encoded) == 5


def test_a_missing_caption_is_the_stored_one_and_a_dropped_one_keeps_its_mask(encoder: TextEncoder) -> None:
    embeddings, mask = encoder([None, " ", "a white square", "a white square"], stored(4), [True, False, True, False])
    assert torch.equal(embeddings[:3], stored(3)[0]) and not torch.equal(embeddings[3], stored(1)[0][0])
    assert mask.sum(1).tolist() == [TOKENS, TOKENS, 4, 4]


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("missing", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_without_an_encoder_is_refused(missing: str, t5: Path, tmp_path: Path, config: ModelConfig) -> None:
    folder = tmp_path / "t5"
    if missing:
        shutil.copytree(t5, folder)
        (folder / missing).unlink()
    with pytest.raises(UserError, match="no T5 encoder can be loaded from") as error:
        TextEncoder(TextConfig(str(folder)), config, CPU)
    assert str(error.value).startswith("text.path: ") and "\n" not in str(error.value)


def test_pickled_weights_are_not_read(t5: Path, tmp_path: Path, config: ModelConfig) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harm",))

    folder = tmp_path / "t5"
    shutil.copytree(t5, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="no T5 encoder can be loaded from"):
        TextEncoder(TextConfig(str(folder)), config, CPU)
    assert not (tmp_path / "harm").exists()


def test_missing_weights_are_refused(t5: Path, tmp_path: Path, config: ModelConfig) -> None:
    folder = tmp_path / "t5"
    shutil.copytree(t5, folder)
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**sizes, "num_layers": 3}))
    with pytest.raises(UserError, match=r"is not a T5 encoder: it has no weights for encoder\.block\.2"):
        TextEncoder(TextConfig(str(folder)), config, CPU)


def test_an_encoder_that_does_not_fit_is_refused(t5: Path, make_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(UserError, match=r"model.text_channels: 8 does not fit the text encoder .*, which has 16"):
        TextEncoder(TextConfig(str(t5)), make_config(text_channels=8, text_tokens=TOKENS), CPU)
    with pytest.raises(UsageError, match=r"text: needs a text-conditioned model; set model\.text_channels"):
        load_preset("tiny", [f"text.path={t5}"])


# ------------------------------------------------------------------------------------------------------------ training
class Shades:
    """Clips that each have a single shade, with captions that name it."""

    def __init__(self, captions: Sequence[str | None] = ("a white square", "a black square")) -> None:
        self.captions = captions

    def clip(self, index: int, length: int) -> Clip:
        frames = torch.full((length, 1, 32, 32), 1.0 if index % 2 == 0 else -1.0)
        return Clip(frames, self.captions[index % len(self.captions)])

    def crop(self, index: int, side: int) -> Tensor:
        raise AssertionError("no pictures are needed")


class Shrink(Autoencoder):
    """An autoencoder without weights."""

    name, description = "shrink", ""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def encode(self, frames: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(frames, 4).repeat(1, 4, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(latents.mean(1, keepdim=True), scale_factor=4)


@pytest.fixture
def make_trainer(t5: Path) -> Callable[..., Trainer]:
    def make(*overrides: str, source: Any = None, encoded: bool = True, steps: int = 6) -> Trainer:
        text = [f"model.text_channels={CHANNELS}", f"model.text_tokens={TOKENS}", "model.learn_variance=false"]
        text += [f"training.steps={steps}"]
        preset = load_preset("tiny", [*text, f"text.path={t5}", "training.learning_rate=3e-3", *overrides]).config
        accelerator = make_accelerator("cpu", preset.training.precision)
        assert preset.text is not None
        encoder = TextEncoder(preset.text, preset.model, CPU) if encoded else None
        return Trainer(preset, TrainingData(source or Shades(), Shrink(), encoder), backends["sdpa"], accelerator)

    return make


def losses(trainer: Trainer, steps: int = 4) -> list[float]:
    return [trainer.train_step().loss for _ in range(steps)]


def test_a_model_learns_to_follow_captions(make_trainer: Callable[..., Trainer]) -> None:
    settings = ("training.prefix_lengths=[0]", "training.batch_size=4", "training.text_dropout=0.2")
    trainer = make_trainer(*settings, "diffusion.prediction=flow", "diffusion.beta_schedule=flow")
    for _ in range(150):
        trainer.train_step()
    model, process, encoder = trainer.model.eval(), trainer.objective.process, trainer.batches.data.text_encoder
    assert encoder is not None

    def shade(caption: str, guidance: float) -> list[float]:
        text = model.unconditional_caption(2)
        assert text is not None
        noise = SeededNoise(1, [0, 1], (4, 4, 8, 8), CPU)
        context = make_context(model, "cached", 2 if guidance == 1 else 4)
        chunks = generate(
            context,
            process,
            make_sampler("ddim", process, 8),
            noise,
            1,
            caption=Caption(*encoder([caption, caption], text), guidance),
        )
        means: list[float] = next(chunks).latents.mean((1, 2, 3, 4)).tolist()
        return means

    for guidance in (1.0, 1.5):
        assert min(shade("a white square", guidance)) > 0.5 and max(shade("a black square", guidance)) < -0.5


def test_dropped_captions_are_not_learned_from(make_trainer: Callable[..., Trainer]) -> None:
    others = Shades(("black square moves", "white moves a"))  # of the same length
    for share, same in ((1.0, True), (0.0, False)):
        runs = [losses(make_trainer(f"training.text_dropout={share}", source=source)) for source in (None, others)]
        assert (runs[0] == runs[1]) is same
    nothing = Shades((None,))
    assert losses(make_trainer(source=nothing)) == losses(make_trainer(encoded=False))


def test_the_share_of_dropped_captions(make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[bool] = []

    class Watching:
        def __call__(
            self, captions: Sequence[str | None], stored: tuple[Tensor, Tensor], drop: Sequence[bool]
        ) -> tuple[Tensor, Tensor]:
            dropped.extend(drop)
            return stored

    trainer = make_trainer("training.batch_size=100", "training.text_dropout=0.3", "training.prefix_lengths=[0]")
    monkeypatch.setattr(trainer.batches.data, "text_encoder", Watching())
    losses(trainer, 3)
    assert len(dropped) == 300 and 60 < sum(dropped) < 120


def test_accumulation_does_not_change_the_losses(make_trainer: Callable[..., Trainer]) -> None:
    settings = ("training.batch_size=4", "training.text_dropout=0.5")
    whole, parts = (losses(make_trainer(*settings, f"training.accumulation={n}")) for n in (1, 4))
    assert whole == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("settings", [[], ["training.parallel_chunks=true", "training.rollout_share=1"]])
def test_a_resumed_run_reads_the_same_captions(
    settings: list[str], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    settings = [*settings, "training.prefix_lengths=[0]", "training.text_dropout=0.5", "training.rollout_steps=2"]
    expected = losses(make_trainer(*settings), 6)
    first = make_trainer(*settings)
    resumed = losses(first, 3)
    first.save(RunFolder(tmp_path))
    second = make_trainer(*settings)
    last, _ = RunFolder(tmp_path).newest()
    assert last is not None
    second.state.load(last)
    assert resumed + losses(second, 3) == expected


# ------------------------------------------------------------------------------------------------------- the commands
@pytest.fixture(scope="module")
def trained(t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captioned videos and a run trained on them, with cached latents and validation."""
    folder = tmp_path_factory.mktemp("text")
    lines = []
    for name, level in (("white", 230), ("black", 20)):
        with open_writer(folder / f"{name}.mkv", fps=8) as writer:
            for _ in range(14):
                writer.write(np.full((32, 32, 3), level, np.uint8))
        lines.append(json.dumps({"path": f"{name}.mkv", "text": f"a {name} square"}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    settings = [f"model.text_channels={CHANNELS}", f"model.text_tokens={TOKENS}", f"text.path={os.path.relpath(t5)}"]
    settings += ["training.learning_rate=0.03", "training.validate_every=3", "training.validation_clips=2"]
    settings += ["sampling.steps=3", "training.autoencoder_steps=2"]
    command = ["train", "--preset", "tiny", "--data", str(folder / "list.jsonl"), "--steps", "3", *RUN]
    command += ["--cache-latents", str(folder / "latents")]
    command += [part for setting in settings for part in ("--set", setting)]
    assert main([*command, "--out", str(folder / "run")]) == 0
    return folder


def sampled(trained: Path, out: Path, *arguments: str) -> np.ndarray:
    command = ["sample", "--preset", str(trained / "run"), *RUN, "--dtype", "float32", "--frames", "6", *arguments]
    assert main([*command, "--overwrite", "-o", str(out)]) == 0
    with open_reader(out) as reader:
        return np.stack(list(reader))


def test_prompt_and_guidance_change_the_video(trained: Path, tmp_path: Path) -> None:
    def video(*arguments: str) -> np.ndarray:
        return sampled(trained, tmp_path / "video.npz", *arguments)

    black = video("--prompt", "a black square")
    assert np.array_equal(black, video("--prompt", "a black square", "--guidance", "1"))
    assert not np.array_equal(black, video("--prompt", "a white square"))
    assert not np.array_equal(black, video("--prompt", "a black square", "--guidance", "4"))
    assert not np.array_equal(black, video())
    assert np.array_equal(video(), video("--prompt", " "))


def test_a_video_is_extended_with_a_prompt(trained: Path, tmp_path: Path) -> None:
    videos = []
    for prompt in ("black", "a white square"):
        out = tmp_path / f"{prompt}.npz"
        command = ["extend", str(trained / "white.mkv"), "--preset", str(trained / "run"), "--frames", "6", *RUN]
        assert main([*command, "--prompt", prompt, "--num-videos", "1", "--only-new", "-o", str(out)]) == 0
        with open_reader(out) as reader:
            videos.append(np.stack(list(reader)))
    black, white = videos
    assert len(black) == 6 and not np.array_equal(black, white)


def test_cached_and_recomputed_context_agree_on_a_prompt(trained: Path, tmp_path: Path) -> None:
    prompt = ["--prompt", "a black square", "--guidance", "2"]
    cached, again = (
        sampled(trained, tmp_path / f"{strategy}.npz", *prompt, "--strategy", strategy).astype(int)
        for strategy in ("cached", "recompute")
    )
    assert np.abs(cached - again).max() <= 1


def test_the_api_takes_a_prompt(trained: Path) -> None:
    pipeline = Pipeline.load(trained / "run", backend="eager", device="cpu", dtype="float32")
    both = next(pipeline.sample(4, prompt="a black square", videos=[0, 1])).frames
    alone = next(pipeline.sample(4, prompt="a black square", videos=[1])).frames
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--guidance", "2"], 2, "--guidance: there is no prompt to follow"),
        (["--prompt", "a", "--set", "text="], 2, "preset run: it names no text encoder"),
        (["--prompt", "a", "--set", "text.path=/nowhere"], 1, "text.path: no T5 encoder can be loaded from /nowhere"),
        (["--prompt", "a", "--guidance", "-1"], 2, "Invalid value for '--guidance'"),
    ],
)
def test_an_impossible_prompt_is_refused(
    arguments: list[str], code: int, expected: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--preset", str(trained / "run"), *RUN, *arguments, "-o", str(trained / "no.npz")]) == code
    line = capsys.readouterr().err
    assert line.startswith(f"error: {expected}") and line.count("\n") == 1
    assert not (trained / "no.npz").exists()


def test_a_prompt_for_a_model_without_text_is_refused() -> None:
    preset = load_preset("tiny")
    pipeline = Pipeline(preset, CausalVideoTransformer(preset.config.model, backends["eager"]), Shrink(), trained=True)
    with pytest.raises(UsageError, match="preset tiny: its model takes no text; leave out the prompt"):
        pipeline.sample(4, prompt="a square")


def test_a_run_finds_its_encoder_from_any_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path given was relative
    shutil.copytree(trained / "run", tmp_path / "run")
    assert main(["train", "--resume", "--out", "run", "--steps", "4", *RUN]) == 0
    lines = [json.loads(line) for line in Path("run/validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]


def test_captions_without_an_encoder_are_reported(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"model.text_channels={CHANNELS}", f"model.text_tokens={TOKENS}", "training.autoencoder_steps=1"]
    command = ["train", "--preset", "tiny", "--data", str(trained / "list.jsonl"), "--steps", "1", *RUN[:-1]]
    command += [part for setting in settings for part in ("--set", setting)]
    assert main([*command, "--out", str(trained / "without")]) == 0
    assert "the preset names no text encoder; they are not used" in capsys.readouterr().err
