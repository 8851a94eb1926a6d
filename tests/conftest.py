"""Fixtures: small models, and helpers for the commands' tests.

All weights of ``make_model`` are random. In a newly built model the added branches and the last layer are zero, so a
test would pass no matter what these branches compute.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each: the tests already run on all CPUs; set before PyTorch loads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from command_kit import GENERATE, RUN, AddPlugin, Make, Refused, Report, ca2vdm, load

from ca2vdm_cli import plugins
from ca2vdm_cli.config import ModelConfig
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.video_io import Frame


def pytest_configure() -> None:
    """Reset the ignored signals that the suite inherits if it is started in the background of a script, or under nohup.

    Child processes would inherit them, so tests that interrupt a child would wait forever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # children don't ignore it; the suite still does


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long run of hostile input, unless its marker is asked for."""
    if "fuzz" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("fuzz")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Each test begins with the same signal handlers, whatever commands ran before it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    """``make_config(depth=1, ...)``: a window of 6, chunks of 2, and a longer spatial prefix of 3 frames."""

    def make(**changes: Any) -> ModelConfig:
        settings: dict[str, Any] = {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "latent_height": 4,
            "latent_width": 4,
            "context_frames": 6,
            "chunk_frames": 2,
            "spatial_prefix_frames": 3,
        }
        return ModelConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., ModelConfig]) -> Callable[..., CausalVideoTransformer]:
    """``make_model(depth=1, ...)``: a model with ``make_config``'s configuration and random weights."""

    def make(backend: str = "eager", **changes: Any) -> CausalVideoTransformer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = CausalVideoTransformer(make_config(**changes), plugins.backends[backend])
            randomize(model)
        return model.eval().requires_grad_(False)

    return make


WORDS = ("<pad>", "</s>", "<unk>", "a", "black", "white", "square", "moves")
TEXT_CHANNELS, TEXT_TOKENS = 16, 6


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny T5 encoder (random weights) and a tokenizer for ``WORDS``, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    sizes = {"d_model": TEXT_CHANNELS, "d_kv": 4, "num_heads": 4, "num_layers": 2, "d_ff": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(T5Config(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny preset after three steps, large enough that its output depends on the context."""
    folder = tmp_path_factory.mktemp("trained") / "weights"
    settings = ["--set", "training.learning_rate=0.03", "--set", "training.autoencoder_steps=2"]
    assert ca2vdm("train", "--preset", "tiny", "--steps", 3, "--out", folder, "--quiet", *RUN, *settings) == 0
    return folder


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(weights: Path) -> Make:
    """``make("sample", ...)``: runs the command and returns the frames that it wrote, losslessly."""

    def make(command: str, *arguments: object, out: str = "out.npz") -> list[Frame]:
        assert ca2vdm(command, *arguments, "--preset", weights, *GENERATE, "-q", "--overwrite", "-o", out) == 0
        return load(out)

    return make


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """``refused(code, "sample", ...)``: the error line of a command that must fail with this exit code."""

    def refused(code: int, *arguments: object) -> str:
        assert ca2vdm(*arguments) == code
        out, line = capsys.readouterr()
        assert out == ""
        assert line.startswith("error: ")
        assert line.index("\n") == len(line) - 1
        return line.rstrip("\n")

    return refused


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """``report("bench", ...)``: the object that the command prints with ``--json``."""

    def report(*arguments: object, code: int = 0) -> Any:
        assert ca2vdm(*arguments, "--json") == code
        return json.loads(capsys.readouterr().out)

    return report


@pytest.fixture
def fresh_plugins() -> Iterator[None]:
    """Look for plug-ins again, both now and after the test."""
    plugins.forget_plugins()
    yield
    plugins.forget_plugins()


@pytest.fixture
def add_plugin(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, fresh_plugins: None
) -> AddPlugin:
    """``add_plugin(name, source)``: installs a plug-in with this module, as pip would."""
    folder = tmp_path_factory.mktemp("site-packages")
    monkeypatch.syspath_prepend(folder)

    def add(name: str, source: str) -> None:
        (folder / f"{name}_module.py").write_text(source, encoding="utf-8")
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ca2vdm]\n{name} = {name}_module\n")
        monkeypatch.delitem(sys.modules, f"{name}_module", raising=False)
        importlib.invalidate_caches()

    return add


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 32
        parameter.normal_(std=fan_in**-0.5)
