"""Files that clients have uploaded, and those with the results of their batches."""

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serve.server.batches.store import Store
from serve.server.replicas.stream import Busy
from stu.common.cli import option
from stu.common.errors import UserError
from stu.common.text import Json

Purpose = Literal["batch", "batch_output"]
Order = Literal["asc", "desc"]

FILE_SECONDS = 30 * 24 * 3600
"""Time after which a file expires if its client does not say otherwise."""
MOST_UPLOADS, MOST_UPLOADS_OF_OWNER = 64, 16
"""Limits of the uploads at once. Each has an open file."""
UNFINISHED = "('validating', 'in_progress', 'finalizing', 'cancelling')"
"""Statuses of batches that have not ended."""


@dataclass(frozen=True)
class NewFile:
    """A file to be added, whose content is on the disk."""

    id: str
    owner: str
    purpose: Purpose
    filename: str
    num_bytes: int
    seconds: int
    """Time until it expires."""

    def insert(self, db: sqlite3.Connection) -> None:
        """Add the file to the table."""
        now = int(time.time())
        values = [self.id, self.owner, self.purpose, self.filename, self.num_bytes]
        db.execute(
            "INSERT INTO files (id, owner, purpose, filename, bytes, created_at, expires_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [*values, now, now + self.seconds],
        )


class Arriving:
    """A file that arrives. Its bytes count among those of its owner before it is there.

    Attributes:
        path: Path of its content.
    """

    def __init__(self, files: "Files", owner: str, path: Path) -> None:
        self._files, self._owner, self.path = files, owner, path
        self._num_bytes = 0

    async def reserve(self, num_bytes: int) -> None:
        """Let the file have `num_bytes` in all. Raises UserError if it would make those of its
        owner too large together."""
        before = self._num_bytes
        if num_bytes <= before:
            return
        self._set(num_bytes)  # at once, so that others that arrive meanwhile count these
        try:
            await self._files.require_room(self._owner, num_bytes)
        except BaseException:
            self._set(before)
            raise

    def release(self) -> None:
        """Reserve nothing any more."""
        self._set(0)

    def _set(self, num_bytes: int) -> None:
        self._files.arriving_bytes[self._owner] += num_bytes - self._num_bytes
        self._num_bytes = num_bytes


class Files:
    """Files of all owners in a store.

    most_bytes: Limit of the files of an owner together.
    """

    def __init__(self, store: Store, most_bytes: int) -> None:
        self._store, self._most_bytes = store, most_bytes
        self._uploads = Counter[str]()
        """Uploads of each owner."""
        self.arriving_bytes = Counter[str]()
        """Bytes of these."""

    async def require_room(self, owner: str, num_bytes: int) -> None:
        """Raise UserError if a file of `num_bytes` that arrives makes those of its owner too large
        together."""
        others = self.arriving_bytes[owner] - num_bytes
        await self._store.run(lambda db: self._require_room(db, owner, num_bytes, others))

    @contextmanager
    def receiving(self, owner: str, file_id: str) -> Iterator[Arriving]:
        """Yield a new file, which is removed if the block raises.

        Raises Busy for too many uploads at once.
        """
        own, count = self._uploads[owner], self._uploads.total()
        if own >= MOST_UPLOADS_OF_OWNER or count >= MOST_UPLOADS:
            raise Busy(f"{count} files are being uploaded, {own} of them yours: try again later")
        self._uploads[owner] += 1
        arriving = Arriving(self, owner, self._store.path(file_id))
        try:
            yield arriving
        except BaseException:
            arriving.path.unlink(missing_ok=True)
            raise
        finally:
            arriving.release()
            self._uploads[owner] -= 1
            if self._uploads[owner] == 0:
                del self._uploads[owner], self.arriving_bytes[owner]

    async def add(self, new: NewFile) -> Json:
        """Add a file that has been received, and return it as OpenAI's object."""

        def work(db: sqlite3.Connection) -> Json:
            self._store.sync_names()
            new.insert(db)
            found = find_file(db, new.owner, new.id)
            assert found is not None
            return _object(found)

        return await self._store.run(work)

    async def get(self, owner: str, file_id: str) -> Json | None:
        """Return a file of an owner as OpenAI's object, or None."""
        row = await self._store.run(lambda db: find_file(db, owner, file_id))
        return None if row is None else _object(row)

    def path(self, file_id: str) -> Path:
        """Return the path of a file's content."""
        return self._store.path(file_id)

    async def listed(
        self, owner: str, after: str | None, limit: int, order: Order, purpose: str | None
    ) -> tuple[list[Json], bool]:
        """Return files of an owner by age, and whether there are more of them.

        after: Id of the file before the first one to return.
        """
        clauses, values = "owner = ? AND is_deleted = 0 AND expires_at > ?", [owner, time.time()]
        comparison, direction = (">", "ASC") if order == "asc" else ("<", "DESC")
        if after is not None:
            clauses += f" AND number {comparison} ?"
            values.append(await self._store.run(lambda db: number_of(db, "files", owner, after)))
        if purpose is not None:
            clauses += " AND purpose = ?"
            values.append(purpose)
        query = f"SELECT * FROM files WHERE {clauses} ORDER BY number {direction} LIMIT ?"
        rows = await self._store.run(lambda db: db.execute(query, [*values, limit + 1]).fetchall())
        return [_object(row) for row in rows[:limit]], len(rows) > limit

    async def delete(self, owner: str, file_id: str) -> bool:
        """Delete a file of an owner, and return whether there was one. A batch that reads it goes
        on."""

        def work(db: sqlite3.Connection) -> bool:
            found = find_file(db, owner, file_id)
            db.execute(
                "UPDATE files SET is_deleted = 1 WHERE id = ? AND owner = ?", [file_id, owner]
            )
            return found is not None

        was_there = await self._store.run(work)
        await self.sweep()
        return was_there

    async def sweep(self) -> None:
        """Remove from the disk what is deleted or has expired, and read by no batch."""

        def work(db: sqlite3.Connection) -> None:
            is_over = (
                "(is_deleted = 1 OR expires_at <= ?) AND id NOT IN "
                f"(SELECT input_file_id FROM batches WHERE status IN {UNFINISHED})"
            )
            query = f"SELECT id FROM files WHERE is_stored = 1 AND {is_over}"
            for (file_id,) in db.execute(query, [time.time()]).fetchall():
                self._store.path(file_id).unlink(missing_ok=True)
                db.execute("UPDATE files SET is_stored = 0 WHERE id = ?", [file_id])
            db.execute("DELETE FROM files WHERE is_stored = 0 AND expires_at <= ?", [time.time()])

        await self._store.run(work)

    def _require_room(
        self, db: sqlite3.Connection, owner: str, num_bytes: int, others: int
    ) -> None:
        files = "SELECT COALESCE(SUM(bytes), 0) FROM files WHERE owner = ? AND is_stored = 1"
        results = (
            "SELECT COALESCE(SUM(output_bytes + error_bytes), 0) FROM batches WHERE owner = ? "
            f"AND status IN {UNFINISHED}"
        )
        stored = sum(db.execute(query, [owner]).fetchone()[0] for query in (files, results))
        present = stored + others
        if present + num_bytes > self._most_bytes:
            raise UserError(
                "file",
                message=f"a file of {num_bytes} bytes is not allowed beside the {present} bytes of "
                f"your other files: together they may have {self._most_bytes} bytes "
                f"({option('max_stored_bytes')}); delete files that you no longer need",
            )


def find_file(db: sqlite3.Connection, owner: str, file_id: str) -> sqlite3.Row | None:
    """Return the row of an owner's file, or None if there is none any more."""
    query = "SELECT * FROM files WHERE id = ? AND owner = ? AND is_deleted = 0 AND expires_at > ?"
    row: sqlite3.Row | None = db.execute(query, [file_id, owner, time.time()]).fetchone()
    return row


def _object(row: sqlite3.Row) -> Json:
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
    }


def number_of(
    db: sqlite3.Connection, table: Literal["files", "batches"], owner: str, after: str
) -> int:
    """Return the number of the row that a list goes on after. Raises UserError if there is none."""
    query = f"SELECT number FROM {table} WHERE id = ? AND owner = ?"
    row = db.execute(query, [after, owner]).fetchone()
    if row is None:
        raise UserError("after", after, "the id of the last object of the page before")
    number: int = row[0]
    return number
