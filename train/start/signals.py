"""Exit codes for signals, and handlers for the time before and after training."""

import atexit
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TO_BE_CONTINUED = 75
"""Exit code after SIGUSR1 (sysexits' EX_TEMPFAIL): the run is to be continued."""
EXIT_CODES = {signal.SIGUSR1: TO_BE_CONTINUED, signal.SIGTERM: 143, signal.SIGINT: 130}


@contextmanager
def exiting_at_once() -> Iterator[None]:
    """Have signals end this process with their exit codes while the block runs.

    Before and after training there is nothing to save.
    """
    is_main = threading.current_thread() is threading.main_thread()
    former = {number: signal.getsignal(number) for number in EXIT_CODES}
    for number in EXIT_CODES if is_main else ():
        signal.signal(number, _exit)
    try:
        yield
    finally:
        if is_main:
            for number, handler in former.items():
                signal.signal(number, handler)
            if former[signal.SIGUSR1] == signal.SIG_DFL:
                # Sent again while the process ends, SIGUSR1 must not change the exit code. It is
                # not ignored yet, as child processes would inherit that.
                signal.signal(signal.SIGUSR1, lambda *_: None)
                atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)


def _exit(number: int, _: FrameType | None) -> None:
    received = signal.Signals(number)
    print(f"stu-train: ended by {received.name} outside of training", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODES[received])
