"""Checkpoints of other training scripts, for ``import``: safetensors and PyTorch files, whole or in shards.

The model's tensors may lie under any wrapper and any prefix: ``{"ema": {"module.x": …}}`` and ``ema.module.x`` are the
same. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import load_tensors, what_it_is
from .errors import UsageError, UserError, as_user_error

MAX_NESTING = 8
"""How deeply a state dict may be nested in a file."""
MAX_INDEX = 2**24
"""Size limit of an index in bytes."""
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Wrappers of PyTorch, which can be anywhere in a name."""
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged?|shadow)(?:[._]|$)")
"""Names of averaged weights, which are preferred."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.\w+")
_PYTORCH = (b"PK\x03\x04", b"\x80")
"""How PyTorch's files begin: a zip archive, or a pickle."""
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class PublishedWeights:
    """A model's weights, and where they were in a file."""

    tensors: dict[str, Tensor]
    """By the model's names; also what else was at that place."""
    place: str
    """The wrappers and prefixes before the model's names, such as ``ema.module.``; empty at the top level."""
    others: tuple[str, ...]
    """Other places with weights of the model, which were not used."""


def read_published(path: Path, names: Collection[str]) -> PublishedWeights:
    """The weights of a checkpoint.

    Args:
        path: a file (.safetensors, or PyTorch's), an index of shards (``*.index.json``), or a folder with one of them.
        names: the names of the model's tensors. They are looked for at every place in the file: the averaged weights
            are taken, or else those at the place with most of the names.

    Raises:
        UserError: it can't be read, or reading it would require unpickling code.
    """
    path = _file_in(path) if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    with as_user_error(f"{path}: cannot be read", "check its permissions"):
        states = _state_dicts(_read_shards(path) if path.suffix == ".json" else _read_file(path))
    if not states:
        raise UserError(f"{path}: no state dict of tensors, at any place in the file; save the model's state dict")
    places = Counter(
        (wrapper, key[: len(key) - len(name)])
        for wrapper, state in states.items()
        for key in state
        for name in _endings(key)
        if name in names
    ).most_common()
    if not places:
        return PublishedWeights(next(iter(states.values())), "", ())
    most = places[0][1]
    near = {wrapper + prefix: (wrapper, prefix) for (wrapper, prefix), count in places if 2 * count > most}
    place = next((place for place in near if _AVERAGED.search(place)), next(iter(near)))
    wrapper, prefix = near.pop(place)
    state = states[wrapper]
    tensors = {key: value for key, value in state.items() if not key.startswith(prefix)}
    tensors |= {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if len(tensors.keys() & names) < len(names) and (shard := _SHARD.search(path.name)):
        raise UserError(
            f"{path}: this is shard {int(shard[1])} of {int(shard[2])}; name the folder, or its index of the shards"
        )
    return PublishedWeights(tensors, place, tuple(near))


def _endings(key: str) -> Iterator[str]:
    """A dotted name, then without its first part, and so on."""
    while key:
        yield key
        key = key.partition(".")[2]


def _state_dicts(content: object) -> dict[str, dict[str, Tensor]]:
    """The dicts with tensors in a file, by the keys that lead to them: ``""``, ``"ema."``."""
    states: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()  # dicts may contain each other

    def walk(value: object, wrapper: str, depth: int) -> None:
        if id(value) in seen or depth > MAX_NESTING or not isinstance(value, Mapping):
            return
        seen.add(id(value))
        state = {_WRAPPED.sub("", str(key)): inner for key, inner in value.items() if isinstance(inner, Tensor)}
        if state:
            states[wrapper] = state
        for key, inner in value.items():
            walk(inner, f"{wrapper}{key}.", depth + 1)

    walk(content, "", 0)
    return states


def _read_file(path: Path) -> Any:
    """The content of one file, by what it is rather than by its suffix."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" or (path.suffix == ".safetensors" and not start.startswith(_PYTORCH)):
        return load_tensors(path)[0]
    if not start.startswith(_PYTORCH):
        meaning = what_it_is(path) or "damaged, or of an unknown kind; get the weights as safetensors"
        raise UserError(f"{path}: not a plain checkpoint of tensors: it is {meaning}")
    try:
        with warnings.catch_warnings(), path.open("rb") as file:  # torch would judge a path by its suffix
            warnings.simplefilter("ignore")  # the error below says what is wrong
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make the unpickler raise anything
        # PyTorch's message advises unpickling anyway; only the name it mentions is useful
        match = re.search(r"GLOBAL (\S+)", str(error))
        problem = f"it contains {match[1]}" if match else "it is damaged, or contains more than tensors"
        raise UserError(
            f"{path}: not a plain checkpoint of tensors: {problem}; save only its state dict, or as safetensors"
        ) from None


def _read_shards(path: Path) -> dict[str, Any]:
    """The tensors of all shards that an index names."""
    try:
        if path.stat().st_size > MAX_INDEX:
            raise ValueError
        shards = json.loads(path.read_bytes())["weight_map"]
        files = sorted({Path(str(name)) for name in shards.values()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: not an index of shards: it has no weight_map of tensors to files") from None
    tensors: dict[str, Any] = {}
    for file in files:
        if file.name != str(file) or not (path.parent / file).is_file():
            raise UserError(f"{path}: the shard {file} is not beside it; put all shards into one folder")
        content = _read_file(path.parent / file)
        tensors |= content if isinstance(content, dict) else {}
    if absent := sorted(shards.keys() - tensors.keys()):
        raise UserError(
            f"{path}: {len(absent)} of {len(shards)} tensors are in none of the shards, the first is {absent[0]}; "
            "get the shards again"
        )
    return tensors


def _file_in(folder: Path) -> Path:
    """The only checkpoint, or index of shards, in a folder."""
    with as_user_error(f"{folder}: cannot be read", "check its permissions"):
        entries = sorted(folder.iterdir())
    indexes = [entry for entry in entries if entry.name.endswith(".index.json")]
    files = [entry for entry in entries if entry.suffix in _SUFFIXES]
    for choice in (indexes, files):
        best = [entry for entry in choice if ".safetensors" in entry.name] or choice
        if len(best) == 1:
            return best[0]
        if best:
            names = ", ".join(entry.name for entry in best[:4])
            raise UsageError(f"{folder}: has several checkpoints ({names}); name one of them")
    raise UsageError(f"{folder}: a folder without a checkpoint; name a file: {', '.join(_SUFFIXES)}")
