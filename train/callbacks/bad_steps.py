"""Steps that would do harm: all ranks skip their update, count it, and write it down."""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.callbacks.progress import warned

REMEMBERED_LOSSES = 100


class TooManyBadSteps(Exception):
    """A run that does not get better by itself."""


@dataclass(frozen=True)
class GuardConfig:
    """When an update is skipped. One whose gradients are not all finite always is."""

    loss_jump: float = 0.0
    """Nats per token over the median of the last losses, from which on a micro-batch spoils its
    step; 0: none does."""
    most_bad_steps: int = 20
    """In one job; then it stops, with exit code 65."""

    def __post_init__(self) -> None:
        if not 0 <= self.loss_jump < math.inf:
            raise ValueError(
                f"model.guard.loss_jump={self.loss_jump!r} is not allowed: it must be a number >= 0"
            )
        if self.most_bad_steps < 1:
            raise ValueError(
                f"model.guard.most_bad_steps={self.most_bad_steps!r} is not allowed: it must be a "
                "whole number >= 1"
            )


class StepGuard:
    """Looks at losses before, and counts after."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.num_bad_steps = 0
        """Updates skipped so far in the run."""
        self._in_this_job = 0
        self._losses: deque[float] = deque(maxlen=REMEMBERED_LOSSES)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses remembered and the updates skipped, for a checkpoint."""
        return {"num_bad_steps": self.num_bad_steps, "losses": list(self._losses)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; from nothing if a checkpoint has none."""
        self.num_bad_steps = saved.get("num_bad_steps", 0)
        self._losses.extend(saved.get("losses", []))

    def is_spike(self, nats: float) -> bool:
        """Whether a micro-batch's mean loss, of all ranks, is one. Others are remembered."""
        knows_enough = len(self._losses) >= REMEMBERED_LOSSES // 2 and self.config.loss_jump > 0
        # NaN is no spike: it spoils the step by itself.
        if knows_enough and nats > statistics.median(self._losses) + self.config.loss_jump:
            return True
        if math.isfinite(nats):
            self._losses.append(nats)
        return False

    def count(self, step: int, loss: float, samples: list[int], file: Path) -> None:
        """A step whose update was skipped, with this rank's samples. Raises TooManyBadSteps."""
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
