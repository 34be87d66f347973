"""Batches in a store: how far they are, and what clients see of them."""

import json
import sqlite3
import time
from dataclasses import dataclass
from typing import Any

from serve.server.batches.files import UNFINISHED, find_file, number_of
from serve.server.batches.store import Store, new_id
from serve.server.replicas.stream import Busy
from stu.common.errors import UserError

MOST_UNFINISHED = 100
"""Limit of the batches of an owner that have not ended."""
KEPT_SECONDS = 60 * 24 * 3600
"""Time after its creation for which a batch that has ended can be found."""


@dataclass(frozen=True)
class NewBatch:
    """A batch to be added."""

    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    seconds: int
    """Time until it expires."""
    results_seconds: int
    """Time until the files with its results expire."""
    metadata: Any


class BatchTable:
    """The batches of all owners in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def add(self, new: NewBatch) -> sqlite3.Row:
        """Add a batch, and return its row.

        Raises:
            UserError: There is no such input file.
            Busy: The owner has too many batches that have not ended.
        """

        def work(db: sqlite3.Connection) -> sqlite3.Row:
            found = find_file(db, new.owner, new.input_file_id)
            if found is None or found["purpose"] != "batch":
                allowed = "the id of a file that was uploaded with purpose=batch"
                raise UserError("input_file_id", new.input_file_id, allowed)
            query = f"SELECT COUNT(*) FROM batches WHERE owner = ? AND status IN {UNFINISHED}"
            (count,) = db.execute(query, [new.owner]).fetchone()
            if count >= MOST_UNFINISHED:
                raise Busy(f"{count} of your batches have not ended: wait for one, or cancel one")
            now, batch_id = int(time.time()), new_id("batch_")
            values = {
                "id": batch_id,
                "owner": new.owner,
                "endpoint": new.endpoint,
                "input_file_id": new.input_file_id,
                "completion_window": new.completion_window,
                "metadata": json.dumps(new.metadata),
                "results_seconds": new.results_seconds,
                "created_at": now,
                "expires_at": now + new.seconds,
                "output_id": new_id("file-"),
                "error_id": new_id("file-"),
            }
            names, marks = ", ".join(values), ", ".join("?" * len(values))
            db.execute(f"INSERT INTO batches ({names}) VALUES ({marks})", list(values.values()))
            found = _find(db, new.owner, batch_id)
            assert found is not None
            return found

        return await self._store.run(work)

    async def get(self, number: int) -> sqlite3.Row:
        """Return the row of a batch."""
        query = "SELECT * FROM batches WHERE number = ?"
        row: sqlite3.Row = await self._store.run(lambda db: db.execute(query, [number]).fetchone())
        return row

    async def find(self, owner: str, batch_id: str) -> sqlite3.Row | None:
        """Return the row of an owner's batch, or None."""
        return await self._store.run(lambda db: _find(db, owner, batch_id))

    async def listed(
        self, owner: str, after: str | None, limit: int
    ) -> tuple[list[sqlite3.Row], bool]:
        """Return the newest batches of an owner, and whether there are more of them.

        after: Id of the batch before the first one to return.
        """

        def work(db: sqlite3.Connection) -> list[sqlite3.Row]:
            before = 2**62 if after is None else number_of(db, "batches", owner, after)
            query = (
                "SELECT * FROM batches WHERE owner = ? AND number < ? ORDER BY number DESC LIMIT ?"
            )
            return db.execute(query, [owner, before, limit + 1]).fetchall()

        rows = await self._store.run(work)
        return rows[:limit], len(rows) > limit

    async def unfinished(self) -> list[int]:
        """Return the numbers of batches that have not ended, the oldest first."""
        query = f"SELECT number FROM batches WHERE status IN {UNFINISHED} ORDER BY number"
        rows = await self._store.run(lambda db: db.execute(query).fetchall())
        return [number for (number,) in rows]

    async def recover(self) -> None:
        """Remove files that no row knows, which uploads left behind when the server ended."""

        def work(db: sqlite3.Connection) -> None:
            known = {row[0] for row in db.execute("SELECT id FROM files").fetchall()}
            query = f"SELECT output_id, error_id FROM batches WHERE status IN {UNFINISHED}"
            for row in db.execute(query).fetchall():
                known.update(row)
            self._store.remove_unknown_files(known)

        await self._store.run(work)

    async def sweep(self) -> None:
        """Forget batches that ended long ago."""
        query = f"DELETE FROM batches WHERE status NOT IN {UNFINISHED} AND created_at < ?"
        before = time.time() - KEPT_SECONDS
        await self._store.run(lambda db: db.execute(query, [before]))


def _find(db: sqlite3.Connection, owner: str, batch_id: str) -> sqlite3.Row | None:
    query = "SELECT * FROM batches WHERE id = ? AND owner = ?"
    row: sqlite3.Row | None = db.execute(query, [batch_id, owner]).fetchone()
    return row
