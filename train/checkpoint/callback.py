"""The schedule of training checkpoints: when they are written, published and deleted."""

import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from stu.common.errors import UserError
from train.callbacks.bad_steps import TooManyBadSteps
from train.callbacks.interruption import ends_step, largest_of_ranks
from train.callbacks.progress import warned
from train.checkpoint.folder import LAST, step_name
from train.checkpoint.writer import CheckpointWriter
from train.start.owner import TakenOver


class Checkpoints(Checkpoint):
    """Callback that writes `step-00000500.ckpt` and so on, and links the newest as `last.ckpt`.

    Checkpoints are written while training continues, which waits only for the last one, at its end.
    `last.ckpt` always links a checkpoint that was read back and found complete.

    Args:
        folder: Folder of the checkpoints.
        writer: Writer of this rank.
        every_steps: Optimizer steps between two checkpoints.
        every_minutes: Longest time between two checkpoints.
        keep: Number of newest checkpoints that are kept.
    """

    def __init__(
        self,
        folder: Path,
        writer: CheckpointWriter,
        every_steps: int,
        every_minutes: float,
        keep: int,
    ) -> None:
        self._folder, self._writer = folder, writer
        self._every_steps, self._keep = every_steps, keep
        self._every_seconds, self._saved = 60 * every_minutes, time.monotonic()
        self._is_writing = self._stop_wanted = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        latest, earliest = largest_of_ranks(trainer, step, -step)
        if latest != -earliest:  # a shared disk may show nodes different files
            raise UserError(
                "resume",
                message=f"rank {trainer.global_rank} on {socket.gethostname()} continues from step "
                f"{step}, and others from another: resume from a checkpoint by its path",
            )
        owner = self._writer.owner
        self._writer.job = int(*largest_of_ranks(trainer, owner.number if owner else 0))
        if trainer.is_global_zero:
            try:
                self._begin(trainer.ckpt_path, step)
            except OSError as error:
                self._writer.error = error
        self._agree(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *hook: Any) -> None:
        # A checkpoint holds no gradients: save and stop only after an optimizer step.
        self._stop_wanted |= trainer.should_stop
        step_done = ends_step(trainer, *hook)
        # Lightning validates before it stops early, but not before it stops at max_steps.
        last_step = trainer.global_step == trainer.max_steps
        trainer.should_stop = step_done and (self._stop_wanted or last_step)
        if not step_done:
            return
        due = trainer.should_stop or trainer.global_step % self._every_steps == 0
        # Clocks and disks differ, but all ranks must act alike.
        is_late = time.monotonic() - self._saved >= self._every_seconds
        owner = self._writer.owner
        is_lost = owner is not None and owner.is_lost
        late, busy, lost = largest_of_ranks(trainer, is_late, self._writer.is_busy, is_lost)
        if lost:
            self._give_way()
        if self._is_writing and not busy:
            self._finish(trainer)
        if due or late:
            self._finish(trainer)
            self._check_owner(trainer)
            trainer.save_checkpoint(self._folder / step_name(trainer.global_step))
            self._is_writing, self._saved = True, time.monotonic()
        if trainer.should_stop:
            self._finish(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # All ranks raise it at the same step. After other errors they cannot wait for each other.
        if isinstance(exception, TooManyBadSteps):
            self._finish(trainer)

    def _begin(self, resumed: Any, step: int) -> None:
        """Delete what was cut short, and make the checkpoint that the run continues from, at
        `step`, the last; on the first rank."""
        for cut_short in self._folder.glob(".step-*.tmp"):  # by a job that was killed
            shutil.rmtree(cut_short, ignore_errors=True)
        if resumed is not None:
            path = Path(resumed).resolve()
            if path.parent == self._folder.resolve():  # later ones will be written again
                if path.name == LAST:  # a copy and no link
                    own = path.with_name(step_name(step))
                    shutil.rmtree(own, ignore_errors=True)
                    path = path.rename(own)
                self._point_at(path.name)

    def _finish(self, trainer: L.Trainer) -> None:
        """Wait for the checkpoint that is being written, if any, and make it the last one.

        Raises OSError on every rank if one could not write its share.
        """
        if not self._is_writing:
            return
        self._writer.wait()
        self._agree(trainer)
        self._sync_logs(trainer)
        path = self._writer.publish()
        if path is not None:
            try:
                self._point_at(path.name)
            except OSError as error:
                self._writer.error = error
        self._agree(trainer)
        if path is not None:
            self._delete_old(path)
        self._is_writing = False

    def _check_owner(self, trainer: L.Trainer) -> None:
        """Raise TakenOver on every rank if another job owns the run's folder, or OSError on every
        rank if the first one cannot see who owns it."""
        owner, is_lost = self._writer.owner, False
        try:
            is_lost = owner is not None and not owner.is_still()
        except OSError as error:
            self._writer.error = self._writer.error or error
        (lost,) = largest_of_ranks(trainer, is_lost)
        if lost:
            self._give_way()
        self._agree(trainer)

    def _give_way(self) -> None:
        self._writer.wait()
        self._writer.give_up()
        owner = self._writer.owner
        raise owner.taken_over() if owner else TakenOver(f"{self._folder}: another job owns it")

    def _sync_logs(self, trainer: L.Trainer) -> None:
        """Write the logs to disk before the checkpoint after them is published."""
        loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
        for logger in loggers:
            with warned("the log"):
                logger.sync()

    def _delete_old(self, newest: Path) -> None:
        others = [path for path in self._folder.glob("step-*.ckpt") if path != newest]
        by_age = sorted(others, key=lambda path: path.stat().st_mtime_ns)
        for old in by_age[: max(0, len(others) + 1 - self._keep)]:
            hidden = old.with_name(f".{old.name}.old.tmp")  # a part of one has no checkpoint's name
            with suppress(OSError):  # a failure must not end the run
                shutil.rmtree(old.rename(hidden), ignore_errors=True)

    def _agree(self, trainer: L.Trainer) -> None:
        error = self._writer.error
        (failed,) = largest_of_ranks(trainer, error is not None)
        if failed:
            self._writer.give_up()
            raise error or OSError(f"checkpoint in {self._folder}: another rank could not write it")

    def _point_at(self, name: str) -> None:
        link = self._folder / f".{LAST}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(self._folder / LAST)
