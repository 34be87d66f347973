"""Signals: a run that is told to stop does so at the end of a step, with a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch

from train.start.signals import EXIT_CODES


class Interruption(L.Callback):
    """Sets `trainer.should_stop` on every rank once one was sent SIGUSR1, SIGTERM or SIGINT.

    A validation is left between two of its batches; the run then stops after the next step.

    A handler does nothing but note the signal: saving in it could wait for ever for other ranks. A
    second SIGINT or SIGTERM ends the process at once, as it would without this.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """What the run stopped for, the same on every rank."""
        self._noted: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._former = {its: signal.getsignal(its) for its in EXIT_CODES}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Only now: until then there is nothing to save, and a signal ends the process at once.
        if threading.current_thread() is threading.main_thread():
            for its in EXIT_CODES:
                signal.signal(its, self._note)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._agree(trainer):
            trainer.should_stop = True

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking and self.received is None:
            self._agree(trainer)

    def _agree(self, trainer: L.Trainer) -> bool:
        """Whether any rank was sent a signal; all ranks must ask. No validation follows then."""
        (noted,) = largest_of_ranks(trainer, self._noted or 0)
        if noted:
            self.received = signal.Signals(int(noted))
            trainer.limit_val_batches = 0  # there may be no time for it
        return bool(noted)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        its = signal.Signals(number)
        if self._noted == its and its != signal.SIGUSR1:
            signal.signal(its, signal.SIG_DFL)
            signal.raise_signal(its)
        self._noted = its

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for its, handler in self._former.items():
                signal.signal(its, handler)
        self._former = {}


def largest_of_ranks(trainer: L.Trainer, *values: float) -> list[float]:
    """Of each value, the largest of all ranks'; all of them must ask."""
    if trainer.world_size == 1:
        return list(values)
    held = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
    largest: list[float] = trainer.strategy.reduce(held, reduce_op="max").tolist()
    return largest
