"""How a process of training ends for a signal, from its first line on."""

import atexit
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TO_BE_CONTINUED = 75
"""Exit code after SIGUSR1 (sysexits' EX_TEMPFAIL): the run wants to go on later."""
EXIT_CODES = {signal.SIGUSR1: TO_BE_CONTINUED, signal.SIGTERM: 143, signal.SIGINT: 130}


def exit_at_once() -> None:
    """Have signals end this process with their exit codes: before and after training there is
    nothing to save."""
    if threading.current_thread() is threading.main_thread():
        for number in EXIT_CODES:
            signal.signal(number, _exit)


@contextmanager
def exiting_at_once() -> Iterator[None]:
    """Do so within a block."""
    former = {number: signal.getsignal(number) for number in EXIT_CODES}
    exit_at_once()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in former.items():
                signal.signal(number, handler)
            if former[signal.SIGUSR1] == signal.SIG_DFL:
                # Sent again while the process ends, it must not change the exit code. A function
                # until then: what is ignored would be so for all that this process starts.
                signal.signal(signal.SIGUSR1, _pass)
                atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)


def _pass(number: int, _: FrameType | None) -> None:
    """Do nothing."""


def _exit(number: int, _: FrameType | None) -> None:
    received = signal.Signals(number)
    print(f"stu-train: ended by {received.name} outside of training", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODES[received])
