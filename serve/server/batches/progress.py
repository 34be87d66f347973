"""Progress of batches: each change is one transaction, so a client sees all of it or none.

Statuses follow one another as with OpenAI:

    validating -> failed
    validating -> in_progress -> finalizing -> completed or expired
    validating or in_progress -> cancelling -> cancelled

A batch whose input file was removed from the disk fails, whatever its status was.

The results of rows are appended to the two files of a batch. The database knows how many bytes of
these count: what a killed server wrote beyond them is cut off before anything else is written.
"""

import json
import os
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve.server.batches.files import NewFile
from serve.server.batches.store import Store
from stu.common.text import Json

Ending = Literal["completed", "expired"]


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens of an answer."""

    input: int = 0
    cached: int = 0
    """Tokens of the input that were remembered."""
    output: int = 0


@dataclass(frozen=True)
class Result:
    """The result of a row."""

    line: int
    """Number of the row's line in the input file, from 1."""
    text: bytes
    """Line of the output file, or of the error file."""
    is_error: bool
    tokens: Tokens = field(default_factory=Tokens)
    model: str = ""
    """Name of the model that was to decode the row, if it is known."""


@dataclass(frozen=True)
class Place:
    """The beginning of a line in an input file."""

    line: int
    """Number of the line, from 1."""
    offset: int
    """Number of bytes before it."""


class Progress:
    """Changes of one batch, whose row has a `number`."""

    def __init__(self, store: Store, number: int) -> None:
        self._store, self._number = store, number

    async def row(self) -> sqlite3.Row:
        """Return the row of the batch."""
        return await self._store.run(self._row)

    async def done(self, first: int, last: int) -> set[int]:
        """Return which lines from `first` to `last` have a result."""
        query = "SELECT line FROM done WHERE batch = ? AND line BETWEEN ? AND ?"
        values = [self._number, first, last]
        rows = await self._store.run(lambda db: db.execute(query, values).fetchall())
        return {line for (line,) in rows}

    async def begin(self, total: int) -> None:
        """Begin to decode `total` rows, unless the batch was cancelled."""
        await self._change("validating", "in_progress", total=total)

    async def fail(self, errors: Sequence[Json]) -> None:
        """End the batch because its input is not valid, unless it was cancelled."""
        await self._change("validating", "failed", errors=json.dumps(errors))

    async def lose(self, errors: Sequence[Json]) -> None:
        """End the batch with the results that it has, because its input file is lost."""

        def work(db: sqlite3.Connection) -> None:
            row = self._row(db)
            self._publish(db, row)
            self._set_status(db, row["status"], "failed", {"errors": json.dumps(errors)})

        await self._store.run(work)

    async def finalize(self, ends_as: Ending) -> None:
        """Decode no more rows, unless the batch was cancelled."""
        await self._change("in_progress", "finalizing", ends_as=ends_as)

    async def cancel(self) -> sqlite3.Row:
        """Cancel the batch if it has not ended and is not ending, and return its row."""

        def work(db: sqlite3.Connection) -> sqlite3.Row:
            for status in ("validating", "in_progress"):
                self._set_status(db, status, "cancelling", {})
            return self._row(db)

        return await self._store.run(work)

    async def add(self, results: Sequence[Result], following: Place) -> None:
        """Write results of rows that had none.

        following: Place of the first row that has no result then.
        """

        def work(db: sqlite3.Connection) -> None:
            row = self._row(db)
            assert all(result.line >= row["next_line"] for result in results)
            sizes = {
                kind: self._append(
                    row, kind, [result.text for result in results if result.is_error is is_error]
                )
                for kind, is_error in (("output", False), ("error", True))
            }
            num_failed = sum(result.is_error for result in results)
            more = {
                "completed": len(results) - num_failed,
                "failed": num_failed,
                "input_tokens": sum(result.tokens.input for result in results),
                "cached_tokens": sum(result.tokens.cached for result in results),
                "output_tokens": sum(result.tokens.output for result in results),
            }
            values = {
                **{name: row[name] + count for name, count in more.items()},
                **{f"{kind}_bytes": size for kind, size in sizes.items()},
                "next_line": following.line,
                "next_offset": following.offset,
            }
            self._set(db, values)
            db.execute(
                "DELETE FROM done WHERE batch = ? AND line < ?", [self._number, following.line]
            )
            later = [result.line for result in results if result.line >= following.line]
            # Fails for a line that has a result already.
            db.executemany(
                "INSERT INTO done VALUES (?, ?)", [(self._number, line) for line in later]
            )

        await self._store.run(work)

    async def end(self) -> None:
        """End a batch all of whose rows have results, or that was cancelled before it had rows."""

        def work(db: sqlite3.Connection) -> None:
            row = self._row(db)
            assert row["completed"] + row["failed"] == row["total"]
            self._publish(db, row)
            status = "cancelled" if row["status"] == "cancelling" else row["ends_as"]
            self._set_status(db, row["status"], status, {})

        await self._store.run(work)

    def _publish(self, db: sqlite3.Connection, row: sqlite3.Row) -> None:
        """Let the client find the files with the results of a batch that ends."""
        for kind in ("output", "error"):
            file_id, size = row[f"{kind}_id"], row[f"{kind}_bytes"]
            path = self._store.path(file_id)
            if size == 0:
                path.unlink(missing_ok=True)
            elif path.exists():
                os.truncate(path, size)
                filename = f"{row['id']}_{kind}.jsonl"
                seconds = row["results_seconds"]
                new = NewFile(file_id, row["owner"], "batch_output", filename, size, seconds)
                new.insert(db)
            else:  # somebody has removed it
                self._set(db, {f"{kind}_bytes": 0})
        db.execute("DELETE FROM done WHERE batch = ?", [self._number])

    def _append(self, row: sqlite3.Row, kind: str, lines: Sequence[bytes]) -> int:
        """Append lines to a file of results, and return its size."""
        size: int = row[f"{kind}_bytes"]
        if not lines:
            return size
        descriptor = os.open(
            self._store.path(row[f"{kind}_id"]), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        with open(descriptor, "r+b") as file:
            file.truncate(size)
            file.seek(size)
            file.writelines(lines)
            file.flush()
            os.fsync(descriptor)
        if size == 0:
            self._store.sync_names()
        return size + sum(map(len, lines))

    def _row(self, db: sqlite3.Connection) -> sqlite3.Row:
        query = "SELECT * FROM batches WHERE number = ?"
        row: sqlite3.Row = db.execute(query, [self._number]).fetchone()
        return row

    async def _change(self, before: str, after: str, **values: object) -> None:
        await self._store.run(lambda db: self._set_status(db, before, after, values))

    def _set_status(self, db: sqlite3.Connection, before: str, after: str, values: Json) -> None:
        """Change the status and further values, if the status is `before`."""
        if self._row(db)["status"] == before:
            self._set(db, {**values, "status": after, f"{after}_at": int(time.time())})

    def _set(self, db: sqlite3.Connection, values: Json) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        query = f"UPDATE batches SET {names} WHERE number = ?"
        db.execute(query, [*values.values(), self._number])


def batch_object(row: sqlite3.Row) -> Json:
    """Return a batch as OpenAI's object."""
    has_ended = row["status"] in ("completed", "failed", "expired", "cancelled")
    found = None if row["errors"] is None else json.loads(row["errors"])
    tokens = row["input_tokens"], row["output_tokens"]
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "errors": found and {"object": "list", "data": found},
        "input_file_id": row["input_file_id"],
        "completion_window": row["completion_window"],
        "status": row["status"],
        "output_file_id": row["output_id"] if has_ended and row["output_bytes"] else None,
        "error_file_id": row["error_id"] if has_ended and row["error_bytes"] else None,
        "created_at": row["created_at"],
        "in_progress_at": row["in_progress_at"],
        "expires_at": row["expires_at"],
        "finalizing_at": row["finalizing_at"],
        "completed_at": row["completed_at"],
        "failed_at": row["failed_at"],
        "expired_at": row["expired_at"],
        "cancelling_at": row["cancelling_at"],
        "cancelled_at": row["cancelled_at"],
        "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
        "usage": {
            "input_tokens": tokens[0],
            "input_tokens_details": {"cached_tokens": row["cached_tokens"]},
            "output_tokens": tokens[1],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sum(tokens),
        },
        "metadata": json.loads(row["metadata"]),
    }
