"""Writing of checkpoints while training continues: each rank writes its share in a thread."""

import copy
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stu.common.errors import UserError
from stu.common.files import fsync
from train.checkpoint.folder import CheckpointFolder, write_rank, write_training
from train.start.owner import RunOwner

Share = Iterable[tuple[str, str, Tensor]]
"""Kind, name and value of the tensors that a rank writes."""


class CheckpointWriter:
    """Writer of one checkpoint at a time: `open`, `write`, then `publish` once all have written.

    Tensors are copied before `write` returns. Failures are not raised but kept in `error`, so that
    ranks can agree on them: a rank that gave up alone would leave the others waiting.
    """

    error: Exception | None = None
    """First failure since the start."""

    def __init__(self) -> None:
        self.owner: RunOwner | None = None
        """Owner of the run's folder; on the first rank only."""
        self.job = 0
        """Number of the owner, on all ranks: it tells temporary folders of different jobs apart."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._opened: tuple[Path, dict[str, Any]] | None = None

    def open(self, path: Path, training: dict[str, Any]) -> None:
        """Make the temporary folder of `path`; on the first rank, before any rank writes."""
        self._opened = path, copy.deepcopy(training)  # training changes parts of it meanwhile
        folder = self._temporary(path)
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a job that was killed
            folder.mkdir(parents=True)
        except OSError as error:
            self.error = error

    def write(self, path: Path, rank: int, share: Share) -> None:
        """Begin to write the share of this rank."""
        held = [(kind, name, _copy(tensor)) for kind, name, tensor in share]
        self._written = self._thread.submit(write_rank, self._temporary(path), rank, held, path)

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._written is not None and not self._written.done()

    def wait(self) -> None:
        """Wait until this rank has written its share."""
        if self._written is not None:
            failure = self._written.exception()
            if isinstance(failure, Exception):
                self.error = self.error or failure
            self._written = None

    def publish(self) -> Path | None:
        """Give the checkpoint its name and read it back; on the first rank, when all have written.

        Returns the path; None if nothing was being written, or on a failure.
        """
        if self._opened is None:
            return None
        path, training = self._opened
        folder = self._temporary(path)
        try:
            write_training(folder, training, path)
            if self.owner is not None:
                self.owner.look()  # another job's checkpoint must not be replaced
            former = path.with_name(f".{path.name}.former.tmp")
            if path.exists():  # the run continued from an earlier checkpoint and got here again
                path.rename(former)
            folder.replace(path)
            fsync(path.parent)
            shutil.rmtree(former, ignore_errors=True)
            CheckpointFolder(path).check()
        except (OSError, UserError) as error:
            self.error = error
            return None
        self._opened = None
        return path

    def give_up(self) -> None:
        """Delete what was written so far; on the first rank, when another could not write."""
        if self._opened is not None:
            shutil.rmtree(self._temporary(self._opened[0]), ignore_errors=True)
            self._opened = None

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{self.job}.tmp")


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
