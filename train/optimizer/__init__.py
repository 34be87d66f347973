"""Optimizers by name, and the learning-rate schedule.

To add an optimizer, write a file that states its `OptimizerKind`, and enter it in `OPTIMIZERS`.
"""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stu.common.errors import UserError
from stu.mixers import Mixer
from stu.model import FlashSTU
from train.optimizer.adamw import ADAMW
from train.optimizer.base import OptimizerConfig, OptimizerKind
from train.optimizer.lion import LION
from train.optimizer.muon import MUON
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

OPTIMIZERS = {"adamw": ADAMW, "lion": LION, "muon": MUON}
"""Optimizers by the name that `model.optimizer.name` gives them."""


def optimizer_kind(config: OptimizerConfig) -> OptimizerKind:
    """Return the optimizer that the settings name. Raises UserError if there is none."""
    if config.name not in OPTIMIZERS:
        raise UserError("model.optimizer.name", config.name, " or ".join(OPTIMIZERS))
    return OPTIMIZERS[config.name]


def make_optimizer(model: FlashSTU, config: OptimizerConfig) -> Optimizer:
    """Return the optimizer of all parameters of `model`, in the groups of `parameter_groups`."""
    kind, parameters = optimizer_kind(config), dict(model.named_parameters())
    groups = [
        {**group, "params": [parameters[name] for name in group["params"]]}
        for group in parameter_groups(model, config)
    ]
    return kind.make(groups, **kind.hyperparameters(config))


def replace_hyperparameters(
    scheduler: LambdaLR, model: FlashSTU, config: OptimizerConfig, factor: float
) -> None:
    """Give a resumed run's optimizer the hyperparameters of `config` instead of the saved ones.

    factor: Share of `config.learning_rate` that the next step uses.
    """
    scheduler.base_lrs = [config.learning_rate] * len(scheduler.base_lrs)
    wanted = parameter_groups(model, config)
    for group, own in zip(scheduler.optimizer.param_groups, wanted, strict=True):
        group |= {
            **optimizer_kind(config).hyperparameters(config),
            "lr": config.learning_rate * factor,
            "initial_lr": config.learning_rate,
            "weight_decay": own["weight_decay"],
        }


def parameter_groups(model: FlashSTU, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, with names of trained parameters as `params`.

    Each has its `weight_decay` and the names of its `state_tensors`. If the optimizer updates
    matrices as a whole, their groups come first, and have the number of `matrices` in each
    parameter.

    Matrices decay, unless a mixer excludes them. The embedding does, as it is also the output
    layer, whose logits would grow. Filters that are multiplied by a matrix do: if only one of two
    factors decayed, the scale would move into the other. Norm weights, near 1, have no reason to
    shrink.
    """
    # Under ZeRO-3 a parameter's own shape is empty.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in trained.items()}
    excluded = {
        f"{prefix}.{name}" if prefix else name
        for prefix, mixer in model.named_modules()
        if isinstance(mixer, Mixer)
        for name in mixer.undecayed_names
    }
    decayed = {name for name, shape in shapes.items() if len(shape) >= 2} - excluded
    kind = optimizer_kind(config)
    maps = {} if kind.matrix_state_tensors is None else model.linear_maps
    groups = []
    for are_maps, state_tensors in ((True, kind.matrix_state_tensors), (False, kind.state_tensors)):
        for decays in (True, False):
            names = [n for n in shapes if (n in maps, n in decayed) == (are_maps, decays)]
            group: dict[str, Any] = {
                "params": names,
                "weight_decay": config.weight_decay if decays else 0.0,
                "state_tensors": list(state_tensors or ()),
            }
            if are_maps:
                group["matrices"] = [maps[name] for name in names]
            groups += [group] if names else []
    return groups
