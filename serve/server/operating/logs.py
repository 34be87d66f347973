"""The server's log: lines of JSON, with a limit on repeated messages."""

import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from stu.common.text import json_line

PERIOD_SECONDS = 10.0
MOST_EQUAL = 20
"""Lines in a period that differ only in numbers."""
MOST_KINDS = 200
"""Different messages counted in a period; others are counted by the place that logs them."""
NUMBER = re.compile(r"\d+")
LONGEST = 200
NEVER_LEFT_OUT = frozenset({"request ended"})
"""Messages that are always written: there are no more of them than requests that engines decode."""


def log_as_json() -> "Repeats":
    """Write the log of this process to stderr as lines of JSON, and return the filter of repeated
    lines."""
    handler, repeats = logging.StreamHandler(sys.stderr), Repeats()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(repeats)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    return repeats


class JsonFormatter(logging.Formatter):
    """Formats a record as a line of JSON, with `record.fields` in it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json_line(line)


class Repeats(logging.Filter):
    """Lets `MOST_EQUAL` equal lines pass in a period, and reports how many more there were."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._began = clock, clock()
        self._counts: Counter[tuple[str, int, str]] = Counter()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is written."""
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
        """Log how many lines were left out if a period is over. The server calls this regularly."""
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
