"""Loggers of a run, chosen by name. To add one, write its class and enter it in `LOGGERS`."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from stu.common.errors import UserError
from stu.common.files import fsync


class RunLogger(Logger, ABC):
    """Interface of a logger, in addition to Lightning's."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text in Markdown; a logger without support for texts ignores it."""

    @abstractmethod
    def sync(self) -> None:
        """Write to disk what was logged, so that a crash cannot leave the log behind a checkpoint.

        Raises OSError.
        """


class TensorBoard(TensorBoardLogger, RunLogger):
    """TensorBoard's event files in `RUN_DIR/tensorboard`, one for each job."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        # Drops steps that an interrupted job logged after its checkpoint: they are repeated now.
        super().__init__(run_dir, name="", version="tensorboard", purge_step=first_step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self.experiment.add_text(name, text, step)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.experiment.flush()

    def sync(self) -> None:
        self.experiment.flush()
        for file in Path(self.log_dir).glob(f"events.out.tfevents.*.{os.getpid()}.*"):
            fsync(file)


class Csv(CSVLogger, RunLogger):
    """Tables of metrics in `RUN_DIR/csv`, one folder for each job: `version_0/metrics.csv` ..

    A step that a job repeats after a resume is in the tables of both.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        super().__init__(run_dir, name="csv", flush_logs_every_n_steps=1)

    def sync(self) -> None:
        self.save()
        if Path(self.experiment.metrics_file_path).exists():
            fsync(Path(self.experiment.metrics_file_path))


def log_texts(loggers: list[RunLogger], tag: str, texts: list[str], step: int) -> None:
    """Log texts as `TAG/0`, `TAG/1` and so on."""
    for number, text in enumerate(texts):
        for logger in loggers:
            logger.log_text(f"{tag.rstrip('/')}/{number}", text, step)


LOGGERS: dict[str, Callable[[Path, int], RunLogger]] = {"tensorboard": TensorBoard, "csv": Csv}
"""Loggers by name: each takes the run's folder and the first step that is to be logged."""


def check_loggers(names: list[str]) -> None:
    """Raise UserError unless all names are known and different."""
    if not set(names) <= LOGGERS.keys() or len(set(names)) < len(names):
        raise UserError("--logger", names, f"a list of different names of {', '.join(LOGGERS)}")


def make_loggers(names: list[str], run_dir: Path, first_step: int) -> list[RunLogger]:
    """Return the loggers that settings name, in that order."""
    return [LOGGERS[name](run_dir, first_step) for name in names]
