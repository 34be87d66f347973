"""Division of an input among several runs, such as the tasks of a SLURM array."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stu.common.errors import UserError


@dataclass(frozen=True)
class ArrayTask:
    """Task `index` (from 0) of `count` runs that share an input.

    It contains the rows whose numbers leave `index` when divided by `count`.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "ArrayTask":
        """Return the task that `i/n` names. Raises UserError unless 0 <= i < n."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if not match or not int(match[1]) < int(match[2]):
            raise UserError("part", text, "i/n with 0 <= i < n, such as 0/8 to 7/8 for eight parts")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_slurm_step(cls, environment: Mapping[str, str]) -> "ArrayTask":
        """Return the task of a SLURM step of several, or the only task outside of one."""
        if not in_step_of_tasks(environment):
            return cls()
        return cls(int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]))

    def __contains__(self, row_number: int) -> bool:
        return row_number % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def split(self, num_parts: int) -> list["ArrayTask"]:
        """Return `num_parts` tasks that share the rows of this one."""
        return [
            ArrayTask(self.index + part * self.count, self.count * num_parts)
            for part in range(num_parts)
        ]

    def output(self, path: Path) -> Path:
        """Return where this task writes if the whole output is named `path`."""
        if self.count == 1:
            return path
        return path.with_name(f"{path.stem}.{self.index}-of-{self.count}{path.suffix}")

    def other_outputs(self, path: Path) -> list[Path]:
        """Return where the other tasks write if the whole output is named `path`."""
        others = (ArrayTask(index, self.count) for index in range(self.count))
        return [other.output(path) for other in others if other != self]


def in_step_of_tasks(environment: Mapping[str, str]) -> bool:
    """Return whether this process is one of several that `srun` started."""
    # A batch script has SLURM_PROCID as well, but no step.
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
