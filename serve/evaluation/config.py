"""Settings of an evaluation, which `stu-eval` and `stu-train` share."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stu.common.errors import UserError

RETRIEVAL = {
    "needle": "serve.evaluation.retrieval:Needle",
    "recall": "serve.evaluation.retrieval:Recall",
}
"""Import paths of the tasks made here, by name. All other names are those of lm-eval's tasks."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Tasks of an evaluation. Raises UserError for a value that is not allowed."""

    tasks: str = ""
    """Tasks to run, separated by commas: needle (a fact in a long text), recall (one of many
    facts), names of lm-eval's tasks and groups, and paths of YAML files with tasks"""
    include_path: Path | None = None
    """Folder of YAML files with your own lm-eval tasks"""
    limit: int | None = None
    """Maximum number of documents of each lm-eval task. null: all"""
    allow_hub: bool = False
    """Let lm-eval download datasets from the Hugging Face Hub. By default, it reads only local
    files, and datasets downloaded before"""
    lengths: list[int] | None = None
    """Lengths of the texts of needle and recall in tokens, answer included. null: the model's
    max_seq_len, and a half, a quarter and an eighth of it, where long enough"""
    depths: int = 5
    """Number of places, from the first to the last, where needle and recall put the fact that is
    asked for"""
    samples: int = 8
    """Number of texts of needle and recall for each length and place"""
    seed: int = 0
    """Seed of the texts of needle and recall"""

    def __post_init__(self) -> None:
        for name in ("limit", "depths", "samples"):
            value = getattr(self, name)
            is_none = value is None and name == "limit"
            self._require(name, is_none or value >= 1, "a whole number >= 1")
        self._require("seed", 0 <= self.seed < 2**64, "from 0 to 2**64 - 1")
        lengths = self.lengths
        is_list = lengths is None or (len(set(lengths)) == len(lengths) > 0 and min(lengths) > 0)
        self._require("lengths", is_list, "a list of different whole numbers >= 1")
        if self.include_path is not None and not self.include_path.is_dir():
            self._require("include_path", False, "a folder")
        names = self.task_names
        self._require("tasks", len(set(names)) == len(names), "different names")

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order in which they were given."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        path = self.include_path
        return {**asdict(self), "include_path": None if path is None else str(path)}

    def chosen_lengths(self, longest: int) -> list[int]:
        """Return the lengths of texts, given the model's `max_seq_len`. Raises UserError."""
        if self.lengths is None:
            return sorted({max(1, longest // divisor) for divisor in (8, 4, 2, 1)})
        allowed = f"at most the model's max_seq_len={longest}"
        self._require("lengths", max(self.lengths) <= longest, allowed)
        return sorted(self.lengths)

    def chosen_depths(self) -> list[float]:
        """Return the places of facts: 0 is the first, 1 the last."""
        if self.depths == 1:
            return [0.0]
        return [place / (self.depths - 1) for place in range(self.depths)]

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(name, getattr(self, name), allowed)
