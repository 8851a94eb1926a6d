"""Weights on disk: our safetensors files, and published-format checkpoints for import. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UsageError, UserError, first_line

CHECKSUM = "ca2vdm_crc32"
"""Metadata key of the CRC-32 of all tensors and of the other metadata. Files without one are accepted as they are."""
WRAPPERS = ("ema", "model", "state_dict")
"""Keys under which training scripts nest a state dict."""
MAX_NESTING = 4
"""How many levels of them may be nested."""
UNUSED = frozenset({"bov_token"})
"""Entries of published checkpoints that the published model carries but never reads."""


@dataclass(frozen=True)
class KeyReport:
    """How the keys of a state dict match a model."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata without the checksum.

    Raises:
        UserError: there is no such file, it is not a safetensors file, or it differs from what ``save_tensors`` wrote.
    """
    with _open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    recorded = metadata.pop(CHECKSUM, None)
    if recorded is not None and recorded != _checksum(tensors, metadata):
        raise UserError(
            f"{path}: damaged: its content does not have the checksum that it was written with; "
            "copy it again from an intact one, or use another"
        )
    return tensors, metadata


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it; check its permissions")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        advice = "" if path.suffix == ".safetensors" else "; a published checkpoint needs ca2vdm import first"
        raise UserError(f"{path}: not a readable safetensors file ({error}){advice}") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that a crash leaves either the old file or the new one.

    Raises:
        UserError: the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {key: value for key, value in (metadata or {}).items() if key != CHECKSUM}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {**metadata, CHECKSUM: _checksum(tensors, metadata)})
        temporary.chmod(0o666 & ~_umask())  # safetensors creates files that only their owner can read
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({first_line(error)}); check permissions and free space") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of everything in a file: metadata, names, dtypes, shapes and bytes.

    It finds any damage within 32 bits, and other damage but for one case in 4·10⁹, at 2 GB/s on one core.
    """
    facts = [(key, str(tensors[key].dtype), tuple(tensors[key].shape)) for key in sorted(tensors)]
    crc = zlib.crc32(json.dumps([sorted(metadata.items()), facts]).encode())
    for key, *_ in facts:
        crc = zlib.crc32(tensors[key].flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str, *, partial: bool = False, extra: bool = False
) -> KeyReport:
    """Load a state dict into a model.

    Args:
        model: any module.
        weights: tensors by the model's key names.
        source: where the weights come from, for errors.
        partial: allow missing keys; the model keeps its values there.
        extra: allow keys that the model does not have.

    Raises:
        UserError: a shape differs (both are named), a key is missing (unless ``partial``) or left over (unless
            ``extra``), or no key matches.
    """
    own = model.state_dict()
    matched = [key for key in own if key in weights]
    missing = [key for key in own if key not in weights]
    left_over = [key for key in weights if key not in own and key not in UNUSED]
    for key in matched:
        if own[key].shape != weights[key].shape:
            raise UserError(
                f"{source}: {key} has shape {tuple(weights[key].shape)}, the model needs {tuple(own[key].shape)}; "
                "choose the preset these weights were trained with"
            )
    if not matched or (missing and not partial):
        first = missing[0] if missing else next(iter(own), "")
        raise UserError(
            f"{source}: {len(missing)} of {len(own)} tensors are missing, the first is {first}; choose the "
            "preset these weights were trained with"
        )
    if left_over and not extra:
        raise UserError(
            f"{source}: {len(left_over)} tensors are not in the model, the first is {left_over[0]}; choose the "
            "preset these weights were trained with"
        )
    model.load_state_dict({key: weights[key] for key in matched}, strict=False)
    return KeyReport(tuple(matched), tuple(missing), tuple(left_over))


def read_published(path: Path) -> dict[str, Tensor]:
    """The state dict of a published-format checkpoint: .safetensors, or .pt/.pth read with ``weights_only``.

    The state dict may be nested under ``ema``, ``model`` or ``state_dict`` (in this order of preference), and its keys
    may start with ``module.``.

    Raises:
        UserError: it is not such a file, or reading it would require unpickling code.
    """
    if path.suffix == ".safetensors":
        content: Any = load_tensors(path)[0]
    else:
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error below says what is wrong
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can make the unpickler raise anything
            # PyTorch's message advises unpickling anyway; only the name it mentions is useful
            match = re.search(r"GLOBAL (\S+)", str(error))
            problem = f"it contains {match[1]}" if match else "it is damaged, or contains more than tensors"
            raise UserError(
                f"{path}: not a plain checkpoint of tensors: {problem}; save only its state dict, or as safetensors"
            ) from None
    for _ in range(MAX_NESTING):
        inner = None
        if isinstance(content, dict):
            inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    items = content.items() if isinstance(content, dict) else ()
    tensors = {str(key).removeprefix("module."): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: no state dict of tensors, neither at the top level nor under {', '.join(WRAPPERS)}")
    return tensors
