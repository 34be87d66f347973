"""Checks of a batch's input file before any of its rows is decoded."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from serve.server.batches.lines import INVALID_JSON, Line, read_lines
from serve.server.batches.progress import Place
from stu.common.errors import UserError, show
from stu.common.text import Json, nearest, require_unicode

MOST_ERRORS = 100
"""Number of errors at which the rest of a file is not read."""
MOST_ID_CHARACTERS = 512
FIELDS = ("custom_id", "method", "url", "body")


def validate(
    path: Path, endpoint: str, most_rows: int, most_line_bytes: int, is_wanted: Callable[[], bool]
) -> tuple[int, list[Json]]:
    """Return the number of rows in a file, and its errors as OpenAI's objects with the numbers of
    their lines.

    Memory does not grow with the file: the ids of rows are compared on the disk.

    Args:
        path: File to read.
        endpoint: Path that all rows must have.
        most_rows: Limit of rows.
        most_line_bytes: Limit of a line.
        is_wanted: Returns whether to go on.
    """
    errors: list[Json] = []
    num_rows = 0
    ids = _Ids()
    for line in read_lines(path, Place(1, 0), most_line_bytes):
        if not is_wanted():
            break
        num_rows += not line.is_blank
        num_blank = line.place.line - num_rows
        try:
            if num_rows > most_rows:
                _refuse("too_many_rows", f"a batch may have {most_rows} rows: divide the file")
            if num_blank > most_rows:
                _refuse("too_many_rows", f"a file may have {most_rows} blank lines: remove them")
            if line.is_blank:
                continue
            ids.add(_custom_id(line, endpoint, most_line_bytes), line.place.line)
        except UserError as error:
            errors.append(_object(error, line.place.line))
            if max(num_rows, num_blank) > most_rows or len(errors) == MOST_ERRORS:
                break
    ids.close()
    if num_rows == 0 and not errors:
        message = "the file is empty: give a line of JSON for each request"
        errors.append(_object(UserError("", message=message, code="empty_file"), None))
    return num_rows, errors


class _Ids:
    """The ids of rows, in a temporary file once they are many."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def add(self, custom_id: str, line: int) -> None:
        """Add the id of a line. Raises UserError if another line has it."""
        query = "INSERT OR IGNORE INTO ids VALUES (?, ?)"
        if self._db.execute(query, [custom_id, line]).rowcount == 0:
            query = "SELECT line FROM ids WHERE id = ?"
            (first,) = self._db.execute(query, [custom_id]).fetchone()
            _refuse(
                "duplicate_custom_id",
                f"custom_id={show(custom_id)} is not allowed: line {first} has it already; give "
                "each row its own",
                "custom_id",
            )

    def close(self) -> None:
        """Remove the temporary file."""
        self._db.close()


def _custom_id(line: Line, endpoint: str, most_line_bytes: int) -> str:
    """Return the id of a row. Raises UserError if the row has not the format of a batch."""
    if not line.is_whole:
        length = line.following.offset - line.place.offset
        _refuse(
            "line_too_long", f"{length} bytes are not allowed: a line may have {most_line_bytes}"
        )
    row = line.value()
    if not isinstance(row, dict):
        _refuse(INVALID_JSON, f"the line must be a JSON object, not {show(row)}")
    for name in FIELDS:
        if row.get(name) is None:
            message = f"field {show(name)} is missing: a row has {', '.join(FIELDS)}"
            _refuse("missing_required_parameter", message, name)
    for name in row:
        if name not in FIELDS:
            message = f"unknown field {show(name)}{nearest(name, FIELDS)}"
            _refuse("unknown_parameter", message, name)
    return _checked(row, endpoint)


def _checked(row: Json, endpoint: str) -> str:
    custom_id: Any = row["custom_id"]
    is_id = isinstance(custom_id, str) and 0 < len(custom_id) <= MOST_ID_CHARACTERS
    allowed = f"a string of 1 to {MOST_ID_CHARACTERS} characters"
    _require(is_id, "invalid_custom_id", "custom_id", custom_id, allowed)
    require_unicode("custom_id", custom_id)
    _require(row["method"] == "POST", "invalid_method", "method", row["method"], '"POST"')
    is_url = row["url"] == endpoint
    _require(is_url, "invalid_url", "url", row["url"], f"{show(endpoint)}, the batch's endpoint")
    is_object = isinstance(row["body"], dict)
    _require(is_object, "invalid_body", "body", row["body"], "a JSON object")
    return str(custom_id)


def _require(holds: bool, code: str, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(name, value, allowed, code=code)


def _refuse(code: str, message: str, name: str = "") -> NoReturn:
    raise UserError(name, message=message, code=code)


def _object(error: UserError, line: int | None) -> Json:
    return {
        "code": error.code or "invalid_request",
        "line": line,
        "message": str(error),
        "param": error.field or None,
    }
