"""Responses that the server remembers, in SQLite: in memory, or in a file that outlives it."""

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from serve.openai.messages import MOST_MESSAGES
from serve.openai.responses.items import Item, read_items
from stu.common.errors import UserError
from stu.common.text import Json

CREATE = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    response TEXT NOT NULL,
    items TEXT NOT NULL,
    previous TEXT,
    bytes INTEGER NOT NULL,
    used INTEGER NOT NULL
)
"""
VERSION = 1
"""Version of the table."""


class ResponseStore:
    """Stored responses, each with the items of its input.

    Those that were used least recently make room. It may be used from any thread.

    Args:
        path: File of the database. None: it is in memory.
        most_bytes: Limit of the JSON of all responses together.
    """

    def __init__(self, path: Path | None, most_bytes: int) -> None:
        self._most_bytes, self._lock = most_bytes, threading.Lock()
        self._database = sqlite3.connect(path or ":memory:", check_same_thread=False)
        with self._lock, self._database as database:
            database.execute("PRAGMA journal_mode=WAL")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                reason = f"its table has version {version}, and this program knows {VERSION}"
                raise UserError(message=f"{path}: {reason}: give another folder")
            database.execute(CREATE)
            database.execute(f"PRAGMA user_version={VERSION}")
            database.execute("CREATE INDEX IF NOT EXISTS by_use ON responses (used)")
            counts = "SELECT COALESCE(SUM(bytes), 0), COALESCE(MAX(used), 0) FROM responses"
            self._num_bytes, self._num_uses = database.execute(counts).fetchone()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    def add(self, owner: str, response: Json, items: Sequence[Json]) -> bool:
        """Store a response, and return whether it is not larger than the limit, and so is stored.
        Raises OperationalError if it cannot be written."""
        texts = json.dumps(response), json.dumps(list(items))
        num_bytes = sum(map(len, texts))
        if num_bytes > self._most_bytes:
            return False
        with self._transaction() as database:
            self._num_uses += 1
            self._num_bytes += num_bytes
            previous = response["previous_response_id"]
            row = (response["id"], owner, *texts, previous, num_bytes, self._num_uses)
            database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            while self._num_bytes > self._most_bytes:
                oldest = "SELECT id, bytes FROM responses ORDER BY used LIMIT 1"
                self._remove(*database.execute(oldest).fetchone())
        return True

    def response(self, owner: str, response_id: str) -> str:
        """Return the JSON of a response. Raises UserError if there is none with this id."""
        with self._lock:
            text = str(self._row(owner, response_id)[0])
        self._use(response_id)
        return text

    def items(self, owner: str, response_id: str) -> list[Json]:
        """Return the items of the input of a response. Raises UserError as `response`."""
        with self._lock:
            text = self._row(owner, response_id)[1]
        self._use(response_id)
        return list(json.loads(text))

    def conversation(
        self, owner: str, response_id: str, most_items: int = MOST_MESSAGES
    ) -> list[Json]:
        """Return the items of a response and of all that it follows: input, output, and so on.

        Calls that were cut off are left out. Raises UserError if one of them is not stored, or if
        they have more than `most_items` items.
        """
        turns: list[list[Json]] = []
        used: list[str] = []
        num_items = 0
        next_id: str | None = response_id
        with self._lock:
            while next_id is not None:
                response, items, previous = self._row(owner, next_id)
                turn = [*json.loads(items), *json.loads(response)["output"]]
                turns.append([item for item in turn if _is_whole(item)])
                num_items += len(turns[-1])
                if num_items > most_items:
                    fix = (
                        f"a conversation may have {MOST_MESSAGES} items, and with those of input "
                        "this one has more: leave it out, and give the last of them in input"
                    )
                    raise UserError("", fix=fix)
                used.append(next_id)
                next_id = previous
        self._use(*used)
        return [item for turn in reversed(turns) for item in turn]

    def delete(self, owner: str, response_id: str) -> None:
        """Forget a response. Raises UserError as `response`."""
        with self._transaction() as database:
            self._row(owner, response_id)
            size = "SELECT bytes FROM responses WHERE id = ?"
            self._remove(response_id, database.execute(size, (response_id,)).fetchone()[0])

    def _use(self, *response_ids: str) -> None:
        """Note that responses have been read, unless the disk is full."""
        with suppress(sqlite3.OperationalError), self._transaction() as database:
            for response_id in response_ids:
                self._num_uses += 1
                use = "UPDATE responses SET used = ? WHERE id = ?"
                database.execute(use, (self._num_uses, response_id))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Change the database and the counts of it, or neither if the block raises."""
        with self._lock:
            counts = self._num_bytes, self._num_uses
            try:
                with self._database as database:
                    yield database
            except BaseException:
                self._num_bytes, self._num_uses = counts
                raise

    def _row(self, owner: str, response_id: str) -> tuple[Any, ...]:
        query = "SELECT response, items, previous FROM responses WHERE id = ? AND owner = ?"
        with closing(self._database.execute(query, (response_id, owner))) as cursor:
            row: tuple[Any, ...] | None = cursor.fetchone()
        if row is None:
            raise UserError(
                "response_id",
                response_id,
                message=f"no stored response has the id {response_id[:100]!r}: it was not stored, "
                "was deleted, or has made room for others",
                code="response_not_found",
            )
        return row

    def _remove(self, response_id: str, num_bytes: int) -> None:
        self._database.execute("DELETE FROM responses WHERE id = ?", (response_id,))
        self._num_bytes -= num_bytes


def earlier_items(
    store: ResponseStore, owner: str, previous_id: str, num_new_items: int
) -> list[Item]:
    """Return the items of a stored conversation for a body with this `previous_response_id` and
    `num_new_items` items of its own.

    Raises UserError about this field if the conversation is not stored or cannot be continued.
    """
    field = "previous_response_id"
    try:
        most_items = MOST_MESSAGES - num_new_items
        found = store.conversation(owner, previous_id, most_items)
        return read_items(found)
    except UserError as error:
        if error.code is not None:
            message, code = str(error), "previous_response_not_found"
            raise UserError(field, previous_id, message=message, code=code) from error
        wrong = error.renamed(f"{field}.{error.field}" if error.field else field)
        message = f"the stored conversation cannot be continued: {wrong}"
        raise UserError(field, previous_id, message=message) from error


def _is_whole(item: Json) -> bool:
    return bool(item["type"] != "function_call" or item["status"] == "completed")
