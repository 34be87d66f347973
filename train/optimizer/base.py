"""Settings that optimizers share, and the description that each optimizer gives of itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from stu.common.errors import UserError

STATE_BYTES = 4
"""Size of an element of a state tensor: optimizers keep theirs in float32."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: str = "adamw"
    """Optimizer: `adamw`, `lion` or `muon`. Lion keeps half the state of AdamW; it needs a learning
    rate 3 to 10 times lower, and a weight decay higher by the same factor. Muon works with AdamW's
    settings."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    beta1: float = 0.9
    """Decay of the running average of gradients that an update follows; Muon uses `momentum` for
    matrices."""
    beta2: float = 0.95
    """AdamW: decay of the running average of squared gradients. Lion: decay of the running average
    of gradients that it stores, 0.99 in its paper."""
    momentum: float = 0.95
    """Muon: decay of the running average of a matrix's gradients. Unused by the others."""
    eps: float = 1e-8
    """AdamW: number added to the denominator. Unused by Lion."""
    weight_decay: float = 0.1
    """Weight decay of matrices. Norms, and weights that a mixer excludes, are not decayed."""
    warmup_steps: int = 100
    """Number of optimizer steps in which the learning rate rises linearly from near 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning-rate schedule. `cosine` decays from the end of the warm-up on; `wsd` (warm-up,
    stable, decay) stays constant, then decays linearly."""
    decay_fraction: float = 0.2
    """Fraction of all steps in which `wsd` decays; unused by `cosine`."""
    final_lr_fraction: float = 0.1
    """Learning rate at the end of the run, as a fraction of `learning_rate`."""

    def __post_init__(self) -> None:
        for name, holds, allowed in [
            ("learning_rate", 0 < self.learning_rate < math.inf, "a positive number"),
            ("beta1", 0 <= self.beta1 < 1, "at least 0 and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("eps", 0 < self.eps < math.inf, "a positive number"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number >= 0"),
            ("warmup_steps", self.warmup_steps >= 0, "a whole number >= 0"),
            ("schedule", self.schedule in ("cosine", "wsd"), "'cosine' or 'wsd'"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "from 0 to 1"),
            ("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "from 0 to 1"),
        ]:
            if not holds:
                raise UserError(f"model.optimizer.{name}", getattr(self, name), allowed)


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that settings choose by name.

    It must keep a tensor `step` and the state tensors of each parameter that has had a gradient. It
    must work element by element, as ZeRO and FSDP2 hand it parts of parameters, except for matrices
    if it has `matrix_state_tensors`: it then exchanges their parts, as `MatrixExchange` does.
    """

    make: Callable[..., Optimizer]
    """Constructor: takes parameter groups, and `hyperparameters` by keyword."""
    state_tensors: tuple[str, ...]
    """Names of the state tensors, each float32 and of the parameter's shape."""
    hyperparameters: Callable[[OptimizerConfig], dict[str, Any]]
    """Values of a parameter group, without `weight_decay`, that follow from the settings."""
    matrix_state_tensors: tuple[str, ...] | None = None
    """Names of the state tensors of the weights in `FlashSTU.linear_maps`, if these are updated as
    whole matrices, in groups of their own."""

    def state_bytes(self, matrix_share: float) -> float:
        """Return the mean bytes of state per parameter, for a model of whose weights so large a
        share is in `FlashSTU.linear_maps`."""
        others = len(self.state_tensors)
        of_matrices = (
            others if self.matrix_state_tensors is None else len(self.matrix_state_tensors)
        )
        return STATE_BYTES * (matrix_share * of_matrices + (1 - matrix_share) * others)


def running_average(state: dict[str, Any], parameter: Tensor) -> Tensor:
    """Count a step in a parameter's state, and return the average of gradients that it keeps."""
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter)
    state["step"] += 1
    average: Tensor = state["exp_avg"]
    return average
