"""What a user sees of a run while it trains: speed and progress."""

import time
from collections.abc import Callable

import lightning as L
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from train.data import TokenData


class Throughput(L.Callback):
    """Logs `train/tokens_per_second`, over all ranks, time spent in validation left out."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        data: TokenData = trainer.datamodule  # type: ignore[attr-defined]
        tokens = (data.position - self._position) * data.seq_len
        seconds = time.monotonic() - self._since
        if tokens:
            pl_module.log("train/tokens_per_second", tokens / seconds)
            self._start(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.training:
            self._since += time.monotonic() - self._paused

    def _start(self, trainer: L.Trainer) -> None:
        self._position: int = trainer.datamodule.position  # type: ignore[attr-defined]
        self._since = time.monotonic()


class StepProgress(L.Callback):
    """A bar over all optimizer steps, with loss, tokens per second and time left, on stderr.

    The trainer's own bars count batches of an epoch, and the data has no end.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        self._task: TaskID = self._progress.add_task(
            "training", total=trainer.max_steps, completed=trainer.global_step, metrics=""
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
    ) -> None:
        if trainer.is_global_zero:
            self._update(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe(trainer, "validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe(trainer, "training")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._update(trainer)
            self._progress.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "_progress"):
            self._progress.stop()

    def _describe(self, trainer: L.Trainer, description: str) -> None:
        if trainer.is_global_zero and trainer.training:
            self._progress.update(self._task, description=description)

    def _update(self, trainer: L.Trainer) -> None:
        logged = trainer.logged_metrics | trainer.callback_metrics
        shown: dict[str, tuple[str, Callable[[float], str]]] = {
            "train/loss": ("loss", "{:.3f}".format),
            "val/bits_per_byte": ("bits/byte", "{:.3f}".format),
            "train/tokens_per_second": ("tokens/s", "{:,.0f}".format),
        }
        metrics = [
            f"{label} {style(float(logged[name]))}"
            for name, (label, style) in shown.items()
            if name in logged
        ]
        self._progress.update(self._task, completed=trainer.global_step, metrics=", ".join(metrics))
