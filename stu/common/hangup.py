"""SIGHUP, which closing a terminal or `systemctl reload` sends, ends neither a server nor its
engines."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def ignore_hangups() -> None:
    """From now on SIGHUP does no more than add a line to the log."""

    def ignore(*_: object) -> None:
        logging.getLogger("stu").warning(
            "SIGHUP is ignored: settings and keys are read at the start alone; restart to change "
            "them, or send SIGTERM to stop"
        )

    signal.signal(signal.SIGHUP, ignore)


@contextmanager
def hangups_blocked() -> Iterator[None]:
    """Processes that are started in here never get SIGHUP, from their first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
