"""``ca2vdm import``, ``backends``, ``plugins`` and ``presets``, help and shell completion."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from command_kit import (
    COMMANDS,
    RUN,
    SUBCOMMANDS,
    Make,
    Refused,
    Report,
    apart,
    ca2vdm,
)
from torch import Tensor

from ca2vdm_cli import __version__, cli
from ca2vdm_cli.checkpoint import load_tensors
from ca2vdm_cli.model.attention import Backend
from ca2vdm_cli.plugins import backends
from ca2vdm_cli.training.run_folder import WEIGHTS_FILE

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "ema", "state_dict"])
def test_imported_weights_make_the_same_video(
    make: Make, weights: Path, capsys: pytest.CaptureFixture[str], wrapper: str | None
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


def test_import_refuses_another_shape(weights: Path, refused: Refused) -> None:
    request = ["import", weights / WEIGHTS_FILE, "--preset", "tiny", "-o", "mine.safetensors"]
    line = refused(1, *request, "--set", "model.hidden_size=64")
    assert re.search(r"has shape \((.*)\), the model needs \((?!\1)", line)
    assert "48" in line
    assert "64" in line
    assert not Path("mine.safetensors").exists()


def test_import_of_part_of_a_model(weights: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_tensors(weights / WEIGHTS_FILE)[0]
    key = next(iter(state))
    del state[key]
    torch.save(state, "part.pth")
    request = ["import", "part.pth", "--preset", "tiny", "-o", "mine.safetensors"]
    assert f"1 of {len(state) + 1} tensors are missing, the first is {key}" in refused(1, *request)
    assert ca2vdm(*request, "--partial", "--dtype", "bfloat16") == 0
    assert f"missing: 1\n  {key}\n" in capsys.readouterr().err
    imported = load_tensors(Path("mine.safetensors"))[0]
    assert {value.dtype for value in imported.values() if value.is_floating_point()} == {torch.bfloat16}
    assert "exists already" in refused(2, *request)


class Trap:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("sprung"),)  # type: ignore[return-value]


@pytest.mark.parametrize("content", [{"model": Trap()}, {"epoch": 3}, [torch.ones(2)]])
def test_import_runs_no_code(refused: Refused, content: object) -> None:
    torch.save(content, "checkpoint.pt")
    line = refused(1, "import", "checkpoint.pt", "--preset", "tiny", "-o", "mine.safetensors")
    assert line.startswith("error: checkpoint.pt: ")
    assert not Path("sprung").exists()


# --- lists ----------------------------------------------------------------------------------------------------


def test_presets(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    presets = report("presets")
    assert {"moving-digits", "ca2-vdm-xl", "ca2-vdm-base", "tiny", "bench-small"} <= presets.keys()
    assert presets["tiny"]["weights"] is False
    assert ca2vdm("presets") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in presets)
    assert "moving-digits (default)" in table


@pytest.mark.parametrize("command", ["presets", "backends", "plugins"])
def test_lists_are_not_padded_in_a_pipe(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["plan", "--frames", "0"], "'--frames': '0' is not a whole number of at least 1 (see ca2vdm plan --help)"),
        (["plan", "--steps", "1.5"], "'--steps': '1.5' is not a whole number of at least 1"),
        (["plan", "--context-frames", "ten"], "'--context-frames': 'ten' is not a whole number of at least 1"),
        (["verify", "--seed", "-1"], "'--seed': '-1' is not a whole number from 0 to 9223372036854775807"),
        (["sample", "--guidance", "nan"], "'--guidance': 'nan' is not a number of at least 0"),
    ],
)
def test_numbers_out_of_range(refused: Refused, arguments: list[str], line: str) -> None:
    assert f"error: Invalid value for {line}" in refused(2, *arguments)


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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        raise NotImplementedError


def test_backends(
    report: Report,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    refused: Refused,
) -> None:
    backends.register(Unavailable())
    request.addfinalizer(lambda: backends.unregister("imaginary"))
    result = report("backends", "--device", "cpu", "--dtype", "float32")
    by_name = {backend["name"]: backend for backend in result["backends"]}
    assert {"eager", "sdpa", "compile", "imaginary"} <= by_name.keys()
    assert by_name["eager"]["available"] is True
    assert by_name["imaginary"]["reason"] == "pip install imaginary[all] first"
    assert sum(backend["auto"] for backend in by_name.values()) == 1
    assert ca2vdm("backends", "--device", "cpu") == 0
    assert re.search(r"imaginary +unavailable +pip install imaginary\[all\] first", capsys.readouterr().out)
    line = refused(2, "verify", "--preset", "tiny", "--backend", "imaginary", "--device", "cpu")
    assert "imaginary is unavailable on cpu in float32: pip install imaginary[all] first" in line


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS, *SUBCOMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm(*command.split(), "--help") == 0
    out, text = capsys.readouterr()
    assert " ".join(["Usage: ca2vdm", *command.split()]) in out
    assert text == ""
    assert not re.search("<(int|float)|range>|x>=", out), "ranges are in words"
    assert max(map(len, out.splitlines())) <= 80


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm() == 0
    assert set(COMMANDS) <= set(capsys.readouterr().out.split())


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.fixture
def named_shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the flags take the shell's name: its detection looks at the parent process, which may be anything."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    cli._command.cache_clear()  # typer reads the variable when it builds the commands
    yield
    cli._command.cache_clear()


@pytest.mark.parametrize(
    ("shell", "code"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --command")]
)
def test_completion_script(shell: str, code: str, named_shell: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        ca2vdm("--show-completion", shell)
    assert end.value.code == 0
    script = capsys.readouterr().out
    assert "_CA2VDM_COMPLETE" in script and code in script


def test_completion_is_installed(named_shell: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        ca2vdm("--install-completion", "bash")
    assert end.value.code == 0
    assert any("_CA2VDM_COMPLETE" in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ca2vdm pl", {"plan", "plugins"}),
        ("ca2vdm sample --preset moving", {"moving-digits"}),
        ("ca2vdm presets show ti", {"tiny"}),
        ("ca2vdm sample --backend ", {"auto", "eager", "sdpa", "compile"}),
        ("ca2vdm plan --sampler dd", {"ddim"}),
        ("ca2vdm extend in.mp4 --strategy rec", {"recompute", "recompute-extendable"}),
        ("ca2vdm sample --dtype b", {"bfloat16"}),
        ("ca2vdm bench --compare bi", {"bidirectional"}),
        ("ca2vdm bench --compare cached,recompute,fi", {"cached,recompute,fixed-window"}),
        ("ca2vdm bench --backend eager,", {"eager,auto", "eager,sdpa", "eager,compile"}),
        ("ca2vdm verify --compare recompute,", {"recompute,recompute-extendable"}),
    ],
)
def test_completion(words: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, where completing must not import torch."""
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
    code += "from ca2vdm_cli.__main__ import main; main()"
    monkeypatch.setenv("_CA2VDM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (set(run.stdout.split()), run.stderr) == (expected, "False\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("--version") == 0
    assert capsys.readouterr().out == f"ca2vdm {__version__}\n"


def test_help_imports_no_large_library() -> None:
    """In another process: neither --version nor any --help."""
    requests = [["--version"], *([*command.split(), "--help"] for command in ["", *COMMANDS, *SUBCOMMANDS])]
    code = f"""if True:
        import sys
        from ca2vdm_cli.__main__ import main
        assert not any([main(request) for request in {requests!r}])
        print("imported:", *sys.modules)
    """
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    imported = run.stdout.rpartition("imported: ")[2].split()
    assert "typer" in imported
    assert not {"torch", "numpy", "cv2", "av", "yaml", "pluggy", "rich"} & set(imported)


@pytest.mark.parametrize("own", [True, False])
def test_freed_memory_is_kept_unless_the_environment_configures_it(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda option, value: asked.append((option, value)))
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert ca2vdm("--version") == 0
    assert asked == ([] if own else [(-1, 2**30), (-3, 2**25)])


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_idle_threads_sleep_soon_unless_the_environment_configures_it(
    own: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # puts the present value back afterwards
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert ca2vdm("--version") == 0
    settings = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    assert settings == (own or {"GOMP_SPINCOUNT": "10000"})


@pytest.mark.slow
@pytest.mark.parametrize("program", [[sys.executable, "-m", "ca2vdm_cli"], ["ca2vdm"]])
def test_program(program: list[str]) -> None:
    if program == ["ca2vdm"]:
        script = shutil.which("ca2vdm", path=str(Path(sys.executable).parent))
        assert script, "the console script is installed beside Python"
        program = [script]
    run = subprocess.run([*program, "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"ca2vdm {__version__}\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code"), [("--version >&-", 0), ("presets show nope 2>&-", 2), ("extend - <&-", 1)]
)
def test_closed_streams(command: str, code: int) -> None:
    program = f"exec {shlex.quote(sys.executable)} -W error -m ca2vdm_cli {command}"
    run = subprocess.run(["sh", "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (run.returncode, run.stdout) == (code, "")
    assert run.stderr.count("\n") == (code == 1), run.stderr
