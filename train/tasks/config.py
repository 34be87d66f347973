"""Settings of the evaluations during a run."""

from dataclasses import dataclass

from serve.config import EngineConfig
from serve.evaluation.config import EvaluationConfig
from stu.common.errors import UserError

GROUP = "evaluation"
"""Name of the settings' group."""


@dataclass(frozen=True)
class RunEvaluation(EvaluationConfig):
    """Tasks on which the model is evaluated while it is trained."""

    every_steps: int = 1000
    """Optimizer steps between evaluations; another one follows at the end of the run"""
    cache_gib: float = 1.0
    """Size of the engine's caches on each rank, in GiB; they are freed after each evaluation"""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
            self._require("every_steps", self.every_steps >= 1, "a whole number >= 1")
            self._require("cache_gib", self.cache_gib > 0, "above 0")
        except UserError as error:
            raise error.renamed(f"{GROUP}.{error.field}") from error

    @property
    def engine(self) -> EngineConfig:
        """Settings of each rank's engine, which is too short-lived for CUDA graphs."""
        return EngineConfig(cache_gib=self.cache_gib, enforce_eager=True)
