"""Methods in lockstep: what is timed, and what is compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ca2vdm_cli.bench.lockstep import Lockstep, SideBySide
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.generate.context import Context, contexts
from ca2vdm_cli.model.kv_cache import TextKeysValues
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.pipeline import Pipeline

MakeModel = Callable[..., CausalVideoTransformer]

COMPILING = 0.2
"""Seconds that the first forward of a new shape takes."""


class Answering(Context):
    """Always predicts the same value; slow if the context has grown since the last prediction."""

    exact = True

    def __init__(self, model: CausalVideoTransformer, answer: float) -> None:
        self.model, self.window, self.answer = model, TemporalWindow(model.config), answer
        self._frames, self._seen = 0, -1

    def set_text(self, text: list[TextKeysValues]) -> None:
        pass

    @property
    def frames(self) -> int:
        return self._frames

    @property
    def nbytes(self) -> int:
        return 0

    def append(self, latents: Tensor) -> None:
        self._frames += latents.shape[2]

    def open_chunk(self) -> None:
        pass

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        seen = len(self.window.context(self._frames))
        if seen != self._seen:
            time.sleep(COMPILING)
        self._seen = seen
        return torch.full_like(x, self.answer)


def lockstep(make_model: MakeModel, *answers: float) -> Lockstep:
    model = make_model()
    methods = ("recompute", "recompute-extendable")
    return Lockstep({method: Answering(model, answer) for method, answer in zip(methods, answers, strict=True)})


def chunk(steps: Lockstep, count: int = 2) -> None:
    """A few denoising steps of a chunk, which is then appended."""
    x = torch.zeros(1, 4, 2, 4, 4)
    steps.open_chunk()
    for _ in range(count):
        steps.predict(x, torch.zeros(1))
    steps.append(x)


def test_the_first_forward_of_a_shape_is_not_timed(make_model: MakeModel) -> None:
    steps = lockstep(make_model, 1.0, 1.0)
    for _ in range(3):
        chunk(steps)
        for seconds in steps.step_seconds.values():
            assert len(seconds) == 2
            assert max(seconds) < COMPILING / 2


def test_a_cache_has_one_shape_and_gets_one_untimed_call(make_model: MakeModel) -> None:
    model = make_model()
    methods: dict[str, Answering] = {name: Answering(model, 1.0) for name in contexts}
    for name, method in methods.items():
        method.caches = contexts[name].caches  # type: ignore[misc]
    steps = Lockstep(dict(methods))
    calls = dict.fromkeys(methods, 0)

    def count(name: str, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
        calls[name] += 1
        return predict(x, t)

    for name, context in methods.items():
        context.predict = partial(count, name, context.predict)  # type: ignore[method-assign]
    for _ in range(3):
        chunk(steps)
    assert {name for name, times in calls.items() if times == 2 * 3 + 1} == {"cached", "per-step-cache"}
    assert all(times == 2 * 3 + 3 for name, times in calls.items() if not contexts[name].caches)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_methods_take_turns_at_going_first(make_model: MakeModel, count: int) -> None:
    """In each denoising step from chunk to chunk, whatever the number of steps, and in appending."""
    steps = lockstep(make_model, 1.0, 1.0)
    order: list[str] = []

    def note(name: str, call: Callable[..., Any], *arguments: Tensor) -> Any:
        order.append(name)
        return call(*arguments)

    for name, context in steps.contexts.items():
        context.append = partial(note, name, context.append)  # type: ignore[method-assign]
    for _ in range(6):
        chunk(steps)  # until the window is full, so that no warm-up calls follow
    for name, context in steps.contexts.items():
        context.predict = partial(note, name, context.predict)  # type: ignore[method-assign]
        context.window.context = lambda start: list(range(6))  # type: ignore[method-assign]
    firsts = []
    for _ in range(4):
        order.clear()
        chunk(steps, count)
        firsts.append(order[::2])
    for calls in zip(*firsts, strict=True):
        assert calls[0] != calls[1] and calls[0] == calls[2] and calls[1] == calls[3]


def test_every_step_is_compared(make_model: MakeModel) -> None:
    steps = lockstep(make_model, -2.0, -1.75)
    chunk(steps)
    assert steps.differences == {"recompute-extendable": 0.25}
    assert steps.scale == 2.0


def test_nan_is_an_error_and_not_equal(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="the model's output is not finite in float32"):
        chunk(lockstep(make_model, 1.0, float("nan")))


def test_an_output_of_the_wrong_shape_is_an_error(make_model: MakeModel) -> None:
    steps = lockstep(make_model, 1.0, 1.0)
    steps.contexts["recompute-extendable"].predict = lambda x, timestep: x[:, :, :1]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="context 'recompute-extendable': its output has shape"):
        chunk(steps)


def test_all_methods_continue_from_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is compared on its own: differences do not accumulate."""
    pipeline = Pipeline.load("tiny", random_weights=True, backend="eager", device="cpu", dtype="float32")
    seen: dict[str, list[Tensor]] = {"cached": [], "recompute": []}
    compared = SideBySide(pipeline, 2, steps=2)

    def remember(method: str, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
        if not seen[method] or not torch.equal(seen[method][-1], x):  # a warm-up call repeats the input
            seen[method].append(x.clone())
        return predict(x, t) + (0.1 if method == "recompute" else 0)

    for method, context in compared.lockstep.contexts.items():
        monkeypatch.setattr(context, "predict", partial(remember, method, context.predict))
    rows = list(compared)
    assert [row.difference for row in rows] == pytest.approx([0.1, 0.1], abs=1e-5)
    assert len(seen["cached"]) == len(seen["recompute"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))
