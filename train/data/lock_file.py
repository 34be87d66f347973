"""Turns that processes take, on one machine or on several that share a file system."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType


class LockFile:
    """A file with a lock for each of its bytes, none of which need be there.

    The system frees the locks of a process that is killed, and those of a machine that is lost once
    the file server notices. The file stays: to remove it while another process waits for it would
    let a third have a lock of the same name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def __enter__(self) -> "LockFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    @contextmanager
    def held(self, byte: int) -> Iterator[None]:
        """Hold the lock of `byte`, after whoever has it now. Raises OSError if the file system has
        no locks."""
        try:
            self._take(byte)
        except OSError as error:
            raise OSError(
                f"{self._path}: cannot be locked ({error.strerror}); choose an output on a file "
                "system with locks (Lustre has them if it is mounted with -o flock)"
            ) from error
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)

    def _take(self, byte: int) -> None:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # systems differ
            print(f"waiting for another process that has {self._path}", file=sys.stderr, flush=True)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, byte)
