"""The journal of a run: a run that goes on from it equals one that was never stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ca2vdm_cli import checkpoint
from ca2vdm_cli.config import DiffusionConfig, SamplingConfig
from ca2vdm_cli.errors import UsageError, UserError
from ca2vdm_cli.files import hold_lock
from ca2vdm_cli.generate import journal as module
from ca2vdm_cli.generate.context import Context, make_context
from ca2vdm_cli.generate.diffusion import NoiseProcess
from ca2vdm_cli.generate.journal import Journal, continued, share_chunks
from ca2vdm_cli.generate.loop import Caption, LatentChunk, SeededNoise, generate
from ca2vdm_cli.generate.samplers import sampler_for
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import samplers

CHUNKS, CHUNK, WINDOW = 7, 2, 6
Run = Callable[..., list[Tensor]]


class Setup:
    """A way to generate, with or without a journal.

    Args:
        model: the network.
        strategy: name of the context.
        videos: number of videos.
        given: number of given frames.
        guidance: guidance scale.
        perturbed: whether finished frames are perturbed.
        sink_frames: sinks of the window.
    """

    def __init__(
        self,
        model: CausalVideoTransformer,
        *,
        strategy: str = "cached",
        videos: int = 1,
        given: int = 0,
        guidance: float = 1.0,
        perturbed: bool = False,
        sink_frames: int = 0,
    ) -> None:
        self.model, self.strategy, self.sink_frames, self.videos = model, strategy, sink_frames, list(range(videos))
        self.count = CHUNKS
        self.process = NoiseProcess(DiffusionConfig(prefix_noise=(0, 50) if perturbed else None))
        self.sampler = sampler_for(self.process, SamplingConfig(), name="ancestral", steps=3)
        self.given = torch.randn(videos, 4, given, 4, 4) if given else None
        self.caption = None
        if model.config.text_channels:
            embedding = torch.randn(videos, model.config.text_tokens, model.config.text_channels)
            self.caption = Caption(embedding, torch.ones(videos, model.config.text_tokens), guidance)

    def chunks(self, journal: Journal | None = None, seed: int = 3) -> Iterator[Tensor]:
        """The latents of each chunk."""
        guided = self.caption is not None and self.caption.guided
        context = make_context(self.model, self.strategy, len(self.videos) * (1 + guided), sink_frames=self.sink_frames)
        noise = SeededNoise(seed, self.videos, self.model.config.chunk_shape, torch.device("cpu"))
        run: Callable[..., Iterator[LatentChunk]] = partial(
            generate, context, self.process, self.sampler, noise, self.count, caption=self.caption
        )
        if journal is None:
            for chunk in run(given=self.given):
                yield chunk.latents
            return
        for chunk in continued(journal, context, self.process, noise, self.count, run, given=self.given):
            if not chunk.from_journal:
                journal.keep(chunk, context)
            yield chunk.latents


def stop_after(count: int, setup: Setup, folder: Path) -> None:
    """Generate the first chunks, as a process that is killed then."""
    chunks = setup.chunks(Journal(folder))
    for _ in range(count):
        next(chunks)
    chunks.close()  # type: ignore[attr-defined]


def same(parts: list[Tensor], others: list[Tensor]) -> bool:
    return len(parts) == len(others) and all(map(torch.equal, parts, others))


@pytest.fixture
def every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot after every chunk."""
    monkeypatch.setattr(module, "SNAPSHOT_SHARE", float("inf"))


@pytest.fixture
def no_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SNAPSHOT_SHARE", 0.0)


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temporal_positions": "cyclic"}, {}),
    ({"temporal_positions": "cyclic"}, {"given": 3, "videos": 3}),
    ({"temporal_positions": "rope"}, {"sink_frames": 2, "given": 2}),
    ({"temporal_positions": "cyclic"}, {"sink_frames": 2, "perturbed": True}),
    ({"temporal_positions": "absolute", "position_table": 32}, {"given": 1, "perturbed": True}),
    ({"spatial_prefix": "first_frame"}, {}),
    ({"text_channels": 8, "text_tokens": 3}, {"guidance": 2.5, "videos": 3, "perturbed": True, "given": 4}),
    ({}, {"strategy": "recompute", "given": 3, "perturbed": True}),
    ({}, {"strategy": "recompute-extendable"}),
]


@pytest.mark.parametrize("snapshots", ["every_chunk", "no_snapshots"])
@pytest.mark.parametrize(("config", "options"), CASES, ids=str)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(
    config: dict[str, Any],
    options: dict[str, Any],
    snapshots: str,
    make_model: Callable[..., CausalVideoTransformer],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue(snapshots)
    setup = Setup(make_model(**config), **options)
    whole = list(setup.chunks())
    for count in (1, 2, 5):  # before and after the window slides, in the same folder
        stop_after(count, setup, tmp_path / "run")
        assert len(list((tmp_path / "run").glob("chunk-*"))) == count
    assert bool(list((tmp_path / "run").glob("context-*"))) == (snapshots == "every_chunk")
    assert same(list(setup.chunks(Journal(tmp_path / "run"))), whole)
    assert same(list(setup.chunks(Journal(tmp_path / "run"))), whole)  # nothing is left to do


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "empty": b"",
            "changed": content[:-1] + bytes([content[-1] ^ 1]),
            "foreign": b"not at all",
        }[how]
    )


@pytest.mark.parametrize("how", ["truncated", "empty", "changed", "foreign"])
def test_a_damaged_chunk_is_generated_again(
    how: str, make_model: Callable[..., CausalVideoTransformer], tmp_path: Path, every_chunk: None
) -> None:
    setup = Setup(make_model(), given=3)
    whole = list(setup.chunks())
    stop_after(6, setup, tmp_path / "run")
    damage(tmp_path / "run" / "chunk-00000003.safetensors", how)
    journal = Journal(tmp_path / "run")
    assert same(list(setup.chunks(journal)), whole)
    assert journal.problems == [f"{tmp_path}/run/chunk-00000003.safetensors: damaged; it is generated again"]
    assert same(list(setup.chunks(Journal(tmp_path / "run"))), whole)


@pytest.mark.parametrize("how", ["truncated", "changed"])
def test_a_damaged_snapshot_is_passed_over(
    how: str, make_model: Callable[..., CausalVideoTransformer], tmp_path: Path, every_chunk: None
) -> None:
    setup = Setup(make_model(temporal_positions="rope"), sink_frames=2)
    whole = list(setup.chunks())
    stop_after(6, setup, tmp_path / "run")
    *_, (_, newest) = Journal(tmp_path / "run").snapshots()
    damage(newest, how)
    journal = Journal(tmp_path / "run")
    assert same(list(setup.chunks(journal)), whole)
    assert journal.problems == [f"{newest}: damaged; an earlier snapshot is used"]


def test_a_snapshot_of_other_sizes_is_passed_over(
    make_model: Callable[..., CausalVideoTransformer], tmp_path: Path, every_chunk: None
) -> None:
    setup, other = Setup(make_model()), Setup(make_model(), videos=2)
    whole = list(setup.chunks())
    stop_after(6, setup, tmp_path / "run")
    stop_after(6, other, tmp_path / "other")
    (tmp_path / "other" / "context-00000005.safetensors").replace(tmp_path / "run" / "context-00000005.safetensors")
    assert same(list(setup.chunks(Journal(tmp_path / "run"))), whole)


def test_failing_at_each_step_of_writing(
    make_model: Callable[..., CausalVideoTransformer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every_chunk: None,
) -> None:
    """Each operation on the disk fails once, as on a full disk; the run then goes on from what it has."""
    setup = Setup(make_model(depth=1), perturbed=True, given=2)
    setup.count = 2
    whole, left, failures = list(setup.chunks()), [0], 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            return function(*arguments, **options)

        return wrapped

    for owner, name in ((os, "fsync"), (os, "chmod"), (Path, "replace"), (checkpoint, "save_file")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    for operation in range(1, 200):
        left[0] = operation
        folder = tmp_path / str(operation)
        with suppress(UserError):
            assert same(list(setup.chunks(Journal(folder))), whole)
            if left[0] > 0:  # nothing has failed
                break
            continue  # only a snapshot has
        failures += 1
        left[0] = 0
        assert same(list(setup.chunks(Journal(folder))), whole)
        assert not list(folder.glob(".*"))
    assert failures > 3 * setup.count


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.check({"seed": 3, "steps": 5})
    with journal.open():
        pass
    Journal(tmp_path).check({"seed": 3, "steps": 5})
    with pytest.raises(UsageError, match=r"journal: .* holds another run, with seed 3, not 4; use another folder"):
        Journal(tmp_path).check({"seed": 4, "steps": 5})
    (tmp_path / "journal.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"journal.json: missing or damaged"):
        Journal(tmp_path).check({"seed": 3, "steps": 5})


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    lock = hold_lock(tmp_path / "lock")
    assert lock is not None
    with pytest.raises(UsageError, match="another process is writing it"), Journal(tmp_path).open():
        pass
    os.close(lock)
    with Journal(tmp_path).open():
        pass


def test_snapshots_stay_within_their_bounds(
    make_model: Callable[..., CausalVideoTransformer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the time, and of the space, in which the remaining ones are spread over the video."""
    setup = Setup(make_model())
    journal = Journal(tmp_path / "run")
    context = make_context(setup.model, "cached", 1)
    context.append(torch.zeros(1, 4, 2, 4, 4))
    size = sum(tensor.nbytes for tensor in context.state().values())
    monkeypatch.setattr(module, "SNAPSHOT_BYTES", 4 * size)
    latents = torch.zeros(1, 4, 2, 4, 4)

    def keep(index: int, context: Context, seconds: float) -> None:
        journal.keep(LatentChunk(index, 2 + 2 * index, latents, latents, 0.0, seconds), context)

    (tmp_path / "run").mkdir()
    for index in range(10):
        keep(index, context, 0.0)
    assert journal.snapshots() == []
    for index in range(10, 50):
        keep(index, context, 1000.0)
    kept = [index for index, _ in journal.snapshots()]
    assert len(kept) == 4
    assert kept[-1] == 49
    assert all(5 <= later - earlier <= 30 for earlier, later in pairwise(kept))
    monkeypatch.setattr(module, "SNAPSHOT_BYTES", 1)
    keep(50, context, 1000.0)
    assert [index for index, _ in journal.snapshots()] == [50]


def test_a_branch_shares_chunks(
    make_model: Callable[..., CausalVideoTransformer], tmp_path: Path, every_chunk: None
) -> None:
    setup = Setup(make_model(temporal_positions="rope"), sink_frames=2, given=2, perturbed=True)
    whole = list(setup.chunks(Journal(tmp_path / "run")))
    for name, snapshots in (("with", True), ("without", False)):
        share_chunks(tmp_path / "run", tmp_path / name, 4, snapshots=snapshots)
        assert len(list((tmp_path / name).glob("context-*"))) == int(snapshots)
    takes = [list(setup.chunks(Journal(tmp_path / name), seed=8)) for name in ("with", "without")]
    assert same(*takes)
    assert same(takes[0][:4], whole[:4])
    assert not any(map(torch.equal, takes[0][4:], whole[4:]))
    assert (tmp_path / "with" / "chunk-00000000.safetensors").stat().st_nlink == 3
    assert json.loads((tmp_path / "with" / "journal.json").read_text()) == {}


def test_every_sampler_starts_each_chunk_anew(
    make_model: Callable[..., CausalVideoTransformer], tmp_path: Path
) -> None:
    for name in samplers.builtin_names():
        setup = Setup(make_model(depth=1))
        setup.sampler = sampler_for(setup.process, SamplingConfig(), name=name, steps=3)
        stop_after(3, setup, tmp_path / name)
        assert same(list(setup.chunks(Journal(tmp_path / name))), list(setup.chunks()))
