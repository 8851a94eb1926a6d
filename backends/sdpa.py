"""PyTorch's fused scaled_dot_product_attention, and the flash-attn package if it is installed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2vdm_backends.eager import EagerBackend

FLASH_ATTN_HEAD = 256
"""Largest head size that flash-attn supports."""
FEW_QUERIES = 16
"""Up to this many queries, float32 attention on a CPU is faster without a fused kernel; with 33 queries, it takes three
times as long."""
BLOCK = 2**20
"""Number of attention scores that bfloat16 matrix products compute at a time: 2 MiB, which fits a core's cache."""


def _flash_attn() -> Callable[..., Any] | None:
    """``flash_attn_func`` of the flash-attn package, or None if it is not installed or does not load."""
    try:
        from flash_attn import flash_attn_func
    except (ImportError, OSError):
        return None
    return flash_attn_func


def _suits_flash_attn(q: Tensor) -> bool:
    """Whether flash-attn supports these queries: half precision, heads of at most 256, on an Ampere GPU or later."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > FLASH_ATTN_HEAD:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by matrix products, over blocks of sequences or of queries whose scores fit a core's cache.

    Shapes as in ``Backend.attend``, with one leading dimension.
    """
    rows, heads, queries, size = q.shape
    keys = k.shape[2]
    largest = max(1, BLOCK // (heads * keys))  # queries in a block
    block_queries = min(queries, largest)
    block_rows = max(1, largest // block_queries)
    if type(mask) is Tensor and mask.all():  # a fake tensor has no values
        mask = None
    if mask is not None:
        mask = mask.broadcast_to(rows, heads, queries, keys)
    out = torch.empty_like(q)
    for i, j in product(range(0, rows, block_rows), range(0, queries, block_queries)):
        part = slice(i, i + block_rows), slice(None), slice(j, j + block_queries)
        block_q, block_k, block_v = (x.flatten(0, 1) for x in (q[part], k[part[0]], v[part[0]]))  # (N*H, Q or K, E)
        scores = q.new_empty(*block_q.shape[:2], keys)
        torch.baddbmm(scores, block_q, block_k.transpose(1, 2), beta=0, alpha=size**-0.5, out=scores)
        if mask is not None:
            scores.masked_fill_(~mask[part].flatten(0, 1), float("-inf"))
        torch.softmax(scores, dim=-1, out=scores)
        out[part] = (scores @ block_v).unflatten(0, (-1, heads))
    return out


_attend_by_blocks_op = torch.library.custom_op("ca2vdm::attend_by_blocks", attend_by_blocks, mutates_args=())
"""``attend_by_blocks`` as one operation of torch.compile. A graph with all blocks takes twice as long to compile."""
_attend_by_blocks_op.register_fake(lambda q, k, v, mask: torch.empty_like(q))


class SdpaBackend(EagerBackend):
    """Fused attention. PyTorch chooses a flash, memory-efficient, cuDNN or math kernel by device, dtype and mask.

    In three cases on a CPU, plain matrix products are faster and are used instead: training in half precision, where
    PyTorch's fused backward takes about twenty times as long; temporal attention with few queries, where its fused
    forward takes 1.5 times as long; and bfloat16 on a CPU that multiplies it without AMX, where its fused forward takes
    1.3 to 2.5 times as long as the products, block by block.

    If the flash-attn package is installed, unmasked half-precision attention uses it on the GPUs and head sizes that it
    supports. That path has never been run, for lack of such a GPU.
    """

    name = "sdpa"
    description = "fused attention (flash, memory-efficient and cuDNN kernels if the device has them)"
    priority = 10
    writes_scores = False

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
            attend = _attend_by_blocks_op if torch.compiler.is_compiling() else attend_by_blocks
            return attend(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    @staticmethod
    def _plain_is_faster(q: Tensor) -> bool:
        half = q.dtype is not torch.float32
        return half if q.requires_grad else not half and q.shape[2] <= FEW_QUERIES


backend = SdpaBackend()
