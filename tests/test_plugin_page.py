"""``docs/plugins.md``: every example is run exactly as it is on the page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_kit import ROOT, AddPlugin, Refused, Report, ca2vdm, clip, save

import ca2vdm_cli
from ca2vdm_cli.plugins import REGISTRIES, metrics

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
TINY = ["--preset", "tiny"]
OWNER = "plug-in 'example' of example"


def blocks(title: str, language: str) -> list[str]:
    """The code blocks of a section."""
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[title], re.DOTALL | re.MULTILINE)


@pytest.fixture
def videos(in_an_empty_folder: None) -> None:
    """The data set that the reader's example reads."""
    save("clip.mp4", clip(20, 48, 64))
    Path("clips.list").write_text("clip.mp4\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [registry.kind for registry in REGISTRIES])
def test_example_of_each_hook(kind: str, add_plugin: AddPlugin, report: Report, videos: None) -> None:
    add_plugin("example", *blocks(kind.title(), "python"))
    (entry,) = (entry for entry in report("plugins")["plugins"] if entry["registered_by"] == OWNER)
    assert entry["kind"] == kind
    (commands,) = blocks(kind.title(), "bash")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "ca2vdm"
        assert ca2vdm(*arguments) == 0, line


def test_the_metric_measures(add_plugin: AddPlugin) -> None:
    add_plugin("example", *blocks("Metric", "python"))
    frames = np.zeros((2, 4, 4, 1), np.uint8)
    assert metrics["mae"].measure(frames + 3, frames) == 3


def test_the_reader_reads(add_plugin: AddPlugin, report: Report, videos: None) -> None:
    add_plugin("example", *blocks("Reader", "python"))
    result = report("train", "--preset", "tiny", "--data", "clips.list", "--check-data")
    assert (result["format"], result["videos"]) == ("list", 1)


@pytest.mark.parametrize(
    ("kind", "method", "command"),
    [
        ("backend", "attend", "sample --backend example"),
        ("sampler", "step", "sample --sampler quadratic"),
        ("context", "append", "sample --strategy rounded"),
        ("autoencoder", "decode", "sample --set autoencoder.kind=pooling --set autoencoder_weights=null"),
        ("reader", "recognizes", "train --data clips.list"),
        ("reader", "read", "train --data clips.list"),
    ],
)
def test_an_example_that_fails_while_it_runs_is_named(
    kind: str, method: str, command: str, add_plugin: AddPlugin, refused: Refused, weights: Path, videos: None
) -> None:
    (source,) = blocks(kind.title(), "python")
    broken, count = re.subn(rf"(\n    def {method}\(.*\n)", r"\1        1 / 0\n", source)
    assert count == 1
    add_plugin("example", broken)
    options = ["--preset", weights, "--steps", 3, "-o", "out.npz", "--overwrite"] if "sample" in command else TINY
    line = refused(1, *command.split(), *options)
    assert line == f"error: {OWNER} failed: ZeroDivisionError: division by zero; fix or uninstall it"
    with pytest.raises(ZeroDivisionError):
        ca2vdm(*command.split(), *options, "--debug")


def test_the_packaging_section_is_the_installed_example() -> None:
    example = ROOT / "tests" / "plugin_example"
    assert blocks("Packaging", "toml") == [(example / "pyproject.toml").read_text(encoding="utf-8")]
    assert (example / "ca2vdm_example.py").read_text(encoding="utf-8").endswith("\n" + blocks("Backend", "python")[0])


@pytest.fixture
def without_the_sampler() -> Iterator[None]:
    yield
    ca2vdm_cli.samplers.unregister("negative")


def test_registering_from_python(capsys: pytest.CaptureFixture[str], without_the_sampler: None) -> None:
    (source,) = blocks("Registering from Python", "python")
    exec(compile(source, "docs/plugins.md", "exec"), {"__name__": "notebook"})
    assert capsys.readouterr().out.splitlines()[0].startswith("(1, ")
    assert ca2vdm_cli.samplers.owner("negative") == "Python code"


def test_the_table_has_every_hook() -> None:
    assert re.findall(r"^\| `(ca2vdm_register_\w+)`", PAGE, re.MULTILINE) == [registry.hook for registry in REGISTRIES]
