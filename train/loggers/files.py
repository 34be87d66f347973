"""Loggers that write files into the folder of a run.

An entry that cannot be written is warned of: the first rank alone logs, and the others would wait
for it.
"""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from stu.common.files import fsync
from train.callbacks.progress import warned
from train.loggers.base import RunLogger

ENTRY = "an entry of the log"


class TensorBoard(TensorBoardLogger, RunLogger):
    """TensorBoard's event files in `RUN_DIR/tensorboard`, one for each job."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        # Drops steps that an interrupted job logged after its checkpoint: they are repeated now.
        super().__init__(run_dir, name="", version="tensorboard", purge_step=first_step)

    def add_text(self, name: str, text: str, step: int) -> None:
        with warned(ENTRY):
            self.experiment.add_text(name, text, step)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with warned(ENTRY):
            super().log_metrics(metrics, step)
            self.experiment.flush()

    def save(self) -> None:  # Lightning calls it too
        with warned(ENTRY):
            super().save()

    def finalize(self, status: str) -> None:
        with warned(ENTRY):
            super().finalize(status)

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

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with warned(ENTRY):
            super().log_metrics(metrics, step)

    def save(self) -> None:  # Lightning calls it too
        with warned(ENTRY):
            super().save()

    def finalize(self, status: str) -> None:
        with warned(ENTRY):
            super().finalize(status)

    def sync(self) -> None:
        self.save()
        if Path(self.experiment.metrics_file_path).exists():
            fsync(Path(self.experiment.metrics_file_path))
