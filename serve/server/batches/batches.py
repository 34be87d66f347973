"""All files and batches of a server: their folder, and what runs batches."""

import asyncio
import logging
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from serve.server.batches.decoding import Answering, Decoding, new_request_id
from serve.server.batches.files import Files
from serve.server.batches.lines import unanswered
from serve.server.batches.progress import Place, Progress, Result
from serve.server.batches.rows import Rows
from serve.server.batches.store import Store
from serve.server.batches.table import BatchTable, NewBatch
from serve.server.batches.validation import validate
from serve.server.batches.window import Windows
from stu.common.errors import UserError
from stu.common.text import Json

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

SWEEP_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 60.0
"""Longest pause before a batch is continued that failed, for example as the disk cannot be read."""
UNANSWERED = {
    "cancelling": ("batch_cancelled", "the batch was cancelled before this request had ended"),
    "finalizing": ("batch_expired", "the batch expired before this request had ended"),
}
"""Codes and messages of rows without an answer, by the status of their batch."""
LOST = {
    "code": "input_file_lost",
    "line": None,
    "message": "the input file is no longer in the server's folder: upload it again",
    "param": "input_file_id",
}
"""Error of a batch whose input file was removed from the disk."""


@dataclass(frozen=True)
class Limits:
    """Limits of files and batches."""

    file_bytes: int
    """Size of a file."""
    stored_bytes: int
    """Size of all files of an owner together."""
    rows: int
    """Rows of a batch."""
    line_bytes: int
    """Size of a row."""
    rows_at_once: Mapping[str, int]
    """Rows that are decoded at once, of all batches, by the names of models, the one of rows that
    name none first."""


class Batches:
    """All files and batches of a server.

    Args:
        folder: Folder of their files.
        limits: Limits of them.
        model_of: Returns the name of the model that the field `model` of a body stands for, or
            None if there is no such model.

    Raises UserError if the folder cannot be used.
    """

    def __init__(self, folder: Path, limits: Limits, model_of: Callable[[str], str | None]) -> None:
        self.limits, self._model_of = limits, model_of
        self._store = Store(folder)
        self.files = Files(self._store, limits.stored_bytes)
        self.table = BatchTable(self._store)
        self._cancelled: dict[int, asyncio.Event] = {}
        """An event for each batch that has not ended, by number."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        # Not the threads of the event loop, on which all other requests rely.
        self._checks = ThreadPoolExecutor(1, "batch-checks")
        self._readers = ThreadPoolExecutor(1, "batch-readers")
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """For each owner one, so that owners take turns at checks."""
        self.num_results: Counter[tuple[str, bool]] = Counter()
        """Results written since the server started, by the name of the model, if it is known, and
        whether they are errors."""

    @property
    def num_unfinished(self) -> int:
        """Number of batches that have not ended."""
        return len(self._cancelled)

    async def start(self, answering: Answering) -> None:
        """Continue the batches that had not ended when the server did."""
        self._answering = answering
        self._windows = Windows(self.limits.rows_at_once, self._model_of)
        await self.table.recover()
        for number in await self.table.unfinished():
            self._begin(number)
        self._start(self._sweep())

    async def stop(self) -> None:
        """Stop. Rows that are being decoded are decoded again after the next start."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for threads in (self._checks, self._readers):
            threads.shutdown()
        self._store.close()

    async def create(self, new: NewBatch) -> sqlite3.Row:
        """Add a batch, begin to run it, and return its row. Raises as `BatchTable.add`."""
        row = await self.table.add(new)
        self._begin(row["number"])
        return row

    async def cancel(self, number: int) -> sqlite3.Row:
        """Cancel a batch unless it has ended or is ending, and return its row."""
        row = await Progress(self._store, number).cancel()
        if number in self._cancelled:
            self._cancelled[number].set()
        return row

    def _begin(self, number: int) -> None:
        self._cancelled[number] = asyncio.Event()
        self._start(self._run(number))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sweep(self) -> None:
        while True:
            try:
                await self.files.sweep()
                await self.table.sweep()
            except Exception:
                logger.exception("files that have expired cannot be removed")
            await asyncio.sleep(SWEEP_SECONDS)

    async def _run(self, number: int) -> None:
        """Run a batch to its end, whatever fails on the way."""
        progress = Progress(self._store, number)
        num_failures = 0
        while True:
            try:
                row = await progress.row()
                if self._is_lost(row):
                    await progress.lose([LOST])
                elif row["status"] == "validating":
                    await self._validate(progress, row)
                elif row["status"] == "in_progress":
                    await self._decode(progress, row)
                elif row["status"] in UNANSWERED:
                    await self._end(progress, row)
                else:
                    break
                num_failures = 0
            except Exception:
                logger.exception("a batch failed, and is continued in a moment")
                await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, 2.0**num_failures))
                num_failures += 1
        del self._cancelled[number]

    async def _validate(self, progress: Progress, row: sqlite3.Row) -> None:
        """Check the file of a batch, unless it is cancelled first, perhaps before its turn."""
        found = await self._unless_cancelled(row["number"], self._check(row))
        if found is None:
            return
        num_rows, errors = found
        # Neither changes a batch that was cancelled, whose file may not have been read to its end.
        if errors:
            await progress.fail(errors)
        else:
            await progress.begin(num_rows)

    async def _check(self, row: sqlite3.Row) -> tuple[int, list[Json]]:
        cancelled = self._cancelled[row["number"]]
        async with self._turns[row["owner"]]:
            return await asyncio.get_running_loop().run_in_executor(
                self._checks,
                validate,
                self.files.path(row["input_file_id"]),
                row["endpoint"],
                self.limits.rows,
                self.limits.line_bytes,
                lambda: not (self._is_stopping or cancelled.is_set()),
            )

    async def _unless_cancelled(
        self, number: int, work: Coroutine[Any, Any, Found], seconds: float | None = None
    ) -> Found | None:
        """Return the result of `work`, or None if the batch is cancelled, or the time is over,
        before it has one."""
        task = asyncio.create_task(work)
        cancelled = asyncio.create_task(self._cancelled[number].wait())
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait({task, cancelled}, timeout=seconds, return_when=first)
            return task.result() if task.done() else None
        finally:
            for own in (task, cancelled):
                own.cancel()
            await asyncio.gather(task, cancelled, return_exceptions=True)

    async def _decode(self, progress: Progress, row: sqlite3.Row) -> None:
        """Decode rows until none is left, the batch is cancelled, or it expires."""
        async with self._rows(progress, row) as rows:
            decoding = Decoding(rows, self._answering, self._windows, row["owner"], row["endpoint"])
            seconds = max(0.0, row["expires_at"] - time.time())
            is_done = await self._unless_cancelled(row["number"], decoding.run(), seconds)
        await progress.finalize("completed" if is_done else "expired")

    async def _end(self, progress: Progress, row: sqlite3.Row) -> None:
        """Give the rows that are left a result, and end the batch."""
        if _has_unanswered_rows(row):
            code, message = UNANSWERED[row["status"]]
            async with self._rows(progress, row) as rows:
                async for line in rows.read():
                    try:
                        custom_id = line.row()["custom_id"]
                    except UserError:
                        custom_id = ""
                    result = unanswered(custom_id, new_request_id(), code, message, line.place.line)
                    await rows.add(result)
                await rows.written()
        await progress.end()
        await self.files.sweep()  # its input may have been deleted meanwhile

    def _rows(self, progress: Progress, row: sqlite3.Row) -> Rows:
        path, place = (
            self.files.path(row["input_file_id"]),
            Place(row["next_line"], row["next_offset"]),
        )
        return Rows(progress, path, place, self.limits.line_bytes, self._readers, self._count)

    def _is_lost(self, row: sqlite3.Row) -> bool:
        """Return whether the input of a batch is needed, and somebody has removed it."""
        is_ending = row["status"] in UNANSWERED and _has_unanswered_rows(row)
        is_needed = row["status"] in ("validating", "in_progress") or is_ending
        return is_needed and not self.files.path(row["input_file_id"]).exists()

    def _count(self, results: Sequence[Result]) -> None:
        self.num_results.update((result.model, result.is_error) for result in results)


def _has_unanswered_rows(row: sqlite3.Row) -> bool:
    """Return whether rows of a batch have no result. A file whose check has not ended is not known
    to have rows."""
    is_checked = row["in_progress_at"] is not None
    return is_checked and row["completed"] + row["failed"] < row["total"]
