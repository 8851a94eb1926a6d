"""Optimizers: Muon equals PyTorch's, but computes in float32 if bfloat16 would be slow."""

import pytest
import torch
from torch import Tensor, nn

from ca2vdm_cli.config import Optimizer, TrainingConfig
from ca2vdm_cli.training import optimizers
from ca2vdm_cli.training.optimizers import Muon, make_optimizers, orthogonal

SHAPES = ((24, 8), (8, 24), (16, 16))


def matrices(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has it from 2.9 on")
@pytest.mark.parametrize("native", [True, False])
def test_muon_takes_the_steps_of_pytorchs(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "native_bfloat16", lambda device: native)
    ours, theirs = ([nn.Parameter(matrix) for matrix in matrices()] for _ in range(2))
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for parameters, optimizer in ((ours, mine), (theirs, reference)):
            for parameter, gradient in zip(parameters, matrices(seed=step + 1), strict=True):
                parameter.grad = gradient
            optimizer.step()
    moved = [(new - old).abs().max() for new, old in zip(theirs, matrices(), strict=True)]
    for new, expected, largest in zip(ours, theirs, moved, strict=True):
        assert (new - expected).abs().max() < 0.05 * largest  # bfloat16, in products of five iterations
        assert torch.equal(mine.state[new]["momentum_buffer"], reference.state[expected]["momentum_buffer"])


@pytest.mark.parametrize("shape", SHAPES)
def test_an_orthogonal_update_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    update = orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert update.shape == shape and update.dtype == torch.float32
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5 and values.max() < 1.3


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)]), "final": nn.Linear(4, 2)})
    optimizers = make_optimizers(model, TrainingConfig(optimizer=Optimizer.MUON))
    taken = {name: [p.shape for p in optimizer.param_groups[0]["params"]] for name, optimizer in optimizers.items()}
    assert taken == {"muon": [(4, 4)], "adamw": [(4,), (2, 4), (2,)]}
    assert list(make_optimizers(model, TrainingConfig())) == ["adamw"]
