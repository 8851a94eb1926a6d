"""A journal of finished chunks on disk, with which a run goes on after Ctrl-C, a crash or a reboot.

    FOLDER/journal.json                    which run it belongs to
    FOLDER/given.safetensors               the given frames, as the context gets them
    FOLDER/chunk-00000012.safetensors      latents of chunk 12
    FOLDER/context-00000012.safetensors    a snapshot of the context, which holds the chunks before chunk 12

A chunk counts as finished when its file is complete and on disk. A resumed run loads the newest snapshot and appends
the chunks after it to the context once more: one forward a chunk, and no denoising.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ca2vdm_cli.checkpoint import load_tensors, save_tensors
from ca2vdm_cli.config import Preset
from ca2vdm_cli.errors import UsageError, UserError, as_user_error
from ca2vdm_cli.files import ADVICE, hold_lock, read_json, write_durably, write_json
from ca2vdm_cli.runtime import dtype_name

from .context import Context
from .diffusion import NoiseProcess
from .loop import Caption, LatentChunk, NoiseSource
from .samplers import Sampler

FACTS_FILE = "journal.json"
GIVEN_FILE = "given.safetensors"
LOCK_FILE = "lock"
SNAPSHOT_BYTES = 256 * 2**20
"""Bytes that all snapshots may take together; the newest one is kept whatever it takes."""
SNAPSHOT_SHARE = 0.02
"""Share of the time of generating that snapshots may take."""
SNAPSHOT_SPEED = 200e6
"""Bytes per second at which the first snapshot is expected to be written."""
_SNAPSHOT = re.compile(r"context-([0-9]{8,12})\.safetensors")


class Journal:
    """Finished chunks of videos that are generated together. Use it in one run at a time; it is locked meanwhile.

    Args:
        folder: created with the first finished chunk.

    Attributes:
        count: number of finished chunks.
        problems: one line for each file that turned out to be damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.count = 0
        self.problems: list[str] = []
        self._facts: dict[str, Any] = {}
        self._generating = self._snapshotting = 0.0
        self._expected: float | None = None  # seconds that a snapshot takes

    def check(self, facts: Mapping[str, Any]) -> None:
        """Remember what determines the run's latents.

        Args:
            facts: plain values by name.

        Raises:
            UsageError: the folder holds another run.
        """
        self._facts = dict(facts)
        if not (self.folder / FACTS_FILE).exists():
            return
        earlier = read_json(self.folder / FACTS_FILE)
        for name in facts.keys() | earlier.keys():
            if facts.get(name) != earlier.get(name):
                values = f"{name} {earlier.get(name)!r}, not {facts.get(name)!r}"
                raise UsageError(f"journal: {self.folder} holds another run, with {values}; use another folder")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lock the folder.

        Raises:
            UsageError: another process writes it.
            UserError: it cannot be written.
        """
        with as_user_error(f"{self.folder}: cannot be written", ADVICE):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = hold_lock(self.folder / LOCK_FILE)
        if lock is None:
            raise UsageError(f"journal: {self.folder}: another process is writing it; use another folder")
        try:
            if not (self.folder / FACTS_FILE).exists():
                write_json(self.folder / FACTS_FILE, self._facts)
            yield
        finally:
            os.close(lock)

    def chunks(self, most: int) -> Iterator[LatentChunk]:
        """The finished chunks, at most this many, up to the first that is damaged. Sets ``count``."""
        for self.count in range(most + 1):
            if self.count == most or not self.chunk_path(self.count).exists():
                return
            try:
                tensors, metadata = load_tensors(self.chunk_path(self.count))
                first_frame, latents = int(metadata["first_frame"]), tensors["latents"]
            except (UserError, KeyError, ValueError):
                self.problems.append(f"{self.chunk_path(self.count)}: damaged; it is generated again")
                return
            yield LatentChunk(self.count, first_frame, latents, tensors.get("appended", latents), 0.0, 0.0, True)

    def keep(self, chunk: LatentChunk, context: Context) -> None:
        """Write a new chunk, and now and then a snapshot of the context, which has all chunks before it.

        Raises:
            UserError: it cannot be written.
        """
        tensors = {"latents": chunk.latents}
        if chunk.appended is not chunk.latents and not torch.equal(chunk.appended, chunk.latents):
            tensors["appended"] = chunk.appended
        self._generating += chunk.denoise_seconds + chunk.write_seconds
        seconds = f"{chunk.denoise_seconds + chunk.write_seconds:.6f}"
        save_tensors(self.chunk_path(chunk.index), tensors, {"first_frame": str(chunk.first_frame), "seconds": seconds})
        self.count = chunk.index + 1
        if chunk.first_frame:
            self._keep_snapshot(chunk.index, context.state())

    def keep_given(self, appended: Tensor) -> None:
        """Write the given frames (B, C, P, h, w), perturbed if the weights were trained so."""
        save_tensors(self.folder / GIVEN_FILE, {"appended": appended})

    def has_given(self) -> bool:
        """Whether the given frames have been written."""
        return (self.folder / GIVEN_FILE).exists()

    def restore(self, context: Context) -> Iterator[Tensor]:
        """Restore the newest snapshot to a new context; returns what must be appended to it, oldest first."""
        device = context.model.device
        for index, path in reversed(self.snapshots()):
            if index > self.count:
                continue
            try:
                context.restore(load_tensors(path)[0])
            except (UserError, KeyError, RuntimeError, NotImplementedError):
                self.problems.append(f"{path}: damaged; an earlier snapshot is used")
                continue
            return (self._appended(self.chunk_path(k)).to(device) for k in range(index, self.count))
        given = [self.folder / GIVEN_FILE] if self.has_given() else []
        paths = [*given, *(self.chunk_path(k) for k in range(self.count))]
        return (self._appended(path).to(device) for path in paths)

    def chunk_path(self, index: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"chunk-{index:08d}.safetensors"

    def snapshots(self) -> list[tuple[int, Path]]:
        """Number of chunks in the context, and file, of each snapshot, oldest first."""
        matches = [(_SNAPSHOT.fullmatch(path.name), path) for path in self.folder.glob("context-*")]
        return sorted((int(match[1]), path) for match, path in matches if match)

    @staticmethod
    def _appended(path: Path) -> Tensor:
        tensors, _ = load_tensors(path)
        return tensors["appended"] if "appended" in tensors else tensors["latents"]

    def _keep_snapshot(self, index: int, state: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in state.values())
        expected = 0.01 + size / SNAPSHOT_SPEED if self._expected is None else self._expected
        if not state or self._snapshotting + expected > SNAPSHOT_SHARE * self._generating:
            return
        began = time.perf_counter()
        path = self.folder / f"context-{index:08d}.safetensors"
        try:
            save_tensors(path, state)
        except UserError as error:  # a run can be resumed without it
            self.problems.append(str(error))
            self._expected = float("inf")
            return
        self._thin(size)
        self._expected = time.perf_counter() - began
        self._snapshotting += self._expected

    def _thin(self, size: int) -> None:
        """Remove snapshots until all fit ``SNAPSHOT_BYTES``, so that the others are spread evenly over the video."""
        snapshots = self.snapshots()
        while len(snapshots) > max(1, SNAPSHOT_BYTES // size):
            numbers = [0, *(index for index, _ in snapshots)]
            gaps = [numbers[i + 2] - numbers[i] for i in range(len(snapshots) - 1)]
            _, path = snapshots.pop(gaps.index(min(gaps)))
            path.unlink(missing_ok=True)


def continued(
    journal: Journal,
    context: Context,
    process: NoiseProcess,
    noise: NoiseSource,
    chunks: int,
    run: Callable[..., Iterator[LatentChunk]],
    *,
    given: Tensor | None,
) -> Iterator[LatentChunk]:
    """The chunks that a journal has, then new ones, which the caller keeps in it.

    Args:
        journal: checked, see ``Journal.check``.
        context: an empty one.
        process: the model's noise process.
        noise: the run's randomness.
        chunks: number of chunks.
        run: ``generate`` with all arguments but ``given``, ``first`` and ``finished``.
        given: clean latents to continue.
    """
    with journal.open():
        yield from journal.chunks(chunks)
        if given is not None and not journal.has_given():
            noise.chunk(-1)
            journal.keep_given(noise.perturb(process, given))
        if journal.count < chunks:
            yield from run(first=journal.count, finished=journal.restore(context))


def run_facts(
    config: Preset, context: Context, sampler: Sampler, caption: Caption | None, given: np.ndarray | None
) -> dict[str, Any]:
    """What determines a run's latents beside its seed, for ``Journal.check``.

    Args:
        config: the preset.
        context: the run's context.
        sampler: the run's sampler.
        caption: what the videos show.
        given: the given frames' pixels.
    """
    weights = context.model.state_dict()
    settings = repr((config.model, config.diffusion, config.sampling.last_timestep))
    return {
        "settings": f"{zlib.crc32(settings.encode()):08x}",
        "weights": checksum([weights[name] for name in sorted(weights)]),
        "dtype": dtype_name(context.model.dtype),
        "sampler": sampler.name,
        "steps": len(sampler.timesteps),
        "context_frames": context.window.context_frames,
        "guidance": None if caption is None else caption.guidance_scale,
        "caption": None if caption is None else checksum([caption.embedding, caption.mask]),
        "given": None if given is None else f"{zlib.crc32(np.ascontiguousarray(given).data):08x}",
    }


def share_chunks(source: Path, target: Path, count: int, *, snapshots: bool) -> None:
    """Begin a journal with the first chunks of another, as hard links or else copies.

    Args:
        source: folder of the journal.
        target: folder of the new one.
        count: number of chunks.
        snapshots: whether the new run's contexts are the same up to there, so that it can use the snapshots too.

    Raises:
        UserError: it cannot be written.
    """
    journal = Journal(source)
    files = [journal.chunk_path(index) for index in range(count)]
    files += [source / GIVEN_FILE] if journal.has_given() else []
    earlier = [path for index, path in journal.snapshots() if index <= count]
    files += earlier[-1:] if snapshots else []
    with as_user_error(f"{target}: cannot be written", ADVICE):
        target.mkdir(parents=True, exist_ok=True)
        for path in files:
            try:
                os.link(path, target / path.name)
            except OSError:  # another file system, or one without hard links
                write_durably(target / path.name, lambda copy, path=path: _copy(path, copy))  # type: ignore[misc]


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def checksum(tensors: Sequence[Tensor]) -> str:
    """A short checksum of tensors: their types, shapes and first values."""
    total = zlib.crc32(repr([(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]).encode())
    for tensor in tensors:
        values = tensor.detach().reshape(-1)[:4096].cpu()
        total = zlib.crc32(values.view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
