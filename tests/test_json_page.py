"""docs/json.md has every key that --json prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_kit import GENERATE, ROOT, RUN, Report

PAGE = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
EAGER = [*RUN, "--steps", 1]


def documented(section: str) -> set[str]:
    """The keys in a section's tables, or after a line with the name of a command and its flag."""
    text = re.split(rf"^(?:## .*\b{section}\b.*|`{section}`:)$", PAGE, flags=re.MULTILINE)[1]
    rows = re.findall(r"^\| (`.*?) \|", re.split(r"^## ", text, flags=re.MULTILINE)[0], re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


@pytest.mark.usefixtures("in_an_empty_folder")
def test_keys_of_commands_that_generate(weights: Path, report: Report) -> None:
    printed = report("sample", "--preset", weights, *GENERATE, "--frames", 3)
    assert printed.keys() <= documented("sample")
    assert report("extend", printed["output"], "--preset", weights, *GENERATE, "--frames", 3).keys() == printed.keys()


@pytest.mark.usefixtures("in_an_empty_folder")
def test_keys_of_training(weights: Path, report: Report) -> None:
    trained = ["--preset", "tiny", "--steps", 1, "--set", "training.autoencoder_steps=1", "--out", "run"]
    assert report("train", *trained, *RUN, "--quiet").keys() <= documented("train")
    report("sample", "--preset", weights, *GENERATE, "--frames", 24, "-o", "videos/a.mp4")
    checked = report("train", "--preset", "tiny", "--data", "videos", "--check-data", "--quiet")
    assert checked.keys() <= documented("train --check-data")


def test_keys_of_the_others(report: Report) -> None:
    verified = report("verify", "--preset", "tiny", *EAGER)
    assert verified.keys() <= documented("verify")
    for key in verified["results"][0]:
        assert f"`{key}`" in PAGE
    assert report("plan", "--preset", "tiny", *EAGER, "--frames", 4).keys() <= documented("plan")
    listed = report("backends")
    for key in [*listed, *listed["backends"][0], *report("plugins")["plugins"][0], *report("presets")["tiny"]]:
        assert f"`{key}`" in PAGE


def test_keys_of_bench() -> None:
    keys = (ROOT / "tests" / "bench" / "report_keys.txt").read_text(encoding="utf-8").split()
    assert {re.split(r"[.\[]", key)[0] for key in keys} <= documented("bench")
