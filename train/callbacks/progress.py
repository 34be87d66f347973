"""Progress of a run on the terminal, and a log of the samples it has read."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from stu.common.cli import is_live

SHOWN = {
    "train/loss": "loss {:.3f}",
    "val/bits_per_byte": "{:.3f} bits/byte",
    "train/tokens_per_second": "{:,.0f} tokens/s",
}
"""Logged metrics that the status line shows, and their formats."""


@contextmanager
def warned(what: str) -> Iterator[None]:
    """Turn an OSError into a warning, for files that a run can do without.

    A rank that stopped for one would leave the others waiting.
    """
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what} could not be written ({error})", stacklevel=3)


class StepProgress(ProgressBar):
    """Progress bar over optimizer steps on stderr; a line per logged step if that is no terminal.

    Lightning's bars count the batches of an epoch, but here the data never ends.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
        )

    def disable(self) -> None:
        """Silence the bar; called on all ranks but the first."""
        self._console.quiet = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        self._start_time, self._start_step, self._last_step = time.monotonic(), step, step
        total = trainer.max_steps
        self._task = self._bar.add_task("training", total=total, completed=step, status="")
        if is_live(self._console):
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last_step:  # still accumulating gradients
            return
        self._last_step = step
        status = self._status(trainer)
        self._bar.update(self._task, completed=step, status=status)
        if not is_live(self._console) and step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._console.print(f"step {step}/{trainer.max_steps}  {status}", soft_wrap=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            total = sum(trainer.num_val_batches)
            self._validation: TaskID = self._bar.add_task("validating", total=total, status="")

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._bar.advance(self._validation)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._bar.remove_task(self._validation)
            self._bar.update(self._task, status=self._status(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if is_live(self._console):  # elsewhere it would only print an empty line
            self._bar.stop()

    def _status(self, trainer: L.Trainer) -> str:
        metrics = trainer.callback_metrics
        parts = [
            form.format(float(metrics[name])) for name, form in SHOWN.items() if name in metrics
        ]
        seconds = time.monotonic() - self._start_time
        rate = (trainer.global_step - self._start_step) / seconds  # steps per second
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        limits = [timer.time_remaining() for timer in timers]  # of trainer.max_time
        left = [max(0.0, x or 0) for x in limits]
        if rate:  # none before the first step
            left.append((trainer.max_steps - trainer.global_step) / rate)
        parts += [f"{rate:.2f} steps/s", f"{timedelta(seconds=round(min(left, default=0)))} left"]
        return "  ".join(parts)


class SampleLog(L.Callback):
    """Log of samples: a file per rank, a line per micro-batch, with its step and sample numbers.

    A step that is repeated after a resume has new lines at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        numbers = [trainer.global_step + 1, *batch["sample_ids"].tolist()]
        with warned("the numbers of samples"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank-{trainer.global_rank:05d}.txt").open("a") as file:
                print(*numbers, file=file)
