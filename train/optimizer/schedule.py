"""The learning rate at every optimizer step."""

import math

from stu.common.errors import UserError
from train.optimizer.base import OptimizerConfig


def check_schedule(config: OptimizerConfig, total_steps: int) -> None:
    """Raise UserError if the warm-up does not fit into a run of `total_steps`."""
    warmup, name = config.warmup_steps, "model.optimizer.warmup_steps"
    if warmup > total_steps:
        raise UserError(
            name,
            warmup,
            message=f"{name}={warmup} is longer than the run (trainer.max_steps={total_steps}), so "
            "that the learning rate would never reach model.optimizer.learning_rate: lower the one "
            "or raise the other",
        )
    decay = round(config.decay_fraction * total_steps) if config.schedule == "wsd" else 0
    if warmup + decay > total_steps:
        raise UserError(
            name,
            warmup,
            message=f"{name}={warmup} overlaps the decay of model.optimizer.schedule=wsd, which "
            f"begins at step {total_steps - decay} (trainer.max_steps={total_steps}, "
            f"model.optimizer.decay_fraction={config.decay_fraction}): lower either",
        )


def learning_rate_factor(
    step: int, total_steps: int, config: OptimizerConfig, time_share: float = 0.0
) -> float:
    """Return the share of `config.learning_rate` that the optimizer step number `step` uses.

    A run ends after `total_steps`, or sooner when its time is up: the learning rate follows
    whichever is further along, the steps or the time.

    Args:
        step: Number of the step, from 0.
        total_steps: Number of steps of the run.
        config: Schedule.
        time_share: Share of the run's time that has passed.
    """
    warming = (step + 1) / config.warmup_steps if step < config.warmup_steps else 1.0
    progress = max(step, time_share * (total_steps - 1))  # in steps
    if config.schedule == "cosine":
        steps = max(1, total_steps - 1 - config.warmup_steps)
        share = min(1.0, max(0.0, (progress - config.warmup_steps) / steps))
        falling = 0.5 * (1 + math.cos(math.pi * share))
    else:
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        falling = min(1.0, max(0.0, (total_steps - 1 - progress) / decay_steps))
    decayed = config.final_lr_fraction + (1 - config.final_lr_fraction) * falling
    return min(warming, decayed)
