"""A context that a user registers takes part in ``bench --compare`` and ``verify``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_kit import RUN, Refused, Report, ca2vdm
from torch import Tensor

from ca2vdm_cli.generate.context import CachedContext, Context, RecomputedContext, contexts

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
TINY = ["--preset", "tiny", *RUN, "--dtype", "float32", "--steps", 2]


class MyCache(CachedContext):
    """The built-in cache under another name: exact, but with no formula of its own."""

    name = "my-cache"
    description = "a cache of my own"


class MyRecompute(RecomputedContext):
    name = "my-recompute"
    description = "the window, recomputed"


class Wrong(MyCache):
    name = "wrong"

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().predict(x, timestep) + 1


class Approximate(Wrong):
    name = "approximate"
    exact = False


MINE: tuple[type[Context], ...] = (MyCache, MyRecompute, Wrong, Approximate)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    for context in MINE:
        contexts.register(context)
    yield
    for context in MINE:
        contexts.unregister(context.name)


def test_it_is_measured_and_its_outputs_are_compared(report: Report) -> None:
    result = report("bench", *TINY, "--compare", "my-cache,my-recompute", "-o", "out.html", "-o", "out.csv")
    assert list(result["results"]) == ["cached", "my-cache", "my-recompute"]
    assert result["outputs_agree"] is True
    assert list(result["speedup_per_step"]) == ["my-cache", "my-recompute"]
    assert set(result["growth"]["frames"]) == set(result["growth"]["context_frames"]) == set(result["results"])
    cached, cache = result["results"]["cached"], result["results"]["my-cache"]
    for key in ("flops_per_step", "cache_write_flops", "cache_bytes", "flops_per_chunk"):
        assert cache[key] == cached[key] > 0
    assert cache["peak_memory_bytes"] > 0
    for name in ("my-cache", "my-recompute"):
        assert f"<td>{name}</td>" in Path("out.html").read_text() and f",{name}," in Path("out.csv").read_text()


def test_formulas_are_used_only_for_contexts_that_they_describe(report: Report) -> None:
    """A user's own cache has no formula; a context that recomputes has the formula of recomputing."""
    result = report("bench", *TINY, "--compare", "my-cache,my-recompute", "--frames", 8)
    cache, recompute = (result["results"][name] for name in ("my-cache", "my-recompute"))
    formulas = ("flops_per_step_by_formula", "cache_write_flops_by_formula", "cache_bytes_by_formula", "flops_error")
    assert [cache[key] for key in formulas] == [None] * 4
    assert recompute["flops_per_step_by_formula"] == recompute["flops_per_step"] > 0
    assert [recompute[key] for key in formulas[1:]] == [0, 0, 0]
    assert result["flops_agree"] is True and result["cache_bytes_agree"] is True


def test_bench_says_that_outputs_of_a_wrong_one_differ(capsys: pytest.CaptureFixture[str]) -> None:
    assert ca2vdm("bench", *TINY, "--compare", "wrong,recompute", "--frames", 8) == 0
    assert "outputs DIFFER by 1.0e+00" in capsys.readouterr().out
    assert ca2vdm("bench", *TINY, "--compare", "approximate", "--frames", 8, "--json") == 0
    assert json.loads(capsys.readouterr().out)["outputs_agree"] is None


def test_verify_checks_every_exact_context_that_it_is_asked_for(report: Report) -> None:
    result = report("verify", *TINY, "--compare", "my-cache,recompute,recompute-extendable,my-recompute")
    assert result["ok"] is True
    rows = [row for row in result["results"] if row["tensor"] == "frames 8–11"]
    assert [row["method"] for row in rows] == ["my-cache", "recompute", "recompute-extendable", "my-recompute"]
    assert len(result["results"]) == 4 * 5


def test_verify_names_a_wrong_one(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    result = report("verify", *TINY, "--compare", "recompute,wrong", code=1)
    assert {(row["method"], row["ok"]) for row in result["results"] if row["tolerance"]} == {
        ("recompute", True),
        ("wrong", False),
    }
    assert ca2vdm("verify", *TINY, "--compare", "recompute,wrong") == 1
    out, err = capsys.readouterr()
    assert out.count("differs") == 3
    assert "NOT EQUAL: frames 0–3 (wrong), frames 4–7 (wrong), frames 8–11 (wrong)" in err


def test_verify_refuses_what_is_not_exact(refused: Refused) -> None:
    line = refused(2, "verify", *TINY, "--compare", "recompute,approximate")
    assert line == "error: --compare approximate: its outputs are not meant to equal those of cached; leave it out"
    assert "at least one context" in refused(2, "verify", *TINY, "--compare", "cached")
    assert "there is no context 'nope'" in refused(2, "verify", *TINY, "--compare", "nope")
