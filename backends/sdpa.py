"""PyTorch's fused scaled_dot_product_attention, and the flash-attn package where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2vdm_backends.eager import EagerBackend

FLASH_ATTN_HEAD = 256
"""Largest size of a head that flash-attn has kernels for."""
FEW_QUERIES = 16
"""So few are faster without a fused kernel in float32 on a CPU; 33 take three times as long."""
BLOCK = 2**20
"""Scores that are computed at a time by the plain products in bfloat16: 2 MiB, which a core's cache holds."""


def _flash_attn() -> Callable[..., Any] | None:
    """``flash_attn_func`` of the flash-attn package, or None where it is not installed or does not load."""
    try:
        from flash_attn import flash_attn_func
    except (ImportError, OSError):
        return None
    return flash_attn_func


def _suits_flash_attn(q: Tensor) -> bool:
    """Whether flash-attn takes such queries: in half precision, heads of at most 256, on an Ampere GPU or later."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > FLASH_ATTN_HEAD:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The plain products for so many sequences at a time, or queries of one, that their scores fit the cache.

    Shapes as in ``Backend.attend``, with one leading dimension.
    """
    rows, heads, queries, size = q.shape
    keys = k.shape[2]
    most = max(1, BLOCK // (heads * keys))  # queries at a time
    some = min(queries, most)
    each = max(1, most // some)
    if type(mask) is Tensor and mask.all():  # not simulated
        mask = None
    if mask is not None:
        mask = mask.broadcast_to(rows, heads, queries, keys)
    out = torch.empty_like(q)
    for i, j in product(range(0, rows, each), range(0, queries, some)):
        part = slice(i, i + each), slice(None), slice(j, j + some)
        block_q, block_k, block_v = (x.flatten(0, 1) for x in (q[part], k[part[0]], v[part[0]]))  # (N*H, Q or K, E)
        scores = q.new_empty(*block_q.shape[:2], keys)
        torch.baddbmm(scores, block_q, block_k.transpose(1, 2), beta=0, alpha=size**-0.5, out=scores)
        if mask is not None:
            scores.masked_fill_(~mask[part].flatten(0, 1), float("-inf"))
        torch.softmax(scores, dim=-1, out=scores)
        out[part] = (scores @ block_v).unflatten(0, (-1, heads))
    return out


_untraced_by_blocks = torch.library.custom_op("ca2vdm::attend_by_blocks", attend_by_blocks, mutates_args=())
"""The same, a single operation to torch.compile: a graph with every block in it takes twice as long to compile."""
_untraced_by_blocks.register_fake(lambda q, k, v, mask: torch.empty_like(q))


class SdpaBackend(EagerBackend):
    """Fused attention. PyTorch picks among flash, memory-efficient, cuDNN and math kernels by device, type and mask.

    Three cases on a CPU are left to the plain products: training in half precision, where PyTorch's fused backward
    takes some twenty times as long as the products that it is made of; the few queries of a chunk over time, for which
    its fused forward takes half as long again; and bfloat16 where the processor multiplies it but has no AMX, which
    the fused kernel does not use: there it takes 1.3 to 2.5 times as long as the products, block by block.

    With the flash-attn package, unmasked half-precision attention goes there instead on the GPUs and head sizes that it
    is made for. That path was never run by the authors, who had no such GPU.
    """

    name = "sdpa"
    description = "fused attention (flash, memory-efficient and cuDNN kernels where the device has them)"
    priority = 10

    def __init__(self) -> None:
        self._flash_attn: Callable[..., Any] | None = None
        if torch.cuda.is_available():
            self._flash_attn = _flash_attn()
        bfloat16, amx = (getattr(torch.cpu, f"_is_{what}_supported", bool)() for what in ("avx512_bf16", "amx_tile"))
        self._products_beat_fused = bfloat16 and not amx

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self._flash_attn is not None and mask is None and _suits_flash_attn(q):
            out: Tensor = self._flash_attn(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (N, Q, H, E)
            return out.transpose(1, 2)
        if q.device.type == "cpu" and self._plain_is_faster(q):
            return super().attend(q, k, v, mask)
        if q.device.type == "cpu" and q.dtype is torch.bfloat16 and self._products_beat_fused:
            attend = _untraced_by_blocks if torch.compiler.is_compiling() else attend_by_blocks
            return attend(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    @staticmethod
    def _plain_is_faster(q: Tensor) -> bool:
        half = q.dtype is not torch.float32
        return half if q.requires_grad else not half and q.shape[2] <= FEW_QUERIES


backend = SdpaBackend()
