"""Progress through the bytes of a corpus."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from stu.common.cli import is_live

LOG_SECONDS = 30
"""Seconds between lines of progress where there is no terminal."""


@contextmanager
def show_progress(task: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and a line every `LOG_SECONDS` elsewhere, such as in a job's log.

    Yields a function to call with the number of bytes read since the last call.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar = progress.add_task(task, total=total_bytes)
    start = last_line = time.monotonic()

    def advance(num_bytes: int) -> None:
        nonlocal last_line
        progress.advance(bar, num_bytes)
        now = time.monotonic()
        if is_live(progress.console) or now - last_line < LOG_SECONDS:
            return
        last_line, done = now, progress.tasks[0].completed
        rate = done / (now - start)
        left = timedelta(seconds=round((total_bytes - done) / max(rate, 1)))
        print(
            f"{task}: {done / 1e6:,.1f} of {total_bytes / 1e6:,.1f} MB, {rate / 1e6:,.1f} MB/s, "
            f"{left} left",
            file=sys.stderr,
            flush=True,
        )

    with progress:
        yield advance
        progress.update(bar, completed=total_bytes)  # including what could not be read
