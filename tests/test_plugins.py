"""Registries: entries that are built in or come from plug-ins or Python code, and how faulty plug-ins are reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_kit import ROOT, AddPlugin, Refused, Report, ca2vdm

from ca2vdm_cli import plugins
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.generate.samplers import DdimSampler
from ca2vdm_cli.model.attention import Backend

CPU = torch.device("cpu")
EXAMPLE = ROOT / "tests" / "plugin_example"
BACKEND = """
from ca2vdm_cli import Backend, hookimpl

class Other(Backend):
    name = "{name}"
    description = ""
    def attend(self, q, k, v, mask=None):
        return v

@hookimpl
def {hook}({arguments}):
    register(Other{call})
"""


def backend_source(
    *, name: str = "other", hook: str = "ca2vdm_register_backends", arguments: str = "register", call: str = "()"
) -> str:
    """A plug-in's module that registers a backend, or tries to."""
    return BACKEND.format(name=name, hook=hook, arguments=arguments, call=call)


def test_builtin_backends(fresh_plugins: None) -> None:
    backends = plugins.backends
    assert {"eager", "sdpa", "compile"} <= set(backends)
    assert all(backends[name].name == name and backends[name].description for name in backends)
    assert plugins.choose_backend("eager", CPU, torch.float32) is backends["eager"]


def test_auto_takes_the_available_backend_of_highest_priority(
    monkeypatch: pytest.MonkeyPatch, fresh_plugins: None
) -> None:
    backends = plugins.backends
    monkeypatch.setattr(backends["compile"], "unavailable", lambda device, dtype: "no compiler here")
    best = max((b for name, b in backends.items() if name != "compile"), key=lambda backend: backend.priority)
    assert plugins.choose_backend("auto", CPU, torch.float32) is best
    with pytest.raises(UsageError, match=r"compile is unavailable on cpu in bfloat16: no compiler here"):
        plugins.choose_backend("compile", CPU, torch.bfloat16)


def test_a_backend_whose_check_fails_is_unavailable(monkeypatch: pytest.MonkeyPatch, fresh_plugins: None) -> None:
    def check(device: torch.device, dtype: torch.dtype) -> str | None:
        raise ImportError("libnothing.so:\nno such file")

    backends = plugins.backends
    monkeypatch.setattr(backends["sdpa"], "unavailable", check)
    monkeypatch.setattr(backends["sdpa"], "priority", 1000)
    assert plugins.choose_backend("auto", CPU, torch.float32) is not backends["sdpa"]
    with pytest.raises(UsageError, match=r"sdpa is unavailable on cpu in float32: ImportError: libnothing.so: no such"):
        plugins.choose_backend("sdpa", CPU, torch.float32)


def test_compile_needs_the_compiler_that_pytorch_would_use(
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


@pytest.mark.slow
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
    path = os.pathsep.join([str(target), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
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


def test_added_plugin_is_found(add_plugin: AddPlugin, report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    add_plugin("good", backend_source())
    assert "other" in plugins.backends
    entries = report("plugins")["plugins"]
    assert {entry["kind"] for entry in entries} == {registry.kind for registry in plugins.REGISTRIES}
    owners = {entry["name"]: entry["registered_by"] for entry in entries if entry["kind"] == "backend"}
    assert owners["other"] == "plug-in 'good' of good"
    assert owners["eager"] == "ca2vdm itself"
    assert ca2vdm("plugins") == 0
    listing = capsys.readouterr().out
    assert all(entry["name"] in listing for entry in entries)


@pytest.mark.parametrize("taken", ["eager", "auto"])
def test_a_name_that_is_taken_or_reserved(add_plugin: AddPlugin, taken: str) -> None:
    add_plugin("greedy", backend_source(name=taken))
    expected = rf"backend '{taken}' is registered by plug-in 'greedy' of greedy and by ca2vdm itself; rename"
    for _ in range(2):  # the same error at the second attempt
        with pytest.raises(UserError, match=expected):
            list(plugins.backends)


def test_two_plugins_with_one_backend_name(add_plugin: AddPlugin) -> None:
    add_plugin("first", backend_source())
    add_plugin("second", backend_source())
    with pytest.raises(UserError, match="backend 'other'") as error:
        list(plugins.backends)
    assert "'first' of first" in str(error.value)
    assert "'second' of second" in str(error.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (backend_source(hook="ca2vdm_register_backend"), "unknown hook 'ca2vdm_register_backend'"),
        (backend_source(arguments="registrar"), "registrar"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def oops(:", "SyntaxError"),
    ],
)
def test_plugin_that_cannot_be_loaded_is_named_in_one_line(
    add_plugin: AddPlugin, refused: Refused, source: str, expected: str
) -> None:
    add_plugin("faulty", source)
    line = refused(1, "plugins")
    assert line.startswith("error: plug-in 'faulty' of faulty cannot be loaded: ")
    assert expected in line


NAMED = "name = 'a'; description = ''"
REGISTERING = """
from ca2vdm_cli import {base}, hookimpl
from ca2vdm_cli.lazy import Lazy

class Mine({base}):
    {body}

@hookimpl
def ca2vdm_register_{kind}s(register):
    register({entry})
"""


@pytest.mark.parametrize(
    ("kind", "body", "entry", "expected"),
    [
        ("backend", "", "Mine", "registers the class Mine; a backend must be an instance"),
        ("sampler", "", "Mine(1, 1)", "cannot register its samplers: TypeError: Can't"),
        ("sampler", "", "object()", "registers an instance of object; a sampler must be a class"),
        ("sampler", "", "dict", "registers the sampler dict, which does not extend ca2vdm_cli.Sampler"),
        ("backend", "", "Mine(1)", "cannot register its backends: TypeError"),
        ("backend", "description = ''", "Mine()", "registers the backend Mine, whose name is not a string"),
        ("backend", "name = 'mine'", "Mine()", "registers the backend Mine, whose description is not a string"),
        (
            "backend",
            "name = 'a,b'; description = ''",
            "Mine()",
            "the backend Mine, whose name 'a,b' has spaces or commas",
        ),
        ("backend", NAMED, "Mine()", "registers the backend Mine, which does not implement attend"),
        ("sampler", NAMED, "Mine", "registers the sampler Mine, which does not implement step"),
        ("context", NAMED, "Mine", "registers the context Mine, which does not implement create"),
        ("autoencoder", NAMED, "Mine", "the autoencoder Mine, which does not implement encode"),
        (
            "autoencoder",
            NAMED + "; encode = decode = lambda self, x: x; __init__ = lambda self: None",
            "Mine",
            "the autoencoder Mine, whose __init__ does not take the arguments self, config, video, in_channels",
        ),
        (
            "backend",
            NAMED + "; attend = lambda self, q, k, v: v",
            "Mine()",
            "the backend Mine, whose attend does not take the arguments self, q, k, v, mask",
        ),
        ("sampler", "", "Lazy('lazy', 'no_such_module:x')", "cannot load its sampler 'lazy': ModuleNotFoundError"),
        ("sampler", "", "Lazy('lazy', 'os:nope')", "cannot load its sampler 'lazy': AttributeError"),
        (
            "sampler",
            "",
            "Lazy('lazy', 'ca2vdm_cli.generate.samplers:DdimSampler')",
            "registers the sampler 'lazy', whose own name is 'ddim'",
        ),
    ],
)
def test_plugin_that_registers_something_wrong(
    add_plugin: AddPlugin, refused: Refused, kind: str, body: str, entry: str, expected: str
) -> None:
    add_plugin("faulty", REGISTERING.format(kind=kind, base=kind.title(), body=body or "pass", entry=entry))
    line = refused(1, "plugins")
    assert line.startswith("error: plug-in 'faulty' of faulty ")
    assert expected in line


# Entries of Python code


class Mine(DdimSampler):
    name = "mine"
    description = "for the tests"


@pytest.fixture
def registered(fresh_plugins: None) -> Iterator[None]:
    plugins.samplers.register(Mine)
    yield
    if "mine" in plugins.samplers:
        plugins.samplers.unregister("mine")


def test_python_code_registers(registered: None) -> None:
    assert plugins.samplers["mine"] is Mine
    plugins.forget_plugins()
    assert plugins.samplers["mine"] is Mine
    with pytest.raises(UserError, match="sampler 'mine' is registered by Python code and by Python code"):
        plugins.samplers.register(Mine)
    plugins.samplers.unregister("mine")
    assert "mine" not in plugins.samplers
    with pytest.raises(KeyError):
        plugins.samplers["mine"]
    with pytest.raises(UsageError, match="sampler 'ddim' was not registered from Python"):
        plugins.samplers.unregister("ddim")


def test_python_code_that_registers_something_wrong(fresh_plugins: None) -> None:
    wrong: Any = Backend
    with pytest.raises(UserError, match="Python code registers the class Backend; a backend must be"):
        plugins.backends.register(wrong)
    assert "mine" not in plugins.samplers


def test_a_misspelt_name(fresh_plugins: None) -> None:
    with pytest.raises(UsageError, match=r"sampling.sampler: there is no sampler 'ddmi'; did you mean ddim\?"):
        plugins.samplers.check("ddmi", "sampling.sampler")
    with pytest.raises(UsageError, match="there is no context 'x'; known: cached, recompute, "):
        plugins.contexts.check("x", "strategy")
    plugins.samplers.check("ddim", "sampling.sampler")


# Errors while a plug-in runs; test_plugin_page.py has one for each kind of entry but metrics


def test_an_error_elsewhere_is_not_blamed_on_a_plugin(add_plugin: AddPlugin) -> None:
    add_plugin("good", backend_source())
    backend = plugins.backends["other"]
    assert torch.equal(backend.attend(*torch.zeros(3, 1)), torch.zeros(1))
    with pytest.raises(ZeroDivisionError) as error:
        1 / 0  # noqa: B018
    assert plugins.plugin_failure(error.value) is None


def test_the_innermost_plugin_is_named(add_plugin: AddPlugin) -> None:
    outer = "def attend(self, q, k, v, mask=None):\n        return q.attend(q, k, v)"
    source = backend_source().replace("def attend(self, q, k, v, mask=None):\n        return v", outer)
    add_plugin("outer", source)
    add_plugin("inner", backend_source(name="inner").replace("return v", "raise KeyError('x\\ny')"))
    inner: Any = plugins.backends["inner"]
    with pytest.raises(KeyError) as error:
        plugins.backends["other"].attend(inner, inner, inner)
    failure = plugins.plugin_failure(error.value)
    assert str(failure) == r"plug-in 'inner' of inner failed: KeyError: 'x\ny'; fix or uninstall it"


def test_an_error_of_the_user_stays_as_it_is(add_plugin: AddPlugin, refused: Refused) -> None:
    add_plugin("honest", "from ca2vdm_cli import UsageError\nraise UsageError('no licence found')")
    assert refused(2, "plugins") == "error: no licence found"


def test_importing_the_plugin_manager_leaves_torch_out() -> None:
    script = "import sys, ca2vdm_cli.hookspecs, ca2vdm_cli.plugins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
