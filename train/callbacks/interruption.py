"""Signals during training: the run stops at the end of a step, with a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch

from train.start.signals import EXIT_CODES


class Interruption(L.Callback):
    """Callback that stops all ranks after one has received SIGUSR1, SIGTERM or SIGINT.

    A validation is cut short between two batches; the run then stops after the next step.

    The signal handler only records the signal, as saving in it could wait for other ranks for ever.
    A second SIGINT or SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """Signal that the run stops for, the same on all ranks."""
        self._noted: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._former = {number: signal.getsignal(number) for number in EXIT_CODES}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Only now: until then there is nothing to save, and a signal ends the process at once.
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: L.Trainer, *hook: Any) -> None:
        if ends_step(trainer, *hook) and self.agree(trainer):
            trainer.should_stop = True

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking and self.received is None:
            self.agree(trainer)

    def agree(self, trainer: L.Trainer) -> bool:
        """Return whether any rank received a signal; collective. If so, no validation follows."""
        (noted,) = largest_of_ranks(trainer, self._noted or 0)
        if noted:
            self.received = signal.Signals(int(noted))
            trainer.limit_val_batches = 0  # there may be no time for it
        return bool(noted)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        received = signal.Signals(number)
        if self._noted == received and received != signal.SIGUSR1:
            signal.signal(received, signal.SIG_DFL)
            signal.raise_signal(received)
        self._noted = received

    def _restore(self) -> None:
        # A signal that is repeated while the loggers end must not end the process before them.
        is_stopping = self.received is not None or self._noted is not None
        if threading.current_thread() is threading.main_thread() and not is_stopping:
            for number, handler in self._former.items():
                signal.signal(number, handler)
        self._former = {}


def ends_step(
    trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
) -> bool:
    """Return whether a micro-batch was the last of its optimizer step: see `on_train_batch_end`."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def largest_of_ranks(trainer: L.Trainer, *values: float) -> list[float]:
    """Return for each value the largest of all ranks; collective."""
    if trainer.world_size == 1:
        return list(values)
    held = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
    largest: list[float] = trainer.strategy.reduce(held, reduce_op="max").tolist()
    return largest
