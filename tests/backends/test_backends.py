"""The attention kernels, compared with float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ca2vdm_backends import sdpa
from ca2vdm_cli.config import TemporalPositions
from ca2vdm_cli.generate.context import make_context
from ca2vdm_cli.model.transformer import CausalVideoTransformer

MASKS = {
    "none": None,
    "full": torch.ones(5, 7, dtype=torch.bool),
    "causal": torch.ones(5, 7, dtype=torch.bool).tril(2),
    "by sequence": (torch.arange(7) < torch.tensor([1, 4, 7])[:, None])[:, None, None],
}


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v.double()


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16 but has no AMX."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


@pytest.mark.parametrize("block", [1, 40, 150, 10**6])  # one query, a few, a few sequences, everything
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_are_exact(mask: str, block: int, monkeypatch: pytest.MonkeyPatch, with_bfloat16: None) -> None:
    """No matter how many sequences or queries are in a block."""
    monkeypatch.setattr(sdpa, "BLOCK", block)
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", None)  # not called
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, frames, 2, 8, generator=generator).bfloat16().transpose(1, 2) for frames in (5, 7, 7))
    out = sdpa.SdpaBackend().attend(q, k, v, MASKS[mask])
    assert out.dtype is torch.bfloat16 and out.stride() == q.stride(), "merging the heads needs no copy"
    assert (out.double() - exact(q, k, v, MASKS[mask])).abs().max() < 0.02


@pytest.mark.parametrize("mask", MASKS)
def test_attention_by_blocks_is_one_operation_to_the_compiler(mask: str, with_bfloat16: None) -> None:
    """A graph with all blocks would take twice as long to compile."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, frames, 8, generator=generator).bfloat16() for frames in (5, 7, 7))
    graphs: list[torch.fx.GraphModule] = []

    def compile_nothing(graph: torch.fx.GraphModule, _: object) -> Callable[..., tuple[Tensor, ...]]:
        graphs.append(graph)
        return graph

    attend = sdpa.SdpaBackend().attend
    compiled: Callable[..., Tensor] = torch.compile(attend, backend=compile_nothing, fullgraph=True)
    assert torch.equal(compiled(q, k, v, MASKS[mask]), attend(q, k, v, MASKS[mask]))
    (graph,) = graphs
    assert [node.op for node in graph.graph.nodes].count("call_function") == 1


def test_a_step_is_compiled_once_and_a_write_twice(
    make_model: Callable[..., CausalVideoTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All transformer blocks share a step's code; in a write, the last one ends at its keys and values."""
    graphs: list[torch.fx.GraphModule] = []
    compile_fully = nn.Module.compile

    def compile_nothing(graph: torch.fx.GraphModule, _: object) -> Callable[..., tuple[Tensor, ...]]:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(nn.Module, "compile", lambda block, **how: compile_fully(block, **how, backend=compile_nothing))
    torch.compiler.reset()
    model = make_model("compile", depth=4, temporal_positions=TemporalPositions.ROPE, mask_channel=False)
    context = make_context(model, "cached", 1)
    chunk = torch.randn(1, 4, 2, 4, 4)
    counts = []
    with torch.inference_mode():
        for _ in range(3):
            context.open_chunk()
            context.predict(chunk, torch.tensor([500]))
            counts.append(len(graphs))
            context.append(chunk)
    assert counts == [1, 3, 3] and len(graphs) == 3
