"""Progress of a batch run: a bar on a terminal, a line every 30 seconds in a log."""

import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from serve.batch.decoder import Report
from stu.common.cli import is_live

LOG_SECONDS = 30
SPEED_SECONDS = 15
"""Time over which tokens per second are averaged."""


class Tally:
    """Counts of what all engines of a run have done, and what is left.

    Args:
        num_before: Rows that the output had already.
        num_failed: How many of them have an error.
        counts_prompts: Whether tokens are those of prompts, and not new ones.
    """

    def __init__(
        self,
        num_before: int,
        num_failed: int,
        clock: Callable[[], float] = time.monotonic,
        counts_prompts: bool = False,
    ) -> None:
        self.num_before, self.num_failed = num_before, num_failed
        self._counted = "prompt_tokens" if counts_prompts else "new_tokens"
        self.num_rows = 0
        """Rows written by this run."""
        self._latest: dict[int, Report] = {}
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()
        """Times, and tokens up to then."""

    def add(self, engine: int, report: Report) -> None:
        """Count the report of one engine."""
        self.num_rows += len(report.lines)
        self.num_failed += report.num_failed
        self._latest[engine] = report
        now = self._clock()
        if not self._samples:
            self._samples.append((now - report.seconds, 0))
        self._samples.append((now, self._num_tokens))
        while len(self._samples) > 2 and self._samples[1][0] < now - SPEED_SECONDS:
            self._samples.popleft()

    @property
    def num_done(self) -> int:
        """Rows that are written."""
        return self.num_before + self.num_rows

    @property
    def rows_left(self) -> float:
        """Estimate of the rows that are left; the input is not read ahead."""
        return sum(report.rows_left for report in self._latest.values())

    def status(self) -> str:
        """Return the state of the run in two lines."""
        (then, before), (now, tokens) = self._samples[0], self._samples[-1]
        speed = (tokens - before) / (now - then) if now > then else 0.0
        rows = f"{self.num_done:,} of about {self.num_done + self.rows_left:,.0f} rows"
        parts = [rows, f"{speed:,.0f} tokens/s"]
        if self.num_rows:
            seconds_left = round(self.rows_left * self._seconds / self.num_rows)
            parts.append(f"about {timedelta(seconds=seconds_left)} left")
        all_stats = [report.stats for report in self._latest.values()]
        used = [f"{sum(stats.running for stats in all_stats):,} running"]
        used.append(f"{sum(stats.waiting for stats in all_stats):,} waiting")
        for kind in ("convolution", "attention"):
            num_pages = sum(getattr(stats, f"{kind}_pages") for stats in all_stats)
            if num_pages:
                num_used = sum(getattr(stats, f"{kind}_pages_used") for stats in all_stats)
                used.append(f"{num_used:,} of {num_pages:,} {kind} pages")
        return f"{', '.join(parts)}\n{', '.join(used)}"

    def __str__(self) -> str:
        before = f", besides {self.num_before:,} from before" if self.num_before else ""
        failed = f" ({self.num_failed:,} with an error)" if self.num_failed else ""
        speed = self._num_tokens / self._seconds if self._seconds else 0.0
        return (
            f"{self.num_rows:,} rows{before}{failed}, {self._num_tokens:,} tokens in "
            f"{self._seconds:.1f} s, {speed:,.0f} tokens/s"
        )

    @property
    def _num_tokens(self) -> int:
        return sum(getattr(report.stats, self._counted) for report in self._latest.values())

    @property
    def _seconds(self) -> float:
        """Seconds of decoding, without loading models."""
        return max((report.seconds for report in self._latest.values()), default=0.0)


class Display:
    """Shows a tally on standard error while its context is open."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        console = Console(stderr=True)
        columns = BarColumn(bar_width=20), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=console, disable=not is_live(console))
        self._task = self._bar.add_task("loading the model", total=None)
        self._clock, self._last_log = clock, clock()

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, tally: Tally) -> None:
        """Show the present state."""
        total = tally.num_done + tally.rows_left
        self._bar.update(
            self._task, description=tally.status(), completed=tally.num_done, total=total
        )
        if self._bar.disable and self._clock() - self._last_log >= LOG_SECONDS:
            self._last_log = self._clock()
            print(tally.status().replace("\n", ", "), file=sys.stderr)
