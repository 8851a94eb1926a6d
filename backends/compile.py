"""torch.compile over the sdpa backend: every block is compiled once and the code is shared by all of them."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ca2vdm_backends.sdpa import SdpaBackend


class CompileBackend(SdpaBackend):
    """Regional compilation with static shapes.

    Denoising a chunk and writing it to the cache are the only shapes that repeat, so nothing is compiled once the first
    chunk is in the cache, and nothing when the ring of the cache wraps: slots and masks are tensors, not numbers.
    """

    name = "compile"
    description = "torch.compile over sdpa (needs a C++ compiler on the CPU; compiles during the first chunk)"
    priority = 5  # below sdpa: a short run does not win back the time it takes to compile

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as PyTorch chooses it
        if device.type == "cpu" and not shutil.which(compiler):
            return f"no C++ compiler found (install {compiler} or set CXX)"
        if device.type == "cpu" and not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
            return "no Python headers found (install your system's python3-dev package)"
        if device.type == "cuda" and find_spec("triton") is None:
            return "triton is not installed"
        return None

    def prepare(self, block: nn.Module) -> None:
        import torch._dynamo  # slow to import, and only this backend needs it

        # A block has a handful of shapes (denoise, write, first and last block); several models may share a process.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        block.compile(fullgraph=True, dynamic=False)


backend = CompileBackend()
