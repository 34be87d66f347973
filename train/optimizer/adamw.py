"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), as PyTorch implements it.

It keeps two state tensors: running averages of the gradient and of its square, both corrected for
their start at zero.

DeepSpeed runs this AdamW too, because its own would have to be compiled when a run first starts.
PyTorch chooses how to loop over parameters: `foreach` on GPUs, one by one on CPUs.
"""

from typing import Any

from torch.optim import AdamW

from train.optimizer.base import OptimizerConfig, OptimizerKind


def hyperparameters(config: OptimizerConfig) -> dict[str, Any]:
    """Return the values of a parameter group by the names of `torch.optim.AdamW`."""
    return {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }


ADAMW = OptimizerKind(
    make=AdamW,
    state_tensors=("exp_avg", "exp_avg_sq"),
    hyperparameters=hyperparameters,
)
