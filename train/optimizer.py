"""AdamW and its learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import AdamW

from stu.hyena import ImplicitFilter


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated."""

    learning_rate: float = 1e-3
    """The highest one, reached after the warm-up."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; norms, and what makes Hyena's filters, are not decayed."""
    warmup_steps: int = 100
    """Optimizer steps in which the rate rises linearly from near 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """`cosine`: falls from the warm-up's end on. `wsd`: stays, and falls linearly at the end."""
    decay_fraction: float = 0.2
    """The share of all steps in which `wsd` falls; `cosine` does not read it."""
    final_lr_fraction: float = 0.1
    """The rate at the end of the run, as a share of `learning_rate`."""

    def __post_init__(self) -> None:
        for name, holds, allowed in [
            ("learning_rate", 0 < self.learning_rate < math.inf, "a positive number"),
            ("beta1", 0 <= self.beta1 < 1, "at least 0 and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1"),
            ("eps", 0 < self.eps < math.inf, "a positive number"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number >= 0"),
            ("warmup_steps", self.warmup_steps >= 0, "a whole number >= 0"),
            ("schedule", self.schedule in ("cosine", "wsd"), "'cosine' or 'wsd'"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "from 0 to 1"),
            ("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "from 0 to 1"),
        ]:
            if not holds:
                raise ValueError(
                    f"model.optimizer.{name}={getattr(self, name)!r} is not allowed: "
                    f"it must be {allowed}"
                )


def parameter_groups(module: nn.Module) -> list[list[str]]:
    """Names of parameters that are decayed, and of those that are not."""
    # Matrices include the embedding, which is also the output layer, where decay keeps scores from
    # growing; and an STU's filter matrix, which multiplies its input matrix: decaying only one of
    # the two would move the scale into the other; and so Hyena's short taps, which multiply its
    # projection. Norm weights, near 1, have no reason to shrink, nor has what lies in the sines of
    # Hyena's filters: it is how fast they may vary, not how large they are (as published).
    # Under ZeRO-3 a parameter's own shape is that of nothing.
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in module.named_parameters()}
    implicit = [its for its in module.modules() if isinstance(its, ImplicitFilter)]
    kept = {id(parameter) for its in implicit for parameter in its.parameters()}
    matrices = [
        name
        for name, parameter in module.named_parameters()
        if len(shapes[name]) >= 2 and id(parameter) not in kept
    ]
    return [matrices, [name for name in shapes if name not in set(matrices)]]


def adamw(module: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over all parameters of `module`, with decay only on matrices."""
    parameters = dict(module.named_parameters())
    groups = [
        {"params": [parameters[name] for name in names], "weight_decay": weight_decay}
        for names, weight_decay in zip(
            parameter_groups(module), (config.weight_decay, 0.0), strict=True
        )
    ]
    betas = config.beta1, config.beta2
    return AdamW(groups, config.learning_rate, betas, config.eps)


def check_schedule(config: OptimizerConfig, total_steps: int) -> None:
    """Raise ValueError if the warm-up does not fit into a run of `total_steps`."""
    warmup, name = config.warmup_steps, "model.optimizer.warmup_steps"
    if warmup > total_steps:
        raise ValueError(
            f"{name}={warmup} is longer than the run (trainer.max_steps={total_steps}): the rate "
            "would never reach model.optimizer.learning_rate; lower the one or raise the other"
        )
    decay = round(config.decay_fraction * total_steps) if config.schedule == "wsd" else 0
    if warmup + decay > total_steps:
        raise ValueError(
            f"{name}={warmup} overlaps the decay of model.optimizer.schedule=wsd, which begins at "
            f"step {total_steps - decay} (trainer.max_steps={total_steps}, "
            f"model.optimizer.decay_fraction={config.decay_fraction}): lower either"
        )


def learning_rate_factor(
    step: int, total_steps: int, config: OptimizerConfig, time_share: float = 0.0
) -> float:
    """Return the share of `learning_rate` that optimizer step `step`, from 0, uses.

    A run ends after `total_steps`, or sooner when its time is up: it decays by whichever is
    further along, the steps or `time_share`, the share of its time that is used.
    """
    warming = (step + 1) / config.warmup_steps if step < config.warmup_steps else 1.0
    reached = max(step, time_share * (total_steps - 1))
    if config.schedule == "cosine":
        steps = max(1, total_steps - 1 - config.warmup_steps)
        progress = min(1.0, max(0.0, (reached - config.warmup_steps) / steps))
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        falling = min(1.0, max(0.0, (total_steps - 1 - reached) / decay_steps))
    decayed = config.final_lr_fraction + (1 - config.final_lr_fraction) * falling
    return min(warming, decayed)
