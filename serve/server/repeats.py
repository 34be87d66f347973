"""Lines of the log that say the same again and again: the first of them, and how many followed."""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable

PERIOD_SECONDS = 10.0
MOST_EQUAL = 20
"""Lines of a period that differ in nothing but numbers."""
MOST_KINDS = 200
"""Messages of a period that are told apart; of further ones the place that logs them counts."""
NUMBER = re.compile(r"\d+")
LONGEST = 200
NEVER_LEFT_OUT = frozenset({"request ended"})
"""There are no more of them than engines decode requests."""


class Repeats(logging.Filter):
    """Lets `MOST_EQUAL` equal lines pass in a period, and tells how many were left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._began = clock, clock()
        self._counts: Counter[tuple[str, int, str]] = Counter()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """`logging.Filter`'s."""
        if record.msg in NEVER_LEFT_OUT or getattr(record, "is_summary", False):
            return True
        text = NUMBER.sub("0", record.getMessage()[:LONGEST])
        with self._lock:
            key = record.name, record.levelno, text
            if key not in self._counts and len(self._counts) >= MOST_KINDS:
                key = record.name, record.levelno, str(record.msg)[:LONGEST]
            self._counts[key] += 1
            return self._counts[key] <= MOST_EQUAL

    def report(self) -> None:
        """Log how many were left out, if a period is over. The server calls it now and then."""
        now = self._clock()
        if now - self._began < PERIOD_SECONDS:
            return
        with self._lock:
            counts, self._counts = self._counts, Counter()
            self._began = now
        for (name, level, text), count in counts.items():
            if count > MOST_EQUAL:
                logging.getLogger(name).log(
                    level,
                    "%d more lines in %.0f s were like this one: %s",
                    count - MOST_EQUAL,
                    PERIOD_SECONDS,
                    text,
                    extra={"is_summary": True},
                )
