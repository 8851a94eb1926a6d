"""PyTorch's fused scaled_dot_product_attention, and the flash-attn package where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2vdm_backends.eager import EagerBackend
from ca2vdm_cli.attention import Backend
from ca2vdm_cli.hookspecs import hookimpl

FEW_QUERIES = 16
"""So few are faster without a fused kernel in float32 on a CPU; 33 take three times as long."""


def _flash_attn() -> Callable[..., Any] | None:
    """``flash_attn_func`` of the flash-attn package, or None where it is not installed or does not load."""
    try:
        from flash_attn import flash_attn_func
    except (ImportError, OSError):
        return None
    return flash_attn_func


class SdpaBackend(EagerBackend):
    """Fused attention. PyTorch picks among flash, memory-efficient, cuDNN and math kernels by device, type and mask.

    Two cases on a CPU are left to the plain products: training in half precision, where PyTorch's fused backward takes
    some twenty times as long as the products that it is made of, and the few queries of a chunk over time, for which
    its fused forward takes half as long again.

    With the flash-attn package on a GPU, unmasked half-precision attention goes there instead. That path was never run
    by the authors, who had no such GPU.
    """

    name = "sdpa"
    description = "fused attention (flash, memory-efficient and cuDNN kernels where the device has them)"
    priority = 10

    def __init__(self) -> None:
        self._flash_attn: Callable[..., Any] | None = None
        if torch.cuda.is_available():
            self._flash_attn = _flash_attn()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self._flash_attn is not None and mask is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            out: Tensor = self._flash_attn(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (N, Q, H, E)
            return out.transpose(1, 2)
        if q.device.type == "cpu" and self._plain_is_faster(q):
            return super().attend(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    @staticmethod
    def _plain_is_faster(q: Tensor) -> bool:
        half = q.dtype is not torch.float32
        return half if q.requires_grad else not half and q.shape[2] <= FEW_QUERIES


@hookimpl
def ca2vdm_register_backends(register: Callable[[Backend], None]) -> None:
    register(SdpaBackend())
