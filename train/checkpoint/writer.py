"""Writes checkpoints while training goes on: each rank its share, in a thread of its own."""

import copy
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stu.common.files import fsync
from train.checkpoint.folder import CheckpointFolder, write_rank, write_training
from train.start.owner import RunOwner

Share = Iterable[tuple[str, str, Tensor]]
"""Of a rank: the kind, the name, and the tensor."""


class CheckpointWriter:
    """One checkpoint at a time: `open` and `write`, and `publish` once every rank has written.

    Tensors are copied before `write` returns. Nothing here raises what fails: it is told in
    `error`, for ranks to agree on, as one alone that gave up would leave the others waiting.
    """

    error: Exception | None = None

    def __init__(self) -> None:
        self.owner: RunOwner | None = None
        """Owner of the folder that checkpoints are in; the first rank has it."""
        self.job = 0
        """The owner's number, on all ranks: no other job writes into the same temporary folder."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._opened: tuple[Path, dict[str, Any]] | None = None

    def open(self, path: Path, training: dict[str, Any]) -> None:
        """By the first rank, before any rank writes: `path` is to appear, with `training` in it."""
        self._opened = path, copy.deepcopy(training)  # parts of it are the loops' own
        folder = self._temporary(path)
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir(parents=True)
        except OSError as error:
            self.error = error

    def write(self, path: Path, rank: int, share: Share) -> None:
        """Begin to."""
        held = [(kind, name, _copy(tensor)) for kind, name, tensor in share]
        self._written = self._thread.submit(write_rank, self._temporary(path), rank, held, path)

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._written is not None and not self._written.done()

    def wait(self) -> None:
        """Until it is not."""
        if self._written is not None:
            failure = self._written.exception()
            if isinstance(failure, Exception):
                self.error = self.error or failure
            self._written = None

    def publish(self) -> Path | None:
        """By the first rank, when all are done: the checkpoint, whole and read back, if any was
        being written."""
        if self._opened is None:
            return None
        path, training = self._opened
        folder = self._temporary(path)
        try:
            write_training(folder, training, path)
            if self.owner is not None:
                self.owner.look()  # or another job's checkpoint would be replaced
            former = path.with_name(f".{path.name}.former.tmp")
            if path.exists():  # of a time that this run went back behind
                path.rename(former)
            folder.replace(path)
            fsync(path.parent)
            shutil.rmtree(former, ignore_errors=True)
            CheckpointFolder(path).check()
        except (OSError, ValueError) as error:
            self.error = error
            return None
        self._opened = None
        return path

    def give_up(self) -> None:
        """By the first rank, when one could not write: leave nothing behind."""
        if self._opened is not None:
            shutil.rmtree(self._temporary(self._opened[0]), ignore_errors=True)
            self._opened = None

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{self.job}.tmp")


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
