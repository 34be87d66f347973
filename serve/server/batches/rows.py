"""Rows of a batch that have no result yet, and the results, which are written together."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from types import TracebackType

from serve.server.batches.lines import Line, read_chunk
from serve.server.batches.progress import Place, Progress, Result

logger = logging.getLogger(__name__)

WRITE_SECONDS = 0.05
"""Time in which results gather before they are written."""
RETRY_SECONDS = 5.0
"""Time until results are written again that could not be, for example on a full disk."""
MOST_UNWRITTEN_BYTES = 2**23
"""Size of the results that wait to be written, above which no further row ends."""


class Reading:
    """A reading of rows of a batch that have no result yet, in the order of the file.

    Args:
        read: Returns the next lines without a result from a place on and the place after them; None
            at the end of the file.
        place: The first row to read.
    """

    def __init__(
        self, read: Callable[[Place], Awaitable[tuple[list[Line], Place] | None]], place: Place
    ) -> None:
        self._read, self._unread = read, place
        self._left: dict[int, Place] = {}
        """Rows that were read and whose result is not written, by line, in the file's order."""

    async def __aiter__(self) -> AsyncIterator[Line]:
        while (found := await self._read(self._unread)) is not None:
            lines, self._unread = found
            self._left |= {line.place.line: line.place for line in lines}
            for line in lines:
                yield line

    def leave(self, line: Line) -> None:
        """Leave a row to another reading."""
        self._left.pop(line.place.line, None)

    def first_left(self, lines: Container[int]) -> Place:
        """Return its first row without a result, once these lines have theirs."""
        left = (place for line, place in self._left.items() if line not in lines)
        return next(left, self._unread)

    def written(self, lines: Iterable[int]) -> None:
        """Note that these lines have results."""
        for line in lines:
            self._left.pop(line, None)


class Rows:
    """Rows of a batch that have no result yet.

    Used as a context, at whose end the results so far are written if that is possible. Rows whose
    result is not written are among those of the next one.

    Args:
        progress: Progress of the batch.
        path: Its input file.
        place: The first row without a result.
        most_line_bytes: Limit of a line.
        readers: Threads that read the file; by default those of the event loop.
        count: Called with results that have been written.
    """

    def __init__(
        self,
        progress: Progress,
        path: Path,
        place: Place,
        most_line_bytes: int,
        readers: Executor | None = None,
        count: Callable[[Sequence[Result]], None] = lambda results: None,
    ) -> None:
        self._progress, self._path, self._most_line_bytes = progress, path, most_line_bytes
        self._readers, self._count = readers, count
        self._place = place
        self._readings: list[Reading] = []
        """Each row without a result is among those of one of them at least."""
        self._results: list[Result] = []
        """Results that are not written."""
        self._num_bytes = 0
        """Size of these."""
        self._has_results, self._has_written = asyncio.Event(), asyncio.Event()
        self._is_over = False

    async def __aenter__(self) -> "Rows":
        self._writing = asyncio.create_task(self._write())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over = True
        self._has_results.set()
        await self._writing

    def read(self, place: Place | None = None) -> Reading:
        """Return a reading of the rows from a place on; by default of all."""
        self._readings.append(Reading(self._read, place or self._place))
        return self._readings[-1]

    async def add(self, result: Result) -> None:
        """Add the result of a row. This waits while many wait to be written."""
        self._results.append(result)
        self._num_bytes += len(result.text)
        self._has_results.set()
        await self._until_unwritten(MOST_UNWRITTEN_BYTES)

    async def written(self) -> None:
        """Wait until all results are written."""
        await self._until_unwritten(0)

    async def _read(self, place: Place) -> tuple[list[Line], Place] | None:
        in_thread = partial(asyncio.get_running_loop().run_in_executor, self._readers)
        lines = await in_thread(read_chunk, self._path, place, self._most_line_bytes)
        if not lines:
            return None
        first, last = lines[0], lines[-1]
        done = await self._progress.done(first.place.line, last.place.line)
        left = [line for line in lines if line.place.line not in done]
        await in_thread(_parse, left)  # long rows would hold up the event loop
        return left, last.following

    async def _until_unwritten(self, most_bytes: int) -> None:
        while self._num_bytes > most_bytes:
            self._has_written.clear()
            await self._has_written.wait()

    async def _write(self) -> None:
        while True:
            await self._has_results.wait()
            if not self._is_over:
                await asyncio.sleep(WRITE_SECONDS)
            results = list(self._results)
            if results and not await self._are_written(results):
                if self._is_over:
                    return
                await asyncio.sleep(RETRY_SECONDS)
                continue
            del self._results[: len(results)]
            self._num_bytes -= sum(len(result.text) for result in results)
            self._has_written.set()
            if not self._results:
                self._has_results.clear()
                if self._is_over:
                    return

    async def _are_written(self, results: list[Result]) -> bool:
        """Write results, and return whether that was possible."""
        lines = {result.line for result in results}
        firsts = [reading.first_left(lines) for reading in self._readings]
        try:
            await self._progress.add(results, min(firsts, key=lambda place: place.line))
        except (OSError, sqlite3.Error) as error:
            logger.error("results of a batch cannot be written: %s", error)
            return False
        for reading in self._readings:
            reading.written(lines)
        self._count(results)
        return True


def _parse(lines: Iterable[Line]) -> None:
    """Parse rows, whose results the lines keep."""
    for line in lines:
        _ = line.parsed
