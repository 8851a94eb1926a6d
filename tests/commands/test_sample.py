"""``ca2vdm sample``, and invalid requests to any command."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_kit import (
    CHUNK,
    GENERATE,
    RUN,
    WINDOW,
    Make,
    Refused,
    Report,
    apart,
    ca2vdm,
    clip,
    gray,
    load,
    save,
)

from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.commands import generate
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.model.kv_cache import KVCache
from ca2vdm_cli.training.run_folder import WEIGHTS_FILE
from ca2vdm_cli.training.trainer import Trainer
from ca2vdm_cli.video_io import Aspect, Frame, Geometry, VideoWriter, open_reader, write_image

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# --- sample -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 7, 10])
@pytest.mark.parametrize("out", ["out.mp4", "out.mkv", "out.gif", "out.y4m", "out.npz", "out/"])
def test_sample_writes_the_requested_number_of_frames(make: Make, frames: int, out: str) -> None:
    video = make("sample", "--frames", frames, out=out)
    assert len(video) == frames
    assert video[0].shape == (32, 32, 3)


def test_format_overrules_the_suffix(make: Make) -> None:
    assert len(make("sample", "--frames", 5, "--format", "mkv", out="video.bin")) == 5
    assert Path("video.bin").read_bytes()[:4] == b"\x1aE\xdf\xa3"  # EBML


@pytest.mark.parametrize("videos", [1, 2])
def test_files_into_a_folder(weights: Path, videos: int) -> None:
    request = ["sample", "--preset", weights, *GENERATE, "--frames", 2, "-q", "--num-videos", videos]
    assert ca2vdm(*request, "-o", "videos/", "--format", "mp4") == 0
    assert sorted(path.name for path in Path("videos").iterdir()) == [f"{k:02}.mp4" for k in range(videos)]
    assert ca2vdm(*request, "-o", "videos", "--format", "gif") == 0  # the folder exists
    assert len(load(f"videos/{videos - 1:02}.gif")) == 2


def test_a_folder_with_the_name_of_a_video(weights: Path, refused: Refused) -> None:
    Path("out.mp4").mkdir()
    line = refused(2, "sample", "--preset", weights, *GENERATE, "--frames", 2, "-o", "out.mp4")
    assert line.endswith("out.mp4: a folder, not a file; choose another output, or end it in / for a folder of PNGs")
    assert not list(Path("out.mp4").iterdir())


def test_control_characters_of_a_name_do_not_reach_the_terminal(weights: Path, refused: Refused) -> None:
    line = refused(2, "sample", "--preset", weights, *GENERATE, "-o", "a\x1b]0;title\x07\x9b2J\u202e\n.avi")
    assert line.startswith(r"error: a\x1b]0;title\x07\x9b2J\u202e .avi: cannot be written")


def test_control_characters_in_reports(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 2, "-o", "a\x1b[31m\x9b2J\udcff.mp4") == 0
    assert r"→ a\x1b[31m\x9b2J\udcff.mp4" in capsys.readouterr().err


def test_a_disk_that_fills_up(weights: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def full(handle: int, data: bytes, offset: int) -> int:
        if offset > 3000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    line = refused(1, "sample", "--preset", weights, *GENERATE, "--frames", 200, "-o", "out.mp4")
    match = re.fullmatch(
        r"error: out.mp4: cannot be written \(No space left on device\); check permissions, free space and frame size; "
        r"the (\d+) finished frames are in out\.partial\.mp4",
        line,
    )
    assert match
    assert len(load("out.partial.mp4")) == int(match[1])
    assert not Path("out.mp4").exists()


def test_output_takes_a_free_name(weights: Path) -> None:
    for _ in range(2):
        assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 2, "-q") == 0
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 2, "-q", "--format", "png") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["sample", "sample-1.mp4", "sample.mp4"]


def test_output_is_replaced_only_on_request(weights: Path, refused: Refused) -> None:
    Path("out.npz").write_text("precious")
    request = ["sample", "--preset", weights, *GENERATE, "--frames", 2, "-o", "out.npz"]
    assert "out.npz: exists already" in refused(2, *request)
    assert Path("out.npz").read_text() == "precious"
    assert ca2vdm(*request, "--overwrite", "-q") == 0
    assert len(load("out.npz")) == 2


def test_the_seed_determines_the_video(make: Make) -> None:
    first = make("sample", "--frames", 6)
    one = Path("out.npz").read_bytes()
    make("sample", "--frames", 6)
    assert Path("out.npz").read_bytes() == one
    assert max(apart(make("sample", "--frames", 6, "--seed", 1), first)) > 20


def test_the_first_frames_do_not_depend_on_the_length(make: Make) -> None:
    assert max(apart(make("sample", "--frames", 12)[:5], make("sample", "--frames", 5))) == 0


def test_videos_do_not_depend_on_each_other(make: Make, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_recomputing_gives_the_same_until_the_window_slides(make: Make) -> None:
    frames = make("sample", "--frames", 16)
    difference = apart(frames, make("sample", "--frames", 16, "--strategy", "recompute"))
    assert max(difference[:12]) <= 1  # the chunk that begins at frame 8 still sees all earlier frames
    assert max(difference[12:]) > 1  # cached keys and values still depend on evicted frames, recomputed ones do not


def test_context_frames(make: Make, weights: Path, refused: Refused) -> None:
    full, short = make("sample", "--frames", 12), make("sample", "--frames", 12, "--context-frames", 4)
    assert max(apart(full[:8], short[:8])) <= 1
    assert max(apart(full[8:], short[8:])) > 1
    line = refused(2, "sample", "--preset", weights, *GENERATE, "--context-frames", WINDOW + 1)
    assert f"{WINDOW + 1} is more than the {WINDOW}" in line


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_samplers(make: Make, sampler: str) -> None:
    assert max(apart(make("sample", "--frames", 4, "--sampler", sampler), make("sample", "--frames", 4))) > 1


@pytest.mark.parametrize("options", [["--fps", 12], ["--set", "video.fps=12"]])
def test_frame_rate(make: Make, options: list[object]) -> None:
    make("sample", "--frames", 3, *options, out="out.mp4")
    with open_reader("out.mp4") as reader:
        assert reader.fps == 12


@pytest.mark.parametrize("kind", ["image", "video"])
def test_first_frame_comes_first(make: Make, kind: str) -> None:
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


def test_weights_that_need_a_first_frame_ask_for_one(make: Make, weights: Path, refused: Refused) -> None:
    needs_one = ["--set", "diffusion.unconditional_start=false"]
    assert "give a first frame" in refused(2, "sample", "--preset", weights, *GENERATE, *needs_one)
    write_image("given.png", clip(1)[0])
    assert len(make("sample", "--frames", 5, "--first-frame", "given.png", *needs_one)) == 5


def test_report_as_json(report: Report, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_report_as_text(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 10, "-o", "out.mp4") == 0
    out, text = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in text
    for words in ("10 frames", "frames/s", "→ out.mp4", "weights", "cache", "peak", "denoise", "cache write", "decode"):
        assert words in text


def test_quiet_prints_nothing(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("sample", "--preset", weights, *GENERATE, "--frames", 2, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("option", [["--json"], ["--num-videos", 2]])
def test_standard_output_holds_one_video(weights: Path, refused: Refused, option: list[object]) -> None:
    line = refused(2, "sample", "--preset", weights, *GENERATE, "-o", "-", *option)
    assert f"leave out {option[0]}" in line


def test_no_video_is_written_to_a_terminal(weights: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_the_message_about_an_interrupt_stays_on_the_terminal(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The progress bar is erased when it ends, and the message that follows is not."""

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
    bar, message, end = text.rpartition("interrupted")
    assert "\x1b[2K" in bar  # erase the line
    assert message
    assert "\x1b" not in end


# --- wrong requests ---------------------------------------------------------------------------------------------------

WRONG: list[tuple[list[object], str]] = [
    (["sample", "--preset", "nope"], "preset 'nope' is neither built in nor a file"),
    (["sample", "--preset", "tiny"], "preset tiny: it has no weights"),
    (["sample", "--preset", "bench-small"], "preset bench-small: it has no weights"),
    (["sample", "--checkpoint", "nope.safetensors"], "error: --checkpoint: nope.safetensors: no such file"),
    (["sample", "--checkpoint", "."], "error: --checkpoint: . is a folder without preset.yaml"),
    (
        ["sample", "--preset", "W", "--guidance", 3],
        "error: --guidance: there is no prompt to follow; give one with --prompt",
    ),
    (["sample", "--preset", "W", "--backend", "nope"], "no backend 'nope'; known: auto, eager"),
    (["sample", "--preset", "W", "--device", "warp"], "--device: warp is not available here"),
    (["sample", "--preset", "W", "--dtype", "int4"], "'int4' is not one of"),
    (["sample", "--preset", "W", "--format", "avi"], "cannot be written as 'avi'; use mp4"),
    (["sample", "--preset", "W", "-o", "out.avi"], "out.avi: cannot be written as 'avi'; use mp4"),
    (["sample", "--preset", "W", "-o", "-", "--format", "gif"], "cannot be written as 'gif'; use y4m, mkv"),
    (
        ["sample", "--preset", "W", "--set", "model.dept=3"],
        "--set: 'model.dept' is not a key of a preset; did",
    ),
    (["sample", "--preset", "W", "--set", "model.depth=x"], "model.depth"),
    (["sample", "--preset", "W", "--set", "model.depth"], "--set: model.depth must be a key and a value"),
    (["sample", "--preset", "W", "--steps", 5000], "error: --steps: 5000 must be from 1 to 1000"),
    (
        ["sample", "--preset", "W", "--seed", 2**63],
        "--seed': '9223372036854775808' is not a whole number from 0 to 9223372036854775807",
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
    (["train", "--preset", "ca2-vdm-base"], "name a data set"),
    (["train", "--preset", "tiny", "--resume"], "nothing to resume"),
    (["train", "--distill", "nope"], "error: --distill: nope: no such file or folder"),
    (["train", "--preset", "tiny", "--set", "training.trainable=lora"], "give them with --checkpoint"),
    (["verify", "--recorded", "x.safetensors", "--preset", "tiny"], "leave out --preset"),
    (["import", "x.pt", "--preset", "tiny", "-o", "x.pt"], "must end in .safetensors"),
    (["presets", "show", "nope"], "preset 'nope'"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    WRONG,
    ids=lambda value: " ".join(map(str, value if isinstance(value, list) else [value]))[:60],
)
def test_invalid_request(weights: Path, refused: Refused, arguments: list[object], expected: str) -> None:
    assert expected in refused(2, *(weights if argument == "W" else argument for argument in arguments))
    assert list(Path().iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize(
    ("diffusers", "expected"),
    [(None, "pip install 'ca2vdm[latent]'"), (SimpleNamespace(nope=3), "nor a diffusers scheduler")],
)
def test_unknown_sampler(
    weights: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, diffusers: object, expected: str
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    line = refused(2, "sample", "--preset", weights, *GENERATE, "--sampler", "nope")
    assert "'nope' is not one of ancestral, ddim, dpm++" in line
    assert expected in line


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UsageError, match="nope"):
        ca2vdm("sample", "--preset", "nope", "--debug")
    with pytest.raises(UsageError, match="--framse"):
        ca2vdm("--debug", "sample", "--framse")


def test_a_bug_is_reported_in_one_line(weights: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(KVCache, "plan", broken)
    line = refused(1, "sample", "--preset", weights, *GENERATE, "-o", "out.mp4")
    assert "ZeroDivisionError: one two" in line
    assert "a bug in ca2vdm; --debug" in line
    with pytest.raises(ZeroDivisionError):
        ca2vdm("sample", "--preset", weights, *GENERATE, "-o", "out.mp4", "--debug")
    assert not Path("out.mp4").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])
def test_running_out_of_memory_is_not_reported_as_a_bug(
    error: Exception, weights: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(KVCache, "plan", fail)
    line = refused(1, "sample", "--preset", weights, *GENERATE, "-o", "out.mp4")
    assert line == "error: out of memory; use a smaller batch, window or size (ca2vdm plan says what fits)"


def test_output_that_is_not_finite_is_not_written(weights: Path, refused: Refused) -> None:
    tensors, metadata = load_tensors(weights / WEIGHTS_FILE)
    broken = {key: value * 1e30 for key, value in tensors.items()}
    save_tensors(Path("broken.safetensors"), broken, metadata)
    request = ["--preset", weights, *GENERATE, "--checkpoint", "broken.safetensors"]
    line = refused(1, "sample", *request, "-o", "out.mp4")
    assert "frame 0: the model's output is not finite in float32" in line
    assert not Path("out.mp4").exists()
    assert refused(1, "bench", *request) == refused(1, "verify", *request) == line
