"""A folder with files and batches, which survives the end of the server at any moment.

    FOLDER/batches.sqlite3    what is known of files and batches
    FOLDER/files/ID           content of a file
    FOLDER/lock               locked by the server that uses the folder

All reads and writes of the database run one after the other in a thread, each as a transaction
that is on disk when it returns.
"""

import asyncio
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from stu.common.errors import UserError, setting_name
from stu.common.files import fsync

Result = TypeVar("Result")

VERSION = 1
"""Version of the tables."""
TABLES = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    purpose TEXT NOT NULL,
    filename TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    is_deleted INTEGER NOT NULL DEFAULT 0,
    is_stored INTEGER NOT NULL DEFAULT 1
);
CREATE INDEX files_of_owners ON files (owner, number);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    metadata TEXT NOT NULL,
    results_seconds INTEGER NOT NULL,
    status TEXT NOT NULL DEFAULT 'validating',
    ends_as TEXT,
    errors TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    output_id TEXT NOT NULL,
    error_id TEXT NOT NULL,
    output_bytes INTEGER NOT NULL DEFAULT 0,
    error_bytes INTEGER NOT NULL DEFAULT 0,
    next_line INTEGER NOT NULL DEFAULT 1,
    next_offset INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX batches_of_owners ON batches (owner, number);
CREATE TABLE done (
    batch INTEGER NOT NULL,
    line INTEGER NOT NULL,
    PRIMARY KEY (batch, line)
) WITHOUT ROWID;
"""
"""A deleted file keeps its row until it expires, so that lists can go on after it; `is_stored` is 0
once its content is removed. `next_line` and `next_offset` are the place of the first row without a
result; `done` has the lines after it that have one. `ends_as` is the status after finalizing."""


class Store:
    """The folder of a server.

    Args:
        folder: Made if it is missing.

    Raises UserError if the folder cannot be used, or another server uses it.
    """

    def __init__(self, folder: Path) -> None:
        self._files = folder / "files"
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)  # files have what clients wrote
            self._lock = (folder / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._connection = _connect(folder / "batches.sqlite3")
        except BlockingIOError:
            self._lock.close()
            fix = "another server uses it, give each server a folder of its own"
            raise UserError("batch_dir", message=f"{_option(folder)}: {fix}") from None
        except (OSError, sqlite3.Error) as error:
            raise UserError("batch_dir", message=f"{_option(folder)}: {error}") from error
        self._thread = ThreadPoolExecutor(1, "store")

    async def run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Return the result of `work`, a transaction, which is undone if it raises. It runs to its
        end even if the caller is cancelled meanwhile."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._thread, self._transact, work))

    def path(self, file_id: str) -> Path:
        """Return the path of a file's content."""
        return self._files / file_id

    def close(self) -> None:
        """Wait for transactions that have begun, and let another server use the folder."""
        self._thread.shutdown()
        self._connection.close()
        self._lock.close()

    def remove_unknown_files(self, known: set[str]) -> None:
        """Remove what uploads left behind that had not ended when the server did."""
        for path in self._files.iterdir():
            if path.name not in known:
                path.unlink()

    def sync_names(self) -> None:
        """Return when the names of new files would survive a crash of the machine."""
        fsync(self._files)

    def _transact(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(self._connection)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return result


def new_id(prefix: str) -> str:
    """Return an id that no one can guess."""
    return f"{prefix}{secrets.token_hex(16)}"


def _option(folder: Path) -> str:
    return f"{setting_name('batch_dir')} {folder}"


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(f"BEGIN;{TABLES}PRAGMA user_version={VERSION};COMMIT")
        elif version != VERSION:
            raise OSError(
                f"its tables have version {version}, and this program knows {VERSION}: give "
                "another folder, or use the version of stu that wrote it"
            )
        os.chmod(path, 0o600)
    except BaseException:
        connection.close()
        raise
    return connection
