"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), as PyTorch implements it.

It keeps two state tensors: running averages of the gradient and of its square, both corrected for
their start at zero.

DeepSpeed runs this AdamW too, because its own would have to be compiled when a run first starts. On
GPUs one fused kernel takes the step; on CPUs PyTorch loops over the parameters.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import AdamW

from train.optimizer.base import OptimizerConfig, OptimizerKind


class DeviceAdamW(AdamW):
    """AdamW in the implementation that is fastest on the device of its parameters."""

    def __init__(self, groups: Sequence[dict[str, Any]], **hyperparameters: Any) -> None:
        # If told here that it is fused, Lightning would refuse to clip gradients, for fear that a
        # loss scale is still in them. No precision here scales the loss.
        super().__init__(groups, **hyperparameters)
        self.choose([parameter for group in groups for parameter in group["params"]])

    def choose(self, updated: Sequence[Tensor]) -> None:
        """Choose the implementation for the tensors that are updated, before the first step."""
        for group in self.param_groups:
            group["fused"] = is_fused(updated) or None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, which another device may have saved, and keep the implementation."""
        pairs = zip(state_dict["param_groups"], self.param_groups, strict=True)
        groups = [{**saved, "fused": own["fused"]} for saved, own in pairs]
        super().load_state_dict({**state_dict, "param_groups": groups})


def is_fused(parameters: Sequence[Tensor]) -> bool:
    """Return whether one kernel updates all parameters, which works on GPUs."""
    return all(parameter.is_cuda for parameter in parameters)


def hyperparameters(config: OptimizerConfig) -> dict[str, Any]:
    """Return the values of a parameter group by the names of `torch.optim.AdamW`."""
    return {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }


ADAMW = OptimizerKind(
    make=DeviceAdamW,
    state_tensors=("exp_avg", "exp_avg_sq"),
    hyperparameters=hyperparameters,
)
