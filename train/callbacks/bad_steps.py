"""Bad steps: all ranks skip their updates, count them, and record their samples."""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from train.callbacks.progress import warned

REMEMBERED_LOSSES = 100


class TooManyBadSteps(Exception):
    """Too many skipped updates for a run to recover by itself."""


@dataclass(frozen=True)
class GuardConfig:
    """Rules for skipping updates. Those whose gradients are not all finite are always skipped."""

    loss_jump: float = 0.0
    """Skip an update if the loss of a micro-batch exceeds the median of recent losses by more than
    this, in nats per token; 0 for no limit."""
    most_bad_steps: int = 20
    """Number of skipped updates in a job at which it stops with exit code 65."""

    def __post_init__(self) -> None:
        if not 0 <= self.loss_jump < math.inf:
            raise UserError("model.guard.loss_jump", self.loss_jump, "a number >= 0")
        if self.most_bad_steps < 1:
            raise UserError(
                "model.guard.most_bad_steps", self.most_bad_steps, "a whole number >= 1"
            )


class StepGuard:
    """Recent losses of a run, and the count of its skipped updates."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.num_bad_steps = 0
        """Number of updates skipped in the run so far."""
        self._in_this_job = 0
        self._losses: deque[float] = deque(maxlen=REMEMBERED_LOSSES)

    def state_dict(self) -> dict[str, Any]:
        """Return recent losses and the number of skipped updates, for a checkpoint."""
        return {"num_bad_steps": self.num_bad_steps, "losses": list(self._losses)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`; old checkpoints have none."""
        self.num_bad_steps = saved.get("num_bad_steps", 0)
        self._losses.extend(saved.get("losses", []))

    def is_spike(self, nats: float) -> bool:
        """Return whether a micro-batch's mean loss over all ranks is a spike, else remember it."""
        knows_enough = len(self._losses) >= REMEMBERED_LOSSES // 2 and self.config.loss_jump > 0
        # NaN is no spike: such a step is skipped anyway.
        if knows_enough and nats > statistics.median(self._losses) + self.config.loss_jump:
            return True
        if math.isfinite(nats):
            self._losses.append(nats)
        return False

    def count(self, step: int, loss: float, samples: list[int], file: Path) -> None:
        """Count a step whose update was skipped, and append this rank's samples to `file`.

        Raises TooManyBadSteps.
        """
        self.num_bad_steps += 1
        self._in_this_job += 1
        line = {"step": step, "loss": str(loss), "samples": samples}
        with warned("samples of a skipped update"):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line) + "\n")
        if self._in_this_job >= self.config.most_bad_steps:
            raise TooManyBadSteps(
                f"{self._in_this_job} updates were skipped, for gradients that are not finite or "
                f"losses that jumped; {file.parent} has their samples. A lower learning rate, or a "
                "look at the data, may help"
            )
