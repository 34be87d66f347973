"""Which rows of an input one of many runs decodes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stu.common.shard import parse_shard


@dataclass(frozen=True)
class Shard:
    """The rows whose numbers leave `index` when they are divided by `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From `i/n`. Raises ValueError unless 0 <= i < n."""
        return cls(*parse_shard(text))

    @classmethod
    def of_task(cls, environment: Mapping[str, str]) -> "Shard":
        """That of a task in a SLURM step of several; of any other process, all rows."""
        if not in_step_of_tasks(environment):
            return cls()
        return cls(int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]))

    def __contains__(self, number: int) -> bool:
        return number % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def split(self, num_parts: int) -> list["Shard"]:
        """Shards that hold the rows of this one between them."""
        return [
            Shard(self.index + part * self.count, self.count * num_parts)
            for part in range(num_parts)
        ]

    def output(self, path: Path) -> Path:
        """Where this shard's rows go if those of all go to `path`."""
        if self.count == 1:
            return path
        return path.with_name(f"{path.stem}.{self.index}-of-{self.count}{path.suffix}")

    def other_outputs(self, path: Path) -> list[Path]:
        """Where the rows of the other shards go."""
        return [
            Shard(index, self.count).output(path)
            for index in range(self.count)
            if index != self.index
        ]


def in_step_of_tasks(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several that `srun` started."""
    # A batch script has SLURM_PROCID as well, but no step.
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
