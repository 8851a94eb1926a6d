"""What a checkpoint holds, so that a resumed run continues exactly where it stopped."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ca2vdm_cli.checkpoint import load_weights
from ca2vdm_cli.errors import UserError
from ca2vdm_cli.model.transformer import CausalVideoTransformer

from .average import WeightAverage
from .checkpoints import Checkpoint
from .lora import split
from .run_folder import STATE_FILE, WEIGHTS_FILE, RunFolder
from .sharding import Sharding

OTHER_SETTINGS = "it is from a run with other settings; resume with the settings that the run started with"


@dataclass
class TrainingState:
    """Weights, their moving average, optimizer moments and the step, and how they are saved and restored.

    ``STATE_FILE`` has the weights as ``model.NAME`` and the moments as ``OPTIMIZER.NAME.MOMENT``; ``WEIGHTS_FILE`` has
    the average.
    """

    model: CausalVideoTransformer
    optimizers: dict[str, torch.optim.Optimizer]
    """By name: ``adamw``, ``muon``."""
    average: WeightAverage
    sharding: Sharding
    step: int = 0
    """Steps done."""

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average, gathered from all processes; empty in all but the main process."""
        return self.sharding.gather(self.average.tensors.items())

    def start_from(self, weights: dict[str, Tensor], source: str) -> None:
        """Replace the random weights with given ones (fine-tuning), under the names of a model without adapters."""
        self._load_weights(split(self.model, weights), source)
        self.average.restart()

    def save(self, folder: RunFolder, facts: dict[str, str]) -> None:
        """Write a checkpoint. All processes must call it together.

        Args:
            folder: the run's folder.
            facts: what the run remembers besides tensors.
        """
        gather, accelerator = self.sharding.gather, self.sharding.accelerator
        state = gather((f"model.{name}", tensor) for name, tensor in self.model.state_dict().items())
        names = self._names()
        for optimizer, inner in self.optimizers.items():
            for parameter, moments in self.sharding.moments(inner).items():
                prefix = f"{optimizer}.{names[parameter]}"
                state |= gather((f"{prefix}.{moment}", tensor) for moment, tensor in moments.items())
        average = self.averaged_weights()
        if accelerator.is_main_process:
            folder.save(self.step, facts, {WEIGHTS_FILE: average, STATE_FILE: state})
        accelerator.wait_for_everyone()

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore what ``save`` wrote.

        Raises:
            UserError: the checkpoint is from a run with other settings.
        """
        path = checkpoint.folder / STATE_FILE
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("model", *self.optimizers)}
        for key, tensor in checkpoint.tensors(STATE_FILE).items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise UserError(f"{path}: unknown tensor {key}; {OTHER_SETTINGS}")
            parts[part][name] = tensor
        self._load_weights(parts.pop("model"), str(path))
        average, current = checkpoint.tensors(WEIGHTS_FILE), self.average.tensors
        if average.keys() != current.keys():
            raise UserError(f"{checkpoint.folder / WEIGHTS_FILE}: unknown or missing tensors; {OTHER_SETTINGS}")
        self.average.tensors = {key: self.sharding.scatter(average[key], like) for key, like in current.items()}
        for part, moments in parts.items():
            self._load_moments(part, moments, str(path))
        self.step = checkpoint.step

    def _load_weights(self, weights: dict[str, Tensor], source: str) -> None:
        own, scatter = self.model.state_dict(), self.sharding.scatter
        weights = {key: scatter(tensor, own[key]) if key in own else tensor for key, tensor in weights.items()}
        load_weights(self.model, weights, source)
        for optimizer in self.optimizers.values():
            self.sharding.refresh(optimizer)

    def _load_moments(self, part: str, moments: dict[str, Tensor], source: str) -> None:
        names, optimizer = self._names(), self.optimizers[part]
        parameters = {names[parameter]: parameter for parameter in self.sharding.parameters(optimizer)}
        state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in moments.items():
            name, _, moment = key.rpartition(".")
            if name not in parameters:
                raise UserError(f"{source}: unknown tensor {part}.{key}; {OTHER_SETTINGS}")
            parameter = parameters[name]
            is_step_count = tensor.shape != parameter.shape
            state[parameter][moment] = tensor if is_step_count else self.sharding.scatter(tensor, parameter.detach())
        self.sharding.set_moments(optimizer, state)

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}
