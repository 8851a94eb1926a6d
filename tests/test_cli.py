"""The commands, as a user gives them: what they write, what they say, and how they end."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ca2vdm_cli import __version__
from ca2vdm_cli.__main__ import main
from ca2vdm_cli.attention import Backend
from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.commands import generate
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.frame_plan import FramePlan
from ca2vdm_cli.kv_cache import KVCache
from ca2vdm_cli.plugins import backends
from ca2vdm_cli.presets import load_preset
from ca2vdm_cli.run_folder import STATE_FILE, WEIGHTS_FILE, RunFolder
from ca2vdm_cli.trainer import Trainer
from ca2vdm_cli.video_io import Aspect, Frame, Geometry, VideoWriter, open_reader, open_writer, to_channels, write_image

GOLDEN = Path(__file__).parent / "golden" / "cyclic_prev2.safetensors"
COMMANDS = ["sample", "extend", "train", "bench", "plan", "verify", "import", "backends", "presets", "presets show"]
RUN = ["--device", "cpu", "--backend", "eager"]
GENERATE = [*RUN, "--dtype", "float32", "--steps", 3]
WINDOW, CHUNK = 9, 4  # of the tiny preset


def ca2vdm(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset after three steps, large ones, so that what it makes depends on the context."""
    folder = tmp_path_factory.mktemp("trained") / "weights"
    settings = ["--set", "training.learning_rate=0.03", "--set", "training.autoencoder_steps=2"]
    assert ca2vdm("train", "--preset", "tiny", "--steps", 3, "--out", folder, "--quiet", *RUN, *settings) == 0
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(weights: Path) -> Callable[..., list[Frame]]:
    """``make("sample", ...)``: the frames that the command writes, exactly."""

    def make(command: str, *arguments: object, out: str = "out.npz") -> list[Frame]:
        assert ca2vdm(command, *arguments, "--preset", weights, *GENERATE, "-q", "--overwrite", "-o", out) == 0
        return load(out)

    return make


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(code, "sample", ...)``: the one line on standard error with which the command ends."""

    def refused(code: int, *arguments: object) -> str:
        assert ca2vdm(*arguments) == code
        out, line = capsys.readouterr()
        assert out == ""
        assert line.startswith("error: ")
        assert line.index("\n") == len(line) - 1
        return line.rstrip("\n")

    return refused


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``report("bench", ...)``: the object that ``--json`` prints."""

    def report(*arguments: object, code: int = 0) -> Any:
        assert ca2vdm(*arguments, "--json") == code
        return json.loads(capsys.readouterr().out)

    return report


def load(path: str | Path) -> list[Frame]:
    with open_reader(path) as reader:
        return list(reader)


def save(path: str | Path, frames: list[Frame], fps: float = 8) -> list[Frame]:
    with open_writer(path, fps=fps) as writer:
        for frame in frames:
            writer.write(frame)
    return frames


def clip(count: int, height: int = 32, width: int = 32) -> list[Frame]:
    """Stripes that drift, in colour; every frame is different."""
    y, x = np.mgrid[0:height, 0:width]
    return [
        np.stack([128 + 100 * np.sin((x + 2 * y + 3 * i) / 7), 4 * y + i, 255 - 3 * x], -1)
        .clip(0, 255)
        .astype(np.uint8)
        for i in range(count)
    ]


def gray(frames: list[Frame]) -> list[Frame]:
    """What a gray model sees of a clip, as the RGB that it writes."""
    return [to_channels(to_channels(frame, 1), 3) for frame in frames]


def apart(frames: list[Frame], others: list[Frame]) -> list[int]:
    """Of every frame, by how many levels the pixel differs that differs most."""
    pairs = zip(frames, others, strict=True)
    return [int(np.abs(frame.astype(int) - other).max()) for frame, other in pairs]


# --- sample -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 7, 10])
@pytest.mark.parametrize("out", ["out.mp4", "out.mkv", "out.gif", "out.y4m", "out.npz", "out/"])
def test_sample_writes_the_number_of_frames_asked_for(make: Callable[..., list[Frame]], frames: int, out: str) -> None:
    video = make("sample", "--frames", frames, out=out)
    assert len(video) == frames
    assert video[0].shape == (32, 32, 3)


def test_format_overrules_the_suffix(make: Callable[..., list[Frame]]) -> None:
    assert len(make("sample", "--frames", 5, "--format", "mkv", out="video.bin")) == 5
    assert Path("video.bin").read_bytes()[:4] == b"\x1aE\xdf\xa3"  # EBML


def test_output_takes_a_free_name(weights: Path) -> None:
    for _ in range(2):
        assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 2, "-q") == 0
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 2, "-q", "--format", "png") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["sample", "sample-1.mp4", "sample.mp4"]


def test_output_is_replaced_only_when_asked(weights: Path, refused: Callable[..., str]) -> None:
    Path("out.npz").write_text("precious")
    request = ["sample", "--preset", weights, *GENERATE, "--frames", 2, "-o", "out.npz"]
    assert "out.npz: exists already" in refused(2, *request)
    assert Path("out.npz").read_text() == "precious"
    assert ca2vdm(*request, "--overwrite", "-q") == 0
    assert len(load("out.npz")) == 2


def test_seed_decides(make: Callable[..., list[Frame]]) -> None:
    first = make("sample", "--frames", 6)
    one = Path("out.npz").read_bytes()
    make("sample", "--frames", 6)
    assert Path("out.npz").read_bytes() == one
    assert max(apart(make("sample", "--frames", 6, "--seed", 1), first)) > 20


def test_length_does_not_matter_to_what_comes_first(make: Callable[..., list[Frame]]) -> None:
    assert max(apart(make("sample", "--frames", 12)[:5], make("sample", "--frames", 5))) == 0


def test_videos_do_not_depend_on_each_other(
    make: Callable[..., list[Frame]], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make("sample", "--frames", 6)
    monkeypatch.setattr(generate, "BATCH", 2)
    request = ["sample", "--preset", weights, *GENERATE, "--frames", 6, "-q", "--num-videos"]
    assert ca2vdm(*request, 3, "-o", "three.npz") == 0
    three = [load(f"three-{k:02}.npz") for k in range(3)]
    assert max(apart(three[0], alone)) <= 1  # another batch size rounds differently
    assert max(apart(three[1], alone)) > 20
    monkeypatch.setattr(generate, "BATCH", 3)
    assert ca2vdm(*request, 3, "-o", "folder/") == 0
    for k in range(3):
        assert max(apart(three[k], load(f"folder/{k:02}"))) <= 1


def test_recomputing_gives_the_same_until_the_window_slides(make: Callable[..., list[Frame]]) -> None:
    frames = make("sample", "--frames", 16)
    difference = apart(frames, make("sample", "--frames", 16, "--strategy", "recompute"))
    assert max(difference[:12]) <= 1  # the chunk that begins at frame 8 still sees all of them
    assert max(difference[12:]) > 1  # a cached frame remembers, a recomputed one has forgotten


def test_context_frames(make: Callable[..., list[Frame]], weights: Path, refused: Callable[..., str]) -> None:
    full, short = make("sample", "--frames", 12), make("sample", "--frames", 12, "--context-frames", 4)
    assert max(apart(full[:8], short[:8])) <= 1
    assert max(apart(full[8:], short[8:])) > 1
    line = refused(2, "sample", "--preset", weights, *GENERATE, "--context-frames", WINDOW + 1)
    assert f"{WINDOW + 1} is more than the {WINDOW}" in line


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_samplers(make: Callable[..., list[Frame]], sampler: str) -> None:
    assert max(apart(make("sample", "--frames", 4, "--sampler", sampler), make("sample", "--frames", 4))) > 1


@pytest.mark.parametrize("options", [["--fps", 12], ["--set", "video.fps=12"]])
def test_frame_rate(make: Callable[..., list[Frame]], options: list[object]) -> None:
    make("sample", "--frames", 3, *options, out="out.mp4")
    with open_reader("out.mp4") as reader:
        assert reader.fps == 12


@pytest.mark.parametrize("kind", ["image", "video"])
def test_first_frame_comes_first(make: Callable[..., list[Frame]], kind: str) -> None:
    given = clip(3, 32, 48)
    if kind == "image":
        write_image("given.png", given[0])
    else:
        save("given.npz", given)
    source = "given.png" if kind == "image" else "given.npz"
    video = make("sample", "--frames", 6, "--first-frame", source)
    assert len(video) == 6
    whole = [Geometry((32, 48), (32, 32), Aspect.STRETCH).to_model(given[0])]
    assert apart(video[:1], gray(whole)) == [0]
    assert max(apart(video[1:], make("sample", "--frames", 6)[1:])) > 1
    assert len(make("sample", "--frames", 1, "--first-frame", source)) == 1
    assert len(make("sample", "--frames", 5, "--first-frame", source)) == 5


def test_first_frame_is_asked_for_where_the_weights_need_one(
    make: Callable[..., list[Frame]], weights: Path, refused: Callable[..., str]
) -> None:
    needs_one = ["--set", "diffusion.unconditional_start=false"]
    assert "give --first-frame IMAGE" in refused(2, "sample", "--preset", weights, *GENERATE, *needs_one)
    write_image("given.png", clip(1)[0])
    assert len(make("sample", "--frames", 5, "--first-frame", "given.png", *needs_one)) == 5


def test_report_as_json(report: Callable[..., Any], weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = report("sample", "--preset", weights, *GENERATE, "--frames", 10, "-o", "out.mp4")
    assert result["frames"] == len(load("out.mp4")) == 10
    assert result["output"] == "out.mp4"
    assert 0 < result["first_chunk_seconds"] <= result["seconds"]
    assert result["frames_per_second"] == pytest.approx(10 / result["seconds"])
    parts = ("input", "denoise", "cache_write", "decode", "encode", "output", "startup")
    assert sum(result[f"{part}_seconds"] for part in parts) == pytest.approx(result["seconds"])
    files = [weights / WEIGHTS_FILE, weights / "autoencoder.safetensors"]
    numbers = sum(t.numel() for file in files for t in load_tensors(file)[0].values())
    assert result["weights_bytes"] == pytest.approx(4 * numbers, rel=1e-3)
    # depth, keys and values, frames of the ring and of the spatial prefix, tokens, width, float32
    assert result["cache_bytes"] == 2 * 2 * (WINDOW + CHUNK + 3) * 16 * 48 * 4
    assert result["peak_memory_bytes"] > result["weights_bytes"] + result["cache_bytes"]
    assert (result["backend"], result["dtype"], result["steps"]) == ("eager", "float32", 3)

    several = report("sample", "--preset", weights, *GENERATE, "--frames", 2, "--num-videos", 2, "-o", "two.npz")
    assert several["output"] == ["two-00.npz", "two-01.npz"]
    assert several["cache_bytes"] == 2 * result["cache_bytes"]
    assert capsys.readouterr().err == ""


def test_report_for_people(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 10, "-o", "out.mp4") == 0
    out, text = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in text
    for words in ("10 frames", "frames/s", "→ out.mp4", "weights", "cache", "peak", "denoise", "cache write", "decode"):
        assert words in text


def test_quiet_says_nothing(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 2, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("option", [["--json"], ["--num-videos", 2]])
def test_standard_output_holds_one_video(weights: Path, refused: Callable[..., str], option: list[object]) -> None:
    line = refused(2, "sample", "--preset", weights, *GENERATE, "-o", "-", *option)
    assert f"leave out {option[0]}" in line


def test_a_terminal_is_no_place_for_a_video(
    weights: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "standard output is a terminal" in refused(2, "sample", "--preset", weights, *GENERATE, "-o", "-")


def test_interrupted_run_keeps_its_finished_frames(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = VideoWriter.write

    def interrupt(writer: VideoWriter, frame: Frame) -> None:
        if writer.frames == 6:
            raise KeyboardInterrupt
        write(writer, frame)

    monkeypatch.setattr(VideoWriter, "write", interrupt)
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 12, "-o", "out.mp4") == 130
    assert capsys.readouterr() == ("", "interrupted: 6 new frames are in out.mp4\n")
    assert len(load("out.mp4")) == 6


@pytest.mark.parametrize("command", ["sample", "train"])
def test_on_a_terminal_the_last_words_stay(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The progress bar is wiped away when it ends, and must not take with it what is said about the interruption."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_step", interrupt)
    monkeypatch.setattr(VideoWriter, "write", interrupt)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    options = GENERATE if command == "sample" else RUN
    source = ["--preset", weights] if command == "sample" else ["--checkpoint", weights, "--out", "run"]
    assert ca2vdm(command, *source, *options) == 130
    text = capsys.readouterr().err
    assert "sampling" in text or "training" in text
    bar, words, end = text.rpartition("interrupted")
    assert "\x1b[2K" in bar  # erase the line
    assert words
    assert "\x1b" not in end


# --- what is wrong with a request -------------------------------------------------------------------------------------

WRONG: list[tuple[list[object], str]] = [
    (["sample", "--preset", "nope"], "preset 'nope' is neither built in nor a file"),
    (["sample", "--preset", "tiny"], "preset tiny: it has no weights"),
    (["sample", "--preset", "bench-small"], "preset bench-small: it has no weights"),
    (["sample", "--checkpoint", "nope.safetensors"], "nope.safetensors: no such file"),
    (["sample", "--checkpoint", "."], "a folder without preset.yaml"),
    (["sample", "--preset", "W", "--backend", "nope"], "no backend 'nope'; known: auto, eager"),
    (["sample", "--preset", "W", "--device", "warp"], "--device warp: not available here"),
    (["sample", "--preset", "W", "--dtype", "int4"], "'int4' is not one of"),
    (["sample", "--preset", "W", "--format", "avi"], "cannot be written as 'avi'; use mp4"),
    (["sample", "--preset", "W", "-o", "out.avi"], "out.avi: cannot be written as 'avi'; use mp4"),
    (["sample", "--preset", "W", "-o", "-", "--format", "gif"], "cannot be written as 'gif'; use y4m, mkv"),
    (["sample", "--preset", "W", "--set", "model.dept=3"], "did you mean model.depth?"),
    (["sample", "--preset", "W", "--set", "model.depth=x"], "model.depth"),
    (["sample", "--preset", "W", "--set", "model.depth"], "needs a key and a value"),
    (["sample", "--preset", "W", "--steps", 5000], "steps: 5000 must be from 1 to 1000"),
    (
        ["sample", "--preset", "W", "--seed", 2**63],
        "--seed': Input should be less than or equal to 9223372036854775807",
    ),
    (["sample", "--preset", "W", "--frames", 0], "'--frames'"),
    (["sample", "--preset", "W", "--frames", "many"], "'--frames'"),
    (["sample", "--preset", "W", "--fps", 0], "0.0 is not a frame rate"),
    (["sample", "--preset", "W", "--first-frame", "nope.png"], "nope.png: no such file"),
    (["sample", "--framse", 3], "--framse"),
    (["sampel"], "sampel"),
    (["extend"], "INPUT"),
    (["extend", "nope.mp4", "--preset", "W"], "nope.mp4: no such file"),
    (["train", "--preset", "bench-small"], "works on latents only"),
    (["train", "--preset", "tiny", "--data", "nope"], "nope: no such file or folder"),
    (["train", "--preset", "ca2-vdm-base"], "name a folder of videos with --data"),
    (["train", "--preset", "tiny", "--resume"], "nothing to resume"),
    (["verify", "--recorded", "x.safetensors", "--preset", "tiny"], "leave out --preset"),
    (["import", "x.pt", "--preset", "tiny", "-o", "x.pt"], "must end in .safetensors"),
    (["presets", "show", "nope"], "preset 'nope'"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG, ids=lambda value: " ".join(map(str, value))[:60])
def test_wrong_request(weights: Path, refused: Callable[..., str], arguments: list[object], expected: str) -> None:
    assert expected in refused(2, *(weights if argument == "W" else argument for argument in arguments))
    assert list(Path().iterdir()) == []  # and it has left nothing behind


@pytest.mark.parametrize(
    ("diffusers", "expected"),
    [(None, "pip install 'ca2vdm[latent]'"), (SimpleNamespace(nope=3), "nor a scheduler of diffusers")],
)
def test_unknown_sampler(
    weights: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, diffusers: object, expected: str
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    line = refused(2, "sample", "--preset", weights, *GENERATE, "--sampler", "nope")
    assert "'nope' is none of ancestral, ddim, dpm++" in line
    assert expected in line


def test_debug_shows_where() -> None:
    with pytest.raises(UsageError, match="nope"):
        ca2vdm("sample", "--preset", "nope", "--debug")
    with pytest.raises(UsageError, match="--framse"):
        ca2vdm("--debug", "sample", "--framse")


def test_fault_of_the_program_is_one_line_too(
    weights: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(KVCache, "plan", broken)
    line = refused(1, "sample", "--preset", weights, *GENERATE, "-o", "out.mp4")
    assert "ZeroDivisionError: one two" in line
    assert "--debug" in line
    with pytest.raises(ZeroDivisionError):
        ca2vdm("sample", "--preset", weights, *GENERATE, "-o", "out.mp4", "--debug")
    assert not Path("out.mp4").exists()


def test_overflow_is_not_written(weights: Path, refused: Callable[..., str]) -> None:
    tensors, metadata = load_tensors(weights / WEIGHTS_FILE)
    broken = {key: value * 1e30 for key, value in tensors.items()}
    save_tensors(Path("broken.safetensors"), broken, metadata)
    request = ["--preset", weights, *GENERATE, "--checkpoint", "broken.safetensors"]
    line = refused(1, "sample", *request, "-o", "out.mp4")
    assert "frame 0: the model's output is not finite in float32" in line
    assert not Path("out.mp4").exists()
    assert refused(1, "bench", *request) == refused(1, "verify", *request) == line


# --- extend -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "new"), [(20, 6), (13, 4), (WINDOW, 1), (7, 5), (1, 9)])
def test_extended_video_begins_with_the_input(make: Callable[..., list[Frame]], given: int, new: int) -> None:
    source = save("given.npz", clip(given))
    video = make("extend", "given.npz", "--frames", new)
    assert len(video) == given + new
    assert max(apart(video[:given], source)) == 0
    only_new = make("extend", "given.npz", "--frames", new, "--only-new")
    assert max(apart(only_new, video[given:])) == 0


def test_only_the_window_counts(make: Callable[..., list[Frame]]) -> None:
    frames = clip(30)
    save("long.npz", frames)
    save("tail.npz", frames[-WINDOW:])
    save("other.npz", frames[:WINDOW])
    request = ["--frames", 6, "--only-new"]
    new = make("extend", "long.npz", *request)
    assert max(apart(new, make("extend", "tail.npz", *request))) == 0
    assert max(apart(new, make("extend", "other.npz", *request))) > 1


def test_extending_depends_on_the_seed_only(make: Callable[..., list[Frame]], weights: Path) -> None:
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
def test_a_refused_request_leaves_the_input_alone(
    refused: Callable[..., str], weights: Path, target: str, wrong: list[object]
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

    monkeypatch.setattr(generate, "to_channels", interrupted)
    assert ca2vdm("extend", source, "--preset", weights, *GENERATE, "--overwrite", "-o", target) == 130
    assert capsys.readouterr().err == "interrupted: before any new frame was made\n"
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert not list(Path().rglob("*.part"))


def test_a_video_that_breaks_off_is_said_to(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("whole.mp4", clip(200, 64, 64))
    Path("half.mp4").write_bytes(Path("whole.mp4").read_bytes()[: Path("whole.mp4").stat().st_size * 3 // 4])
    assert ca2vdm("extend", "half.mp4", "--preset", weights, *GENERATE, "--frames", 2, "-o", "out.npz") == 0
    found = re.search(r"half.mp4: (\d+) of 200 frames could be read", capsys.readouterr().err)
    assert found and 0 < int(found[1]) < 196


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
def test_size(
    make: Callable[..., list[Frame]], aspect: str | None, size: str | None, expected: tuple[int, int]
) -> None:
    save("given.npz", clip(3, 40, 60))
    options = [*(["--aspect", aspect] if aspect else []), *(["--size", size] if size else [])]
    video = make("extend", "given.npz", "--frames", 2, *options)
    assert len(video) == 5
    assert {frame.shape for frame in video} == {(*expected, 3)}
    if aspect == "pad":  # bars only where the model's own frames are asked for
        assert (video[0][:4].max() == 0) == (size == "model")


@pytest.mark.parametrize("size", ["48", "0x10", "48x", "-4x8", "models"])
def test_wrong_size(weights: Path, refused: Callable[..., str], size: str) -> None:
    save("given.npz", clip(1))
    assert "must be WIDTHxHEIGHT" in refused(2, "extend", "given.npz", "--preset", weights, "--size", size)


def test_input_keeps_its_rate(make: Callable[..., list[Frame]]) -> None:
    source = save("given.mp4", clip(6), fps=12.5)
    video = make("extend", "given.mp4", "--frames", 4, out="out.mp4")
    with open_reader("out.mp4") as reader:
        assert reader.fps == Fraction(25, 2)
    assert max(apart(video[:6], source)) < 90  # twice through a lossy codec
    make("extend", "given.mp4", "--frames", 4, "--fps", 5, out="out.mp4")
    with open_reader("out.mp4") as reader:
        assert reader.fps == 5


def test_extending_an_image(make: Callable[..., list[Frame]]) -> None:
    write_image("given.png", clip(1)[0])
    video = make("extend", "given.png", "--frames", 7, out="out.mp4")
    assert len(video) == 8
    with open_reader("out.mp4") as reader:
        assert reader.fps == 8  # the preset's


def test_extending_standard_input(make: Callable[..., list[Frame]], monkeypatch: pytest.MonkeyPatch) -> None:
    save("given.y4m", clip(5), fps=10)
    with open("given.y4m", "rb") as file, io.TextIOWrapper(file) as text:
        monkeypatch.setattr(sys, "stdin", text)
        piped = make("extend", "-", "--frames", 3)
    assert max(apart(piped, make("extend", "given.y4m", "--frames", 3))) == 0


def test_extended_video_has_a_name_of_its_own(weights: Path) -> None:
    save("given.npz", clip(2))
    assert ca2vdm("extend", "given.npz", "--preset", weights, *GENERATE, "--frames", 2, "-q") == 0
    assert len(load("given-extended.mp4")) == 4


def test_video_may_be_extended_in_place(make: Callable[..., list[Frame]]) -> None:
    source = save("given.npz", clip(5))
    video = make("extend", "given.npz", "--frames", 3, out="given.npz")
    assert len(video) == 8
    assert max(apart(video[:5], source)) == 0


def test_unreadable_input(weights: Path, refused: Callable[..., str]) -> None:
    Path("given.mp4").write_text("not a video at all")
    line = refused(1, "extend", "given.mp4", "--preset", weights, *GENERATE, "-o", "out.mp4")
    assert line.startswith("error: given.mp4: cannot be read")
    assert not Path("out.mp4").exists()


# --- train ------------------------------------------------------------------------------------------------------------

TRAIN = ["train", "--preset", "tiny", *RUN, "--set", "training.autoencoder_steps=2"]


def test_training_on_videos(report: Callable[..., Any], make: Callable[..., list[Frame]]) -> None:
    Path("videos/more").mkdir(parents=True)
    save("videos/one.mp4", clip(20, 32, 40))
    save("videos/more/two.gif", clip(16))
    Path("videos/notes.txt").write_text("not a video")
    result = report(*TRAIN, "--data", "videos", "--steps", 2, "--out", "run")
    assert (result["steps"], result["steps_this_run"], result["output"]) == (2, 2, "run")
    assert 0 < result["loss"] < 100
    for file in (WEIGHTS_FILE, "autoencoder.safetensors", "preset.yaml", "metrics.jsonl"):
        assert Path("run", file).stat().st_size > 0
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert ca2vdm("sample", "--preset", "run", *GENERATE, "--frames", 3, "-q", "-o", "out.mp4") == 0
    assert len(load("out.mp4")) == 3


def test_resumed_training_ends_where_an_uninterrupted_one_does(refused: Callable[..., str]) -> None:
    assert ca2vdm(*TRAIN, "--steps", 4, "--seed", 5, "--out", "whole", "-q") == 0
    assert ca2vdm(*TRAIN, "--steps", 2, "--seed", 5, "--out", "parts", "-q") == 0
    assert "go on with --resume" in refused(2, *TRAIN, "--steps", 4, "--out", "parts")
    preset = Path("parts/preset.yaml").read_text()
    resume = ["train", *RUN, "--steps", 4, "--out", "parts", "--resume"]
    assert "has seed 5" in refused(2, *resume, "--seed", 0)
    assert "tensors" in refused(1, *resume, "--set", "model.depth=3")
    assert "no backend 'nope'" in refused(2, *resume, "--backend", "nope")
    assert Path("parts/preset.yaml").read_text() == preset
    assert ca2vdm(*resume, "-q") == 0
    whole, parts = (load_tensors(Path(run, WEIGHTS_FILE))[0] for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_resumed_training_goes_on_with_its_own_data(report: Callable[..., Any]) -> None:
    save("clip.mp4", clip(20))
    for run, steps in (("whole", [4]), ("parts", [2, 4])):
        for part in steps:
            again = ["--resume"] if Path(run).exists() else ["--data", "clip.mp4"]
            command = TRAIN if "--data" in again else ["train", *RUN]
            assert ca2vdm(*command, *again, "--steps", part, "--out", run, "-q") == 0
    whole, parts = (load_tensors(Path(run, WEIGHTS_FILE))[0] for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_runs_folder_brings_its_own_preset(weights: Path, refused: Callable[..., str]) -> None:
    assert ca2vdm("sample", "--checkpoint", weights, *GENERATE, "--frames", 2, "-q", "-o", "out.npz") == 0
    line = refused(2, "sample", "--checkpoint", weights, "--preset", "tiny")
    assert "has a preset of its own; leave out --preset tiny" in line


@pytest.mark.parametrize("metadata", [{}, {"seed": "x"}, {"seed": "1", "aspect": "x"}])
def test_a_training_state_that_is_none(refused: Callable[..., str], metadata: dict[str, str]) -> None:
    tensors = {"a": torch.zeros(1)}
    RunFolder(Path("run")).save(1, metadata, {WEIGHTS_FILE: tensors, STATE_FILE: tensors})
    assert "not a training run's checkpoint" in refused(
        1, "train", *RUN, "--preset", "tiny", "--resume", "--out", "run"
    )


def test_resumed_training_fits_its_videos_as_before() -> None:
    save("clip.mp4", clip(20, 32, 48))
    assert ca2vdm(*TRAIN, "--data", "clip.mp4", "--aspect", "crop", "--steps", 4, "--out", "whole", "-q") == 0
    assert ca2vdm(*TRAIN, "--data", "clip.mp4", "--aspect", "crop", "--steps", 2, "--out", "parts", "-q") == 0
    assert ca2vdm("train", *RUN, "--resume", "--steps", 4, "--out", "parts", "-q") == 0
    whole, parts = (load_tensors(Path(run, WEIGHTS_FILE))[0] for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_videos_that_were_left_out_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("videos").mkdir()
    save("videos/good.mp4", clip(20))
    save("videos/short.mp4", clip(3))
    assert ca2vdm(*TRAIN, "--data", "videos", "--steps", 1, "--out", "run") == 0
    assert "left out 1 of 2 videos: short.mp4: 3 frames, a clip has 13" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["weights", "file", "file/below"])
def test_a_folder_that_training_may_not_use(refused: Callable[..., str], out: str) -> None:
    Path("weights").mkdir()
    Path("weights/ema.safetensors").write_text("somebody's")
    Path("file").write_text("no folder")
    assert "choose another" in refused(2, *TRAIN, "--out", out)
    assert Path("weights/ema.safetensors").read_text() == "somebody's"


def test_finished_training_has_nothing_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm(*TRAIN, "--steps", 1, "--out", "run") == 0
    assert "trained to step 1" in capsys.readouterr().err
    assert ca2vdm("train", *RUN, "--out", "run", "--resume") == 0
    assert "run is at step 1 already; ask for more with --steps" in capsys.readouterr().err


def test_interrupted_training_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def interrupt(trainer: Trainer) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(trainer)

    save("clip.mp4", clip(16))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupt)
        assert ca2vdm(*TRAIN, "--steps", 3, "--out", "run", "--data", "clip.mp4", "--seed", 2) == 130
    out, text = capsys.readouterr()
    assert out == ""
    advice = re.fullmatch(r"interrupted at step 1: go on with ca2vdm train (.*)\n", text)
    assert advice
    assert ca2vdm("train", *RUN, "-q", *advice[1].split()) == 0
    assert load_tensors(Path("run/ema.safetensors"))[1]["step"] == "3"


def test_training_can_begin_at_given_weights(weights: Path) -> None:
    request = ["train", *RUN, "--steps", 1, "-q", "--set", "training.learning_rate=1e-9"]
    assert ca2vdm(*request, "--checkpoint", weights, "--out", "fine") == 0
    before, after = (load_tensors(run / WEIGHTS_FILE)[0] for run in (weights, Path("fine")))
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


@pytest.mark.parametrize("videos", [[], ["short.mp4"], ["broken.mp4"]])
def test_no_usable_data(refused: Callable[..., str], videos: list[str]) -> None:
    Path("videos").mkdir()
    if "short.mp4" in videos:
        save("videos/short.mp4", clip(WINDOW + CHUNK - 1))
    if "broken.mp4" in videos:
        Path("videos/broken.mp4").write_text("nothing")
    line = refused(1, *TRAIN, "--data", "videos", "--out", "run")
    assert "videos: no usable video" in line
    assert all(video in line for video in videos)
    assert not Path("run").exists()


# --- bench and verify -------------------------------------------------------------------------------------------------

EXACT = ["--preset", "tiny", *RUN, "--dtype", "float32", "--steps", 2]


def test_bench_as_json(report: Callable[..., Any]) -> None:
    result = report("bench", "--compare", "recompute", *EXACT)
    frames = -(-(WINDOW + 2 * CHUNK) // CHUNK) * CHUNK
    assert result["frames"] == frames
    assert result["outputs_agree"] is True
    assert result["max_abs_difference_before_slide"] < 1e-5 * result["max_abs_output"]
    assert result["max_abs_difference_after_slide"] > 1e-3 * result["max_abs_output"]
    cached, recompute = result["results"]["cached"], result["results"]["recompute"]
    for measured in (cached, recompute):
        assert 0 < measured["steady_seconds_per_chunk"] < measured["seconds"]
        assert len(measured["seconds_per_chunk"]) == frames // CHUNK
        assert [len(steps) for steps in measured["seconds_per_step"]] == [2] * (frames // CHUNK)
        assert sum(measured["seconds_per_chunk"]) == pytest.approx(measured["seconds"])
        assert measured["peak_memory_bytes"] >= result["weights_bytes"] + measured["context_bytes"]
    ratio = recompute["steady_seconds_per_chunk"] / cached["steady_seconds_per_chunk"]
    assert result["speedup"] == pytest.approx(ratio)
    assert cached["cache_bytes"] == 2 * 2 * (WINDOW + CHUNK + 3) * 16 * 48 * 4
    assert recompute["cache_bytes"] == 0


def test_bench_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("bench", *EXACT) == 0
    text = capsys.readouterr().out
    assert re.search(r"cached is \d+\.\d\d× (faster|slower) than recompute at a 9-frame window", text)
    for words in ("random weights", "cached", "recompute", "×", "a chunk", "in total", "peak", "∝ framesᵉ"):
        assert words in text


def test_bench_of_one_chunk_has_no_ratio(report: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert report("bench", *EXACT, "--frames", 4)["speedup"] is None
    assert ca2vdm("bench", *EXACT, "--frames", 4) == 0
    assert "ask for more --frames" in capsys.readouterr().out


def test_bench_uses_weights_where_there_are_some(report: Callable[..., Any], weights: Path) -> None:
    for option, value in (("--preset", weights), ("--checkpoint", weights), ("--checkpoint", weights / WEIGHTS_FILE)):
        result = report("bench", option, value, *RUN, "--steps", 1, "--frames", 4)
        assert result["trained"] is True and result["chunk_frames"] == CHUNK
    assert report("bench", *EXACT, "--frames", 4)["trained"] is False


def shifted_mask(plan: FramePlan) -> FramePlan:
    """A chunk sees the wrong slot of the ring."""
    assert plan.temporal_mask is not None
    return replace(plan, temporal_mask=plan.temporal_mask.roll(1, 1))


def shifted_position(plan: FramePlan) -> FramePlan:
    """Finished frames are written one place too late in time."""
    return replace(plan, positions=(plan.positions + 1) % (WINDOW + CHUNK)) if plan.clean_frames else plan


def shifted_slot(plan: FramePlan) -> FramePlan:
    """Finished frames are written one slot too far."""
    assert plan.slots is not None
    return replace(plan, slots=(plan.slots + 1) % (WINDOW + CHUNK)) if plan.clean_frames else plan


def hidden_prefix(plan: FramePlan) -> FramePlan:
    """A chunk does not see the spatial prefix."""
    assert plan.has_prefix is not None
    return replace(plan, has_prefix=torch.zeros_like(plan.has_prefix))


@pytest.mark.parametrize("fault", [shifted_mask, shifted_position, shifted_slot, hidden_prefix])
def test_fault_in_the_cache_is_found(
    report: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[FramePlan], FramePlan],
) -> None:
    plan = KVCache.plan

    def faulty(cache: KVCache, frames: int, *, clean: bool) -> FramePlan:
        return fault(plan(cache, frames, clean=clean))

    monkeypatch.setattr(KVCache, "plan", faulty)
    result = report("bench", *EXACT, "--frames", 8)
    assert result["max_abs_difference_before_slide"] > 1e-3 * result["max_abs_output"]
    assert result["outputs_agree"] is False
    assert ca2vdm("bench", *EXACT, "--frames", 8) == 0
    assert "outputs DIFFER by" in capsys.readouterr().out
    result = report("verify", *EXACT, code=1)
    assert result["ok"] is False
    assert [row["ok"] for row in result["results"]] != [True] * 3 + [None] * 2


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_latents_need_no_autoencoder(
    report: Callable[..., Any], weights: Path, refused: Callable[..., str], command: str
) -> None:
    shutil.copy(weights / WEIGHTS_FILE, "alone.safetensors")
    assert report(command, *EXACT, "--checkpoint", "alone.safetensors")
    assert "autoencoder has no weights" in refused(2, "sample", *EXACT, "--checkpoint", "alone.safetensors")


def test_positions_that_end(report: Callable[..., Any]) -> None:
    """A table of 13 entries has room for three whole chunks; the last of them sees nearly a full window."""
    absolute = [*EXACT, "--set", "model.temporal_positions=absolute"]
    result = report("verify", *absolute)
    assert [row["tensor"] for row in result["results"]] == ["frames 0–3", "frames 4–7", "frames 8–11"]
    assert report("bench", *absolute)["frames"] == 12


def test_random_weights_of_many_steps_are_compared_step_by_step(report: Callable[..., Any]) -> None:
    """Where each strategy goes its own way, rounding errors grow without bound if weights are random."""
    for seed in range(3):
        request = ["verify", "--preset", "tiny", *RUN, "--dtype", "float32", "--seed", seed]
        results = report(*request, "--set", "model.depth=4")["results"]
        assert all(row["max_abs_difference"] < 1e-3 for row in results[:3])
        assert all(row["max_abs_difference"] > 1e-3 for row in results[3:])


@pytest.mark.parametrize("trained", [False, True])
def test_verify(capsys: pytest.CaptureFixture[str], report: Callable[..., Any], weights: Path, trained: bool) -> None:
    request = ["verify", *EXACT[2:], "--preset", weights if trained else "tiny"]
    result = report(*request)
    assert result["ok"] is True
    assert [row["tensor"] for row in result["results"]] == [f"frames {4 * k}–{4 * k + 3}" for k in range(5)]
    assert [row["ok"] for row in result["results"]] == [True] * 3 + [None] * 2
    assert all(row["max_abs_difference"] > 1e-3 for row in result["results"][3:])
    assert ca2vdm(*request) == 0
    out, text = capsys.readouterr()
    assert out.count("equal") == 3
    assert "all equal" in text
    assert ("random weights" in text) == (not trained)


def test_verify_of_a_recorded_run(capsys: pytest.CaptureFixture[str], report: Callable[..., Any]) -> None:
    result = report("verify", "--recorded", GOLDEN, *RUN)
    assert result["ok"] is True
    names = {"window_cached", "window_recompute", "video_cached", "video_recompute"}
    assert {row["tensor"] for row in result["results"]} == names
    assert all(row["max_abs_difference"] <= 1e-4 for row in result["results"])

    tensors, metadata = load_tensors(GOLDEN)
    tensors["expected.window_cached"][0, 0, 0, 0, 0] += 0.01
    save_tensors(Path("changed.safetensors"), tensors, metadata)
    assert ca2vdm("verify", "--recorded", "changed.safetensors", *RUN) == 1
    out, text = capsys.readouterr()
    assert re.search(r"window_cached +1\.00e-02 .* differs", out)
    assert "NOT EQUAL: window_cached" in text


def test_verify_of_what_is_no_recording(weights: Path, refused: Callable[..., str]) -> None:
    assert "no such file" in refused(2, "verify", "--recorded", "nope.safetensors")
    assert "not a recorded run" in refused(1, "verify", "--recorded", weights / WEIGHTS_FILE)
    tensors, metadata = load_tensors(GOLDEN)
    less = {key: value for key, value in tensors.items() if not key.startswith("expected.")}
    save_tensors(Path("less.safetensors"), less, metadata)
    assert "nothing to check" in refused(2, "verify", "--recorded", "less.safetensors", *RUN)


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "ema", "state_dict"])
def test_imported_weights_make_the_same_video(
    make: Callable[..., list[Frame]], weights: Path, capsys: pytest.CaptureFixture[str], wrapper: str | None
) -> None:
    state = {f"module.{key}": value for key, value in load_tensors(weights / WEIGHTS_FILE)[0].items()}
    state["optimizer_step"] = torch.tensor(7)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, "published.pt")
    assert ca2vdm("import", "published.pt", "--preset", weights, "-o", "mine.safetensors") == 0
    out, text = capsys.readouterr()
    assert out == ""
    assert f"matched: {len(state) - 1}" in text
    assert "missing: 0" in text
    assert "left over: 1\n  optimizer_step" in text
    advice = re.search(r"check it with: ca2vdm (.*)", text)
    assert advice and ca2vdm(*advice[1].split(), "--steps", 1) == 0
    expected = make("sample", "--frames", 6)
    assert max(apart(make("sample", "--frames", 6, "--checkpoint", "mine.safetensors"), expected)) == 0


def test_import_refuses_another_shape(weights: Path, refused: Callable[..., str]) -> None:
    request = ["import", weights / WEIGHTS_FILE, "--preset", "tiny", "-o", "mine.safetensors"]
    line = refused(1, *request, "--set", "model.hidden_size=64")
    assert re.search(r"has shape \((.*)\), the model wants \((?!\1)", line)
    assert "48" in line
    assert "64" in line
    assert not Path("mine.safetensors").exists()


def test_import_of_part_of_a_model(
    weights: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_tensors(weights / WEIGHTS_FILE)[0]
    key = next(iter(state))
    del state[key]
    torch.save(state, "part.pth")
    request = ["import", "part.pth", "--preset", "tiny", "-o", "mine.safetensors"]
    assert f"1 of {len(state) + 1} tensors are missing, the first {key}" in refused(1, *request)
    assert ca2vdm(*request, "--partial", "--dtype", "bfloat16") == 0
    assert f"missing: 1\n  {key}\n" in capsys.readouterr().err
    imported = load_tensors(Path("mine.safetensors"))[0]
    assert {value.dtype for value in imported.values() if value.is_floating_point()} == {torch.bfloat16}
    assert "exists already" in refused(2, *request)


class Trap:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("sprung"),)  # type: ignore[return-value]


@pytest.mark.parametrize("content", [{"model": Trap()}, {"epoch": 3}, [torch.ones(2)]])
def test_import_runs_no_code(refused: Callable[..., str], content: object) -> None:
    torch.save(content, "checkpoint.pt")
    line = refused(1, "import", "checkpoint.pt", "--preset", "tiny", "-o", "mine.safetensors")
    assert line.startswith("error: checkpoint.pt: ")
    assert not Path("sprung").exists()


# --- what there is ----------------------------------------------------------------------------------------------------


def test_presets(report: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = report("presets")
    assert {"moving-digits", "ca2-vdm-xl", "ca2-vdm-base", "tiny", "bench-small"} <= found.keys()
    assert found["tiny"]["weights"] is False
    assert ca2vdm("presets") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in found)
    assert "moving-digits (default)" in table


def test_shown_preset_can_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("presets", "show", "tiny", "--set", "model.depth=3") == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["model"]["depth"] == 3
    Path("mine.yaml").write_text(text)
    assert ca2vdm("presets", "show", "mine.yaml") == 0
    assert capsys.readouterr().out == text
    assert ca2vdm("verify", "--preset", "mine.yaml", *RUN, "--steps", 1) == 0


class Unavailable(Backend):
    name = "imaginary"
    description = "a backend that never runs"
    priority = 99

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return "pip install imaginary[all] first"


def test_backends(
    report: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.setitem(backends(), "imaginary", Unavailable())
    result = report("backends", "--device", "cpu", "--dtype", "float32")
    found = {backend["name"]: backend for backend in result["backends"]}
    assert {"eager", "sdpa", "compile", "imaginary"} <= found.keys()
    assert found["eager"]["available"] is True
    assert found["imaginary"]["reason"] == "pip install imaginary[all] first"
    assert sum(backend["auto"] for backend in found.values()) == 1
    assert ca2vdm("backends", "--device", "cpu") == 0
    assert re.search(r"imaginary +unavailable +pip install imaginary\[all\] first", capsys.readouterr().out)
    line = refused(2, "verify", "--preset", "tiny", "--backend", "imaginary", "--device", "cpu")
    assert "imaginary is unavailable on cpu in float32: pip install imaginary[all] first" in line


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm(*command.split(), "--help") == 0
    out, text = capsys.readouterr()
    assert " ".join(["Usage: ca2vdm", *command.split()]) in out
    assert text == ""


def test_no_command_is_a_wish_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm() == 0
    assert set(COMMANDS[:-1]) <= set(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("--version") == 0
    assert capsys.readouterr().out == f"ca2vdm {__version__}\n"


def test_help_is_instant() -> None:
    """Another process: neither --version nor any --help brings in a large library."""
    requests = [["--version"], *([*command.split(), "--help"] for command in ["", *COMMANDS])]
    code = f"""if True:
        import sys
        from ca2vdm_cli.__main__ import main
        assert not any([main(request) for request in {requests!r}])
        print("imported:", *sys.modules)
    """
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    imported = run.stdout.rpartition("imported: ")[2].split()
    assert "typer" in imported
    assert not {"torch", "numpy", "cv2", "av", "yaml"} & set(imported)


@pytest.mark.parametrize("program", [[sys.executable, "-m", "ca2vdm_cli"], ["ca2vdm"]])
def test_program(program: list[str]) -> None:
    if program == ["ca2vdm"]:
        script = shutil.which("ca2vdm", path=str(Path(sys.executable).parent))
        assert script, "the console script is installed beside Python"
        program = [script]
    run = subprocess.run([*program, "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"ca2vdm {__version__}\n", "")


def test_distilling_a_run_gives_a_preset_of_few_steps(weights: Path, refused: Callable[..., str]) -> None:
    settings = ["--set", "distillation.steps=2", "--set", "distillation.teacher_steps=4"]
    request = ["train", *RUN, "--distill", weights, "--steps", 2, "--out", "student", "-q", *settings]
    assert "it takes v or flow" in refused(2, *request)
    assert ca2vdm(*request, "--set", "diffusion.prediction=v") == 0
    assert ca2vdm("train", *RUN, "--resume", "--steps", 3, "--out", "student", "-q") == 0
    preset = load_preset("student").config
    assert (preset.sampling.sampler, preset.sampling.steps) == ("trailing", 2)
    assert RunFolder(Path("student")).newest()[0].facts["teacher"] == str(weights.resolve())  # type: ignore[union-attr]
    assert ca2vdm("sample", "--preset", "student", *RUN, "--frames", 3, "-q", "-o", "out.npz") == 0
    assert "no such file" in refused(2, "train", *RUN, "--distill", "absent.safetensors", "--out", "other")


@pytest.mark.parametrize("part", ["temporal", "lora"])
def test_part_of_a_model_needs_weights_to_begin_from(part: str, refused: Callable[..., str]) -> None:
    line = refused(2, *TRAIN, "--set", f"training.trainable={part}", "--steps", 1, "--out", "run")
    assert f"training.trainable: {part} needs weights to begin from; name them with --checkpoint" in line


def test_a_fine_tuned_model_is_sampled_as_any_other(weights: Path, make: Callable[..., list[Frame]]) -> None:
    settings = ["--set", "training.trainable=lora", "--set", "training.lora_rank=4", "--steps", 2]
    assert ca2vdm("train", "--checkpoint", weights, *settings, "--out", "run", *RUN, "-q") == 0
    assert load_tensors(Path("run") / WEIGHTS_FILE)[0].keys() == load_tensors(weights / WEIGHTS_FILE)[0].keys()
    assert ca2vdm("sample", "--preset", "run", *GENERATE, "--frames", 8, "-q", "-o", "tuned.npz") == 0
    assert max(apart(load("tuned.npz"), make("sample", "--frames", 8))) > 0


def test_validation_goes_on_with_its_own_data() -> None:
    save("clip.mp4", clip(20))
    save("held-out/other.mp4", clip(20, 32, 40))
    often = ["--set", "training.validate_every=1", "--set", "training.validation_clips=1"]
    request = [*TRAIN, "--data", "clip.mp4", "--validation-data", "held-out", *often, "--out", "run", "-q"]
    assert ca2vdm(*request, "--steps", 1) == 0
    assert ca2vdm("train", *RUN, "--resume", "--out", "run", "--steps", 2, "-q") == 0
    last = RunFolder(Path("run")).newest()[0]
    assert last is not None and last.facts["validation"] == str(Path("held-out").resolve())
    lines = [json.loads(line) for line in Path("run/validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and set(lines[0]["by_prefix"]) == {"0", "1", "4", "5", "9"}


def test_checking_data_reads_and_trains_nothing(report: Callable[..., Any]) -> None:
    save("videos/one.mp4", clip(20))
    save("videos/short.mp4", clip(3))
    result = report("train", "--preset", "tiny", "--data", "videos", "--check-data")
    assert (result["videos"], result["usable_videos"]) == (2, 1) and "short.mp4" in str(result["rejects"])
    assert not Path("runs").exists()


def test_latents_are_kept_and_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    save("clip.mp4", clip(20))
    request = [*TRAIN, "--data", "clip.mp4", "--cache-latents", "latents", "--steps", 1]
    assert ca2vdm(*request, "--out", "first") == 0
    assert "of 1 videos made, of 0 found there" in capsys.readouterr().err
    assert len(list(Path("latents").glob("*.safetensors"))) == 1
    trained = ["--set", "autoencoder_weights=" + str(Path("first/autoencoder.safetensors").resolve())]
    assert ca2vdm(*request, "--out", "second", *trained) == 0
    assert "of 0 videos made, of 1 found there" in capsys.readouterr().err
    assert ca2vdm(*request, "--out", "third", "--seed", 3) == 0  # an autoencoder of its own
    text = capsys.readouterr().err
    assert "stale" in text and "of 1 videos made, of 0 found there" in text
