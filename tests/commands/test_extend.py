"""``ca2vdm extend``."""

from __future__ import annotations

import io
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from command_kit import (
    GENERATE,
    RUN,
    WINDOW,
    Make,
    Refused,
    apart,
    ca2vdm,
    clip,
    load,
    save,
)

from ca2vdm_cli.commands import generation
from ca2vdm_cli.video_io import Frame, open_reader, to_channels, write_image

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.mark.parametrize(("given", "new"), [(20, 6), (13, 4), (WINDOW, 1), (7, 5), (1, 9)])
def test_extended_video_begins_with_the_input(make: Make, given: int, new: int) -> None:
    source = save("given.npz", clip(given))
    video = make("extend", "given.npz", "--frames", new)
    assert len(video) == given + new
    assert max(apart(video[:given], source)) == 0
    only_new = make("extend", "given.npz", "--frames", new, "--only-new")
    assert max(apart(only_new, video[given:])) == 0


def test_only_the_last_window_of_the_input_matters(make: Make) -> None:
    frames = clip(30)
    save("long.npz", frames)
    save("tail.npz", frames[-WINDOW:])
    save("other.npz", frames[:WINDOW])
    request = ["--frames", 6, "--only-new"]
    new = make("extend", "long.npz", *request)
    assert max(apart(new, make("extend", "tail.npz", *request))) == 0
    assert max(apart(new, make("extend", "other.npz", *request))) > 1


def test_extending_depends_on_the_seed_only(make: Make, weights: Path) -> None:
    save("given.npz", clip(5))
    new = make("extend", "given.npz", "--frames", 10, "--only-new")
    assert max(apart(new[:5], make("extend", "given.npz", "--frames", 5, "--only-new"))) == 0
    assert max(apart(new, make("extend", "given.npz", "--frames", 10, "--only-new", "--seed", 1))) > 20
    request = ["extend", "given.npz", "--preset", weights, *GENERATE, "--frames", 10, "-q", "--num-videos", 2]
    assert ca2vdm(*request, "-o", "two.npz") == 0
    two = [load(f"two-{k:02}.npz") for k in range(2)]
    assert max(apart(two[0][5:], new)) <= 1
    assert max(apart(two[0][:5], two[1][:5])) == 0
    assert max(apart(two[0][5:], two[1][5:])) > 20


@pytest.mark.parametrize("target", ["given.mp4", "given/"])
@pytest.mark.parametrize("wrong", [["--sampler", "nope"], ["--context-frames", 100], ["--steps", 2000]])
def test_a_wrong_request_leaves_the_input_alone(
    refused: Refused, weights: Path, target: str, wrong: list[object]
) -> None:
    save(target, clip(12))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    refused(2, "extend", target, "--preset", weights, *RUN, "--overwrite", "-o", target, *wrong)
    refused(2, "extend", target, "--preset", weights, *RUN, "-o", "new.mp4", *wrong)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("target", ["given.mp4", "given/", "given.npz", "new.mp4", "new/"])
def test_an_interrupt_before_any_new_frame_leaves_no_trace(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    source = target if target.startswith("given") else "given.mp4"
    save(source, clip(12))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    calls = iter(range(100))

    def interrupted(frame: np.ndarray, channels: int) -> Frame:
        if next(calls) == 8:
            raise KeyboardInterrupt
        return to_channels(frame, channels)

    monkeypatch.setattr(generation, "to_channels", interrupted)
    assert ca2vdm("extend", source, "--preset", weights, *GENERATE, "--overwrite", "-o", target) == 130
    assert capsys.readouterr().err == "interrupted: no new frame was generated\n"
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert not list(Path().rglob("*.partial*"))


def test_a_truncated_video_is_reported(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("whole.mp4", clip(200, 64, 64))
    Path("half.mp4").write_bytes(Path("whole.mp4").read_bytes()[: Path("whole.mp4").stat().st_size * 3 // 4])
    assert ca2vdm("extend", "half.mp4", "--preset", weights, *GENERATE, "--frames", 2, "-o", "out.npz") == 0
    match = re.search(r"half.mp4: (\d+) of 200 frames could be read", capsys.readouterr().err)
    assert match and 0 < int(match[1]) < 196


@pytest.mark.parametrize(
    ("aspect", "size", "expected"),
    [
        (None, None, (40, 60)),
        ("crop", None, (40, 40)),
        ("pad", None, (40, 60)),
        ("stretch", None, (40, 60)),
        ("crop", "48x64", (64, 48)),
        ("pad", "48x64", (64, 48)),
        ("stretch", "48x64", (64, 48)),
        ("crop", "model", (32, 32)),
        ("pad", "model", (32, 32)),
    ],
)
def test_size(make: Make, aspect: str | None, size: str | None, expected: tuple[int, int]) -> None:
    save("given.npz", clip(3, 40, 60))
    options = [*(["--aspect", aspect] if aspect else []), *(["--size", size] if size else [])]
    video = make("extend", "given.npz", "--frames", 2, *options)
    assert len(video) == 5
    assert {frame.shape for frame in video} == {(*expected, 3)}
    if aspect == "pad":  # bars only in frames of the model's own size
        assert (video[0][:4].max() == 0) == (size == "model")


@pytest.mark.parametrize("size", ["48", "0x10", "48x", "-4x8", "models"])
def test_wrong_size(weights: Path, refused: Refused, size: str) -> None:
    save("given.npz", clip(1))
    assert "must be WIDTHxHEIGHT" in refused(2, "extend", "given.npz", "--preset", weights, "--size", size)


def test_input_keeps_its_rate(make: Make) -> None:
    source = save("given.mp4", clip(6), fps=12.5)
    video = make("extend", "given.mp4", "--frames", 4, out="out.mp4")
    with open_reader("out.mp4") as reader:
        assert reader.fps == Fraction(25, 2)
    assert max(apart(video[:6], source)) < 90  # encoded twice by a lossy codec
    make("extend", "given.mp4", "--frames", 4, "--fps", 5, out="out.mp4")
    with open_reader("out.mp4") as reader:
        assert reader.fps == 5


def test_extending_an_image(make: Make) -> None:
    write_image("given.png", clip(1)[0])
    video = make("extend", "given.png", "--frames", 7, out="out.mp4")
    assert len(video) == 8
    with open_reader("out.mp4") as reader:
        assert reader.fps == 8  # the preset's


def test_extending_standard_input(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    save("given.y4m", clip(5), fps=10)
    with open("given.y4m", "rb") as file, io.TextIOWrapper(file) as text:
        monkeypatch.setattr(sys, "stdin", text)
        piped = make("extend", "-", "--frames", 3)
    assert max(apart(piped, make("extend", "given.y4m", "--frames", 3))) == 0


def test_default_name_of_an_extended_video(weights: Path) -> None:
    save("given.npz", clip(2))
    assert ca2vdm("extend", "given.npz", "--preset", weights, *GENERATE, "--frames", 2, "-q") == 0
    assert len(load("given-extended.mp4")) == 4


def test_a_video_can_be_extended_in_place(make: Make) -> None:
    source = save("given.npz", clip(5))
    video = make("extend", "given.npz", "--frames", 3, out="given.npz")
    assert len(video) == 8
    assert max(apart(video[:5], source)) == 0


def test_unreadable_input(weights: Path, refused: Refused) -> None:
    Path("given.mp4").write_text("not a video at all")
    line = refused(1, "extend", "given.mp4", "--preset", weights, *GENERATE, "-o", "out.mp4")
    assert line.startswith("error: given.mp4: cannot be read")
    assert not Path("out.mp4").exists()
