"""Optimizers by name, and the learning-rate schedule.

To add an optimizer, write a file that states its `OptimizerKind`, and enter it in `OPTIMIZERS`.
"""

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stu.common.errors import UserError
from stu.mixers import Mixer
from train.optimizer.adamw import ADAMW
from train.optimizer.base import OptimizerConfig, OptimizerKind
from train.optimizer.lion import LION
from train.optimizer.schedule import check_schedule, learning_rate_factor

__all__ = [
    "OPTIMIZERS",
    "OptimizerConfig",
    "OptimizerKind",
    "check_schedule",
    "learning_rate_factor",
    "make_optimizer",
    "optimizer_kind",
    "parameter_groups",
    "replace_hyperparameters",
]

OPTIMIZERS = {"adamw": ADAMW, "lion": LION}
"""Optimizers by the name that `model.optimizer.name` gives them."""


def optimizer_kind(config: OptimizerConfig) -> OptimizerKind:
    """Return the optimizer that the settings name. Raises UserError if there is none."""
    if config.name not in OPTIMIZERS:
        raise UserError("model.optimizer.name", config.name, " or ".join(OPTIMIZERS))
    return OPTIMIZERS[config.name]


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Return the optimizer of all parameters of `module`, whose groups decay as the mixers say."""
    kind, parameters = optimizer_kind(config), dict(module.named_parameters())
    groups = [
        {"params": [parameters[name] for name in names], "weight_decay": weight_decay}
        for names, weight_decay in zip(
            parameter_groups(module), (config.weight_decay, 0.0), strict=True
        )
    ]
    return kind.make(groups, **kind.hyperparameters(config))


def replace_hyperparameters(scheduler: LambdaLR, config: OptimizerConfig, factor: float) -> None:
    """Give a resumed run's optimizer the hyperparameters of `config` instead of the saved ones.

    factor: Share of `config.learning_rate` that the next step uses.
    """
    scheduler.base_lrs = [config.learning_rate] * len(scheduler.base_lrs)
    decays = (config.weight_decay, 0.0)
    for group, weight_decay in zip(scheduler.optimizer.param_groups, decays, strict=True):
        group |= {
            **optimizer_kind(config).hyperparameters(config),
            "lr": config.learning_rate * factor,
            "initial_lr": config.learning_rate,
            "weight_decay": weight_decay,
        }


def parameter_groups(module: nn.Module) -> list[list[str]]:
    """Return the names of parameters that are decayed, and of those that are not.

    Matrices decay, unless a mixer excludes them. The embedding does, as it is also the output
    layer, whose logits would grow. Filters that are multiplied by a matrix do: if only one of two
    factors decayed, the scale would move into the other. Norm weights, near 1, have no reason to
    shrink.
    """
    # Under ZeRO-3 a parameter's own shape is empty.
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in module.named_parameters()}
    excluded = {
        f"{prefix}.{name}" if prefix else name
        for prefix, mixer in module.named_modules()
        if isinstance(mixer, Mixer)
        for name in mixer.undecayed_names
    }
    decayed = {name for name, shape in shapes.items() if len(shape) >= 2} - excluded
    return [[n for n in shapes if n in decayed], [n for n in shapes if n not in decayed]]
