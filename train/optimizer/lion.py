"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): steps of equal size along a sign.

It keeps one state tensor instead of AdamW's two.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from train.optimizer.base import OptimizerConfig, OptimizerKind, running_average


class Lion(Optimizer):
    """Lion with decoupled weight decay.

    Args:
        params: Parameters, or parameter groups.
        lr: Size of every element's step.
        betas: Weights of the running average of gradients, as against the newest gradient: in the
            direction of a step, and in the average itself.
        weight_decay: Share of a parameter that a step removes, relative to `lr`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, and return the loss of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, **group)
        return loss

    def _update(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        **_: Any,
    ) -> None:
        average = running_average(self.state[parameter], parameter)
        direction = average.lerp(gradient, 1 - betas[0]).sign_()
        parameter.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)
        average.lerp_(gradient, 1 - betas[1])


def hyperparameters(config: OptimizerConfig) -> dict[str, Any]:
    """Return the values of a parameter group by the names of `Lion`."""
    return {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}


LION = OptimizerKind(make=Lion, state_tensors=("exp_avg",), hyperparameters=hyperparameters)
