"""Backends: the built-in ones, one from a real plug-in distribution, and what happens when a plug-in is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ca2vdm_cli import plugins
from ca2vdm_cli.errors import UsageError, UserError

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).parent / "plugin_example"
BACKEND = """
from ca2vdm_cli import Backend, hookimpl

class Other(Backend):
    name = "{name}"
    description = ""

@hookimpl
def {hook}({arguments}):
    register(Other{call})
"""

AddPlugin = Callable[..., None]


@pytest.fixture
def fresh_plugins() -> Iterator[None]:
    """Look for plug-ins anew, and forget afterwards what was found."""
    plugins.forget_plugins()
    yield
    plugins.forget_plugins()


@pytest.fixture
def add_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_plugins: None) -> AddPlugin:
    """Writes a plug-in as pip would have installed it: ``add_plugin(name, source)``."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(
        name: str,
        source: str = BACKEND,
        *,
        backend: str = "other",
        hook: str = "ca2vdm_register_backends",
        arguments: str = "register",
        call: str = "()",
    ) -> None:
        text = source.format(name=backend, hook=hook, arguments=arguments, call=call)
        (tmp_path / f"{name}_module.py").write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ca2vdm]\n{name} = {name}_module\n")
        monkeypatch.delitem(sys.modules, f"{name}_module", raising=False)

    return add


def test_builtin_backends(fresh_plugins: None) -> None:
    found = plugins.backends
    assert {"eager", "sdpa", "compile"} <= set(found)
    assert all(found[name].name == name and found[name].description for name in found)
    assert plugins.choose_backend("eager", CPU, torch.float32) is found["eager"]


def test_auto_takes_the_available_backend_of_highest_priority(
    monkeypatch: pytest.MonkeyPatch, fresh_plugins: None
) -> None:
    found = plugins.backends
    monkeypatch.setattr(found["compile"], "unavailable", lambda device, dtype: "no compiler here")
    best = max((b for name, b in found.items() if name != "compile"), key=lambda backend: backend.priority)
    assert plugins.choose_backend("auto", CPU, torch.float32) is best
    with pytest.raises(UsageError, match=r"compile is unavailable on cpu in bfloat16: no compiler here"):
        plugins.choose_backend("compile", CPU, torch.bfloat16)


def test_a_backend_whose_check_fails_is_unavailable(monkeypatch: pytest.MonkeyPatch, fresh_plugins: None) -> None:
    def check(device: torch.device, dtype: torch.dtype) -> str | None:
        raise ImportError("libnothing.so:\nno such file")

    found = plugins.backends
    monkeypatch.setattr(found["sdpa"], "unavailable", check)
    monkeypatch.setattr(found["sdpa"], "priority", 1000)
    assert plugins.choose_backend("auto", CPU, torch.float32) is not found["sdpa"]
    with pytest.raises(UsageError, match=r"sdpa is unavailable on cpu in float32: ImportError: libnothing.so: no such"):
        plugins.choose_backend("sdpa", CPU, torch.float32)


def test_compile_needs_the_compiler_that_pytorch_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_plugins: None
) -> None:
    check = plugins.backends["compile"].unavailable
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    reason = check(CPU, torch.float32)
    assert reason is not None and "no C++ compiler found" in reason
    (tmp_path / "g++").touch(mode=0o755)
    reason = check(CPU, torch.float32)
    assert reason is None or "compiler" not in reason


def test_unknown_backend_lists_the_known_ones(fresh_plugins: None) -> None:
    with pytest.raises(UsageError, match=r"no backend 'spda'; did you mean sdpa"):
        plugins.choose_backend("spda", CPU, torch.float32)


def test_installed_plugin_is_found(tmp_path: Path) -> None:
    """A real distribution, installed by pip without the network and found by another process."""
    sources, target = tmp_path / "sources", tmp_path / "target"
    shutil.copytree(EXAMPLE, sources)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, sources], check=True)
    script = """if True:
        import json, torch
        from ca2vdm_cli.plugins import backends, choose_backend
        cpu = torch.device("cpu")
        q, k, v = torch.randn(3, 2, 4, 5, 8)
        example, eager = choose_backend("example", cpu, torch.float32), backends["eager"]
        difference = (example.attend(q, k, v) - eager.attend(q, k, v)).abs().max().item()
        print(json.dumps([list(backends), choose_backend("auto", cpu, torch.float32).name, difference]))
    """
    path = os.pathsep.join([str(target), str(EXAMPLE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    names, auto, difference = json.loads(run.stdout)
    assert names == ["eager", "sdpa", "compile", "example"]
    assert auto == "example"
    assert difference < 1e-6


def test_added_plugin_is_found(add_plugin: AddPlugin) -> None:
    add_plugin("good")
    assert "other" in plugins.backends


@pytest.mark.parametrize("taken", ["eager", "auto"])
def test_two_backends_of_one_name(add_plugin: AddPlugin, taken: str) -> None:
    add_plugin("greedy", backend=taken)
    owner = {"eager": "ca2vdm itself", "auto": "ca2vdm itself"}[taken]
    with pytest.raises(
        UserError, match=rf"backend '{taken}' is registered by plug-in 'greedy' of greedy and by {owner}"
    ):
        list(plugins.backends)


def test_two_plugins_with_one_backend_name(add_plugin: AddPlugin) -> None:
    add_plugin("first")
    add_plugin("second")
    with pytest.raises(UserError, match="backend 'other'") as error:
        list(plugins.backends)
    assert "'first' of first" in str(error.value)
    assert "'second' of second" in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hook": "ca2vdm_register_backend"}, "unknown hook 'ca2vdm_register_backend'"),
        ({"arguments": "registrar"}, "registrar"),
        ({"source": "import no_such_module"}, "ModuleNotFoundError: No module named 'no_such_module'"),
        ({"source": "1 / 0"}, "ZeroDivisionError"),
        ({"source": "def oops(:"}, "SyntaxError"),
    ],
)
def test_faulty_plugin_is_named_in_one_line(add_plugin: AddPlugin, options: dict[str, str], expected: str) -> None:
    add_plugin("faulty", **options)
    with pytest.raises(UserError) as error:
        plugins.plugin_manager()
    line = str(error.value)
    assert line.startswith("plug-in 'faulty' of faulty cannot be loaded: ")
    assert expected in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"call": ""}, "plug-in 'faulty' of faulty registers the class Other; it has to be an instance"),
        ({"call": "(1)"}, "plug-in 'faulty' of faulty cannot register its backends: TypeError"),
    ],
)
def test_plugin_that_registers_wrongly(add_plugin: AddPlugin, options: dict[str, str], expected: str) -> None:
    add_plugin("faulty", **options)
    with pytest.raises(UserError) as error:
        list(plugins.backends)
    assert str(error.value).startswith(expected)


def test_importing_the_plugin_manager_leaves_torch_out() -> None:
    script = "import sys, ca2vdm_cli.hookspecs, ca2vdm_cli.plugins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=EXAMPLE.parents[1]).returncode == 0
