"""Weights on disk: safetensors of our own, and published-format checkpoints that are imported. Nothing is unpickled."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UsageError, UserError, first_line

WRAPPERS = ("ema", "model", "state_dict")
"""Keys under which training programs wrap a state dict."""

WRAPPED = 4
"""How many of them may be around one another."""

UNUSED = frozenset({"bov_token"})
"""Entries of published checkpoints that the published model carries but never reads."""


@dataclass(frozen=True)
class KeyReport:
    """Which keys of a state dict fit a model."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises:
        UserError: no such file, or not one of this format.
    """
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: you may not read it; check its permissions")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        advice = "" if path.suffix == ".safetensors" else "; a published checkpoint needs ca2vdm import first"
        raise UserError(f"{path}: not a readable safetensors file ({error}){advice}") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that a crash leaves either the old file or the new one.

    Raises:
        UserError: it can't be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata or {})
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files for their owner alone
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({first_line(error)}); check permissions and free space") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str, *, partial: bool = False, extra: bool = False
) -> KeyReport:
    """Put a state dict into a model.

    Args:
        model: any module.
        weights: tensors in its own key names.
        source: what to name in errors.
        partial: allow missing keys, which keep the model's own values.
        extra: allow keys that the model does not have.

    Raises:
        UserError: a shape that differs (both are named), a missing key (unless ``partial``), a left-over one (unless
            ``extra``), or nothing that matches.
    """
    own = model.state_dict()
    matched = [key for key in own if key in weights]
    missing = [key for key in own if key not in weights]
    left_over = [key for key in weights if key not in own and key not in UNUSED]
    for key in matched:
        if own[key].shape != weights[key].shape:
            raise UserError(
                f"{source}: {key} has shape {tuple(weights[key].shape)}, the model wants {tuple(own[key].shape)}; "
                "choose the preset these weights were trained with"
            )
    if not matched or (missing and not partial):
        first = missing[0] if missing else next(iter(own), "")
        raise UserError(
            f"{source}: {len(missing)} of {len(own)} tensors are missing, the first {first}; choose the "
            "preset these weights were trained with"
        )
    if left_over and not extra:
        raise UserError(
            f"{source}: {len(left_over)} tensors have no place in the model, the first {left_over[0]}; choose the "
            "preset these weights were trained with"
        )
    model.load_state_dict({key: weights[key] for key in matched}, strict=False)
    return KeyReport(tuple(matched), tuple(missing), tuple(left_over))


def read_published(path: Path) -> dict[str, Tensor]:
    """The state dict of a published-format checkpoint: .safetensors, or .pt/.pth read with ``weights_only``.

    The dict may be wrapped in ``ema``, ``model`` or ``state_dict`` (in this order of preference), and its keys may
    start with ``module.``.

    Raises:
        UserError: not such a file, or one that would need unpickling of code.
    """
    if path.suffix == ".safetensors":
        found: Any = load_tensors(path)[0]
    else:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong with the file is said below
                found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can make the unpickler raise anything
            # PyTorch's own message advises to unpickle all the same; only what it names is worth repeating
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f"it holds {named[1]}" if named else "it is damaged, or holds more than tensors"
            raise UserError(
                f"{path}: not a plain checkpoint of tensors: {what}; save its state dict alone, or as safetensors"
            ) from None
    for _ in range(WRAPPED):
        inner = None
        if isinstance(found, dict):
            inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    items = found.items() if isinstance(found, dict) else ()
    tensors = {str(key).removeprefix("module."): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no state dict of tensors, neither bare nor under {', '.join(WRAPPERS)}")
    return tensors
