"""Training checkpoints: when they are written, and what stu adds to Lightning's."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from stu.common.files import fsync
from train.callbacks.bad_steps import TooManyBadSteps
from train.callbacks.interruption import largest_of_ranks
from train.callbacks.progress import warned
from train.checkpoint.folder import WEIGHT, CheckpointFolder
from train.checkpoint.writer import CheckpointWriter
from train.start.owner import TakenOver

PREFIX = "model."
"""Of parameters' names in the Lightning module, which the files leave out."""
OF_TENSORS = ("state_dict", "optimizer_states")
"""What Lightning's dictionary has that goes into files of tensors."""
CHECKPOINTS = "checkpoints"
"""Folder of a run in which its checkpoints lie."""
LAST = "last.ckpt"


class Checkpoints(Checkpoint):
    """Writes `step-00000500.ckpt` and so on, and points the link `last.ckpt` at the newest.

    A checkpoint is due every `every_steps` optimizer steps, `every_minutes` after the last one, and
    when training stops, which waits for it; the others are written while training goes on. The
    newest `keep` stay. `last.ckpt` names a whole checkpoint, read back and found complete, at any
    moment from the first one on.
    """

    def __init__(
        self,
        folder: Path,
        writer: CheckpointWriter,
        every_steps: int,
        every_minutes: float,
        keep: int,
    ) -> None:
        for name, value in (("checkpoint_every_steps", every_steps), ("keep_checkpoints", keep)):
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed: it must be at least 1")
        if not every_minutes > 0:
            raise ValueError(
                f"checkpoint_every_minutes={every_minutes} is not allowed: it must be above 0"
            )
        self._folder, self._writer = folder, writer
        self._every_steps, self._keep = every_steps, keep
        self._every_seconds, self._saved = 60 * every_minutes, time.monotonic()
        self._is_writing = self._stop_wanted = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        latest, earliest = largest_of_ranks(trainer, step, -step)
        if latest != -earliest:  # a shared disk may not show all nodes the same
            raise ValueError(
                f"rank {trainer.global_rank} goes on from step {step}, and others from another: "
                "resume from a checkpoint by its name"
            )
        owner = self._writer.owner
        self._writer.job = int(*largest_of_ranks(trainer, owner.number if owner else 0))
        if not trainer.is_global_zero:
            return
        for cut_short in self._folder.glob(".step-*.tmp"):  # in a run that was killed
            shutil.rmtree(cut_short, ignore_errors=True)
        resumed = trainer.ckpt_path
        if resumed is not None:
            path = Path(resumed).resolve()
            if path.parent == self._folder.resolve():  # later ones are about to be made anew
                self._point_at(path.name)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # A checkpoint holds no gradients: between two optimizer steps, neither save nor stop.
        self._stop_wanted |= trainer.should_stop
        step_done = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # Lightning validates before it stops early, but not before it stops at max_steps.
        last_step = trainer.global_step == trainer.max_steps
        trainer.should_stop = step_done and (self._stop_wanted or last_step)
        if not step_done:
            return
        due = trainer.should_stop or trainer.global_step % self._every_steps == 0
        # Clocks and disks differ, and all ranks act together.
        is_late = time.monotonic() - self._saved >= self._every_seconds
        owner = self._writer.owner
        is_lost = owner is not None and owner.is_lost
        late, busy, lost = largest_of_ranks(trainer, is_late, self._writer.is_busy, is_lost)
        if lost:
            self._give_way(trainer)
        if self._is_writing and not busy:
            self._finish(trainer)
        if due or late:
            self._finish(trainer)
            self._check_owner(trainer)
            trainer.save_checkpoint(self._folder / f"step-{trainer.global_step:08d}.ckpt")
            self._is_writing, self._saved = True, time.monotonic()
        if trainer.should_stop:
            self._finish(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # All ranks stop for it at the same step; for anything else they cannot be waited for.
        if isinstance(exception, TooManyBadSteps):
            self._finish(trainer)

    def _finish(self, trainer: L.Trainer) -> None:
        """Wait for what is being written, if anything is: it then is the last checkpoint. Raises
        OSError on every rank if one could not write its share."""
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
        """Raise TakenOver on every rank if the run's folder is another job's by now, and OSError
        on every rank if the first one cannot see whose it is."""
        owner, is_lost = self._writer.owner, False
        try:
            is_lost = owner is not None and not owner.is_still()
        except OSError as error:
            self._writer.error = self._writer.error or error
        (lost,) = largest_of_ranks(trainer, is_lost)
        if lost:
            self._give_way(trainer)
        self._agree(trainer)

    def _give_way(self, trainer: L.Trainer) -> None:
        self._writer.wait()
        self._writer.give_up()
        owner = self._writer.owner
        raise owner.taken_over() if owner else TakenOver(f"{self._folder}: another job has it")

    def _sync_logs(self, trainer: L.Trainer) -> None:
        """Bring what is logged to the disk before the checkpoint that goes on after it."""
        if trainer.is_global_zero and trainer.logger is not None:
            folder = Path(trainer.logger.log_dir or "")  # the trainer's own asks all ranks
            for file in folder.glob(f"events.out.tfevents.*.{os.getpid()}.*"):
                with warned("the log"):
                    fsync(file)

    def _delete_old(self, newest: Path) -> None:
        others = [path for path in self._folder.glob("step-*.ckpt") if path != newest]
        by_age = sorted(others, key=lambda path: path.stat().st_mtime_ns)
        for old in by_age[: max(0, len(others) + 1 - self._keep)]:
            shutil.rmtree(old, ignore_errors=True)  # another one's is not worth a run

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


class FolderIO(CheckpointIO):
    """Saves and loads for strategies whose every rank holds everything: one rank writes it."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        training = {name: checkpoint[name] for name in checkpoint if name not in OF_TENSORS}
        (optimizer,) = checkpoint["optimizer_states"]
        groups = training["stu"].pop("parameter_groups")
        training["optimizer_groups"] = [
            {**group, "params": names}
            for group, names in zip(optimizer["param_groups"], groups, strict=True)
        ]
        states = optimizer["state"]
        training["optimizer_step"] = int(states[0]["step"]) if states else 0

        def tensors() -> Iterator[tuple[str, str, Tensor]]:
            for name, tensor in checkpoint["state_dict"].items():
                yield WEIGHT, name.removeprefix(PREFIX), tensor
            for number, name in enumerate(chain.from_iterable(groups)):
                for kind in training["stu"]["state_tensors"] if states else ():
                    yield kind, name, states[number][kind]

        training["stu"]["num_files"] = 1
        self._writer.open(Path(path), training)
        self._writer.write(Path(path), 0, tensors())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        folder = CheckpointFolder(Path(path))
        # Copies: a map of the file would keep it in use after it is deleted.
        weights = {PREFIX + name: folder.tensor(WEIGHT, name).clone() for name in folder.names}
        return {
            **folder.training,
            "state_dict": weights,
            "optimizer_states": [_torch_state(folder)],
        }

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path)


def _torch_state(folder: CheckpointFolder) -> dict[str, Any]:
    """As torch's optimizers have it: parameters are numbers, group after group."""
    states: dict[int, Any] = {}
    groups, step = [], folder.training["optimizer_step"]
    count = 0
    for group in folder.training["optimizer_groups"]:
        numbers = range(count, count + len(group["params"]))
        count = numbers.stop
        groups.append({**group, "params": list(numbers)})
        for number, name in zip(numbers, group["params"], strict=True):
            if step:
                states[number] = {
                    kind: folder.tensor(kind, name).clone() for kind in folder.state_tensors
                }
                states[number]["step"] = torch.tensor(float(step))
    return {"state": states, "param_groups": groups}


def last_good_checkpoint(run_dir: Path) -> Path:
    """Return the newest checkpoint in `run_dir` that is whole, and say which ones are not.

    Raises ValueError if there is none.
    """
    last = last_checkpoint(run_dir)
    newest = last.resolve()
    older = sorted((run_dir / CHECKPOINTS).glob("step-*.ckpt"), reverse=True)
    problems = []
    # What has a higher number than the last is of a time that the run went back behind.
    for path in [last, *(other for other in older if other.name < newest.name)]:
        try:
            verified_checkpoint(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            say(f"{problem}: goes back to {path.name}")
        return path
    raise ValueError("; ".join(problems))


def verified_checkpoint(path: Path) -> CheckpointFolder:
    """Return a checkpoint that is whole: all is there, and as it was written.

    Raises ValueError if it is not."""
    folder = CheckpointFolder(path)
    folder.check()
    if not folder.has_checksums:
        say(f"checkpoint {path}: an older stu wrote it without checksums; it cannot be verified")
    folder.verify()
    return folder


def say(message: str) -> None:
    """Print a line for the user."""
    print(message, file=sys.stderr, flush=True)


def last_checkpoint(run_dir: Path) -> Path:
    """The checkpoint that a run in `run_dir` goes on from."""
    folder = run_dir / CHECKPOINTS
    if (folder / LAST).exists():
        return folder / LAST
    # The first one of a run that was killed before it was called so: a name means that it is whole.
    if whole := sorted(folder.glob("step-*.ckpt")):
        return whole[-1]
    raise ValueError(f"{run_dir}: no {CHECKPOINTS}/{LAST}; has a run been here?")
