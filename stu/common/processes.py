"""Processes: how child processes start, and which signals they get."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

LAST_OUTPUT_BYTES = 2000


def child_command(module: str, *arguments: str) -> list[str]:
    """Return a command that runs a module as a child process.

    Unlike `python -m`, it does not look for modules in the current folder, where a user's own
    `serve.py` or `train.py` may be.
    """
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module, *arguments]
    code = (
        "import sys; del sys.path[0]; import runpy; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code, *arguments]


def last_output(file: IO[bytes]) -> str:
    """Return the end of a file that a child process writes into, without moving its position."""
    size = os.fstat(file.fileno()).st_size
    tail = os.pread(file.fileno(), LAST_OUTPUT_BYTES, max(0, size - LAST_OUTPUT_BYTES))
    return tail.decode(errors="replace").strip()


class Hangups:
    """Notes SIGHUP from when it is made, instead of ending the process."""

    def __init__(self) -> None:
        self._has_come = False
        signal.signal(signal.SIGHUP, self._note)

    def take(self) -> bool:
        """Return whether SIGHUP has come since the last call."""
        has_come, self._has_come = self._has_come, False
        return has_come

    def _note(self, *_: object) -> None:
        self._has_come = True


@contextmanager
def hangups_blocked() -> Iterator[None]:
    """Start child processes in the block with SIGHUP blocked from their first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
