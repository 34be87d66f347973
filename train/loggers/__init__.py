"""Loggers of a run, chosen by name. To add one, write its class and enter it in `LOGGERS`."""

from collections.abc import Callable
from pathlib import Path

from stu.common.errors import UserError
from train.loggers.base import RunLogger
from train.loggers.files import Csv, TensorBoard
from train.loggers.trackers import MLflow, WeightsAndBiases

LOGGERS: dict[str, Callable[[Path, int], RunLogger]] = {
    "tensorboard": TensorBoard,
    "csv": Csv,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""Loggers by name: each takes the run's folder and the first step that is to be logged."""


def check_loggers(names: list[str]) -> None:
    """Raise UserError unless all names are known and different."""
    if not set(names) <= LOGGERS.keys() or len(set(names)) < len(names):
        raise UserError("--logger", names, f"a list of different names of {', '.join(LOGGERS)}")


def make_loggers(names: list[str], run_dir: Path, first_step: int) -> list[RunLogger]:
    """Return the loggers that settings name, in that order. Raises UserError."""
    return [LOGGERS[name](run_dir, first_step) for name in names]
