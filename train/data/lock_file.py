"""Locks between processes, on one machine or on several that share a file system."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockFile:
    """A file with a lock for each byte, including bytes beyond its end.

    The locks of a killed process are released by the system, and the locks of a lost machine by the
    file server once it notices. The file is never removed: if it were removed while a process waits
    for it, a third process could get a second lock of the same name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        """Close the file, which frees all locks."""
        os.close(self._descriptor)

    @contextmanager
    def held(self, byte: int) -> Iterator[None]:
        """Hold the lock of `byte` in the block, once no other process holds it.

        Raises OSError if the file system has no locks.
        """
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
        except (BlockingIOError, PermissionError):  # either, depending on the system
            print(
                f"waiting for another process to unlock {self._path}", file=sys.stderr, flush=True
            )
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, byte)
