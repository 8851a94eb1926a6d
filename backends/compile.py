"""torch.compile on top of the sdpa backend. All blocks share the compiled code."""

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

    Denoising a chunk and writing it to the cache have the same shapes in every chunk, so nothing is compiled after the
    first chunk. Nor is it when the cache's ring wraps, because slots and masks are tensors and not Python integers.
    """

    name = "compile"
    description = "torch.compile on top of sdpa (needs a C++ compiler on a CPU; compiles during the first chunk)"
    priority = 5  # below sdpa: in a short run, compiling takes longer than it saves

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
        import torch._dynamo  # imported here because it is slow to import

        # A block has a handful of variants (step, write, first, last), and a process may have several models.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        block.compile(fullgraph=True, dynamic=False)


backend = CompileBackend()
