"""Documents in rows of text: JSON lines and CSV."""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from stu.common.errors import UserError
from train.data.reading.document import FIX, BadInput, Document
from train.data.reading.opened import OpenedFile, damaged, decode
from train.data.reading.remote import InputFile

MOST_FIELD_CHARS = 1 << 26
"""Longest field of a CSV file. Python's default of 128 Ki is too short for documents; without a
limit, a quote that is never closed would read the whole file into memory."""


def read_json_lines(source: OpenedFile, text_key: str) -> Iterator[Document | BadInput]:
    """Yield the rows of JSON lines. Raises BadInput where the rest cannot be read."""
    offset = 0
    for number, line in source.lines():
        place = f"line {number}"
        text = decode(line, source.path, place, offset)
        offset += len(line)
        if isinstance(text, str):
            text = _json_text(text, source.path, place, text_key)
        if isinstance(text, str):
            yield Document(text, source.used(), source.path, place)
        else:
            yield text


def _json_text(line: str, path: InputFile, place: str, text_key: str) -> str | BadInput:
    if not line.strip():
        return ""
    if not text_key:
        return line.removeprefix("\ufeff").strip()
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return BadInput(path, place, "not JSON", f"not JSON ({error})")
    is_plain = isinstance(row, dict) and text_key in row
    text = _find(row, [text_key] if is_plain else text_key.split("."))
    if isinstance(text, _Missing):
        return BadInput(path, place, "no field", f"{text.reason}; {FIX}")
    if text is None:
        return ""
    if not isinstance(text, str):
        reason = f"field {text_key!r} is {type(text).__name__}, not a string"
        return BadInput(path, place, "not a string", reason)
    if not _is_unicode(text):
        reason = f"field {text_key!r} has half of a surrogate pair"
        return BadInput(path, place, "not a string", reason)
    return text


class _Missing(NamedTuple):
    reason: str


def _find(row: Any, keys: list[str]) -> Any:
    """Return what is in `row` under the keys, each an object in the one before, or why nothing is;
    null if one of them is null."""
    for place, key in enumerate(keys):
        if row is None and place:
            return None
        if not isinstance(row, dict) or key not in row:
            inside = f" in {'.'.join(keys[:place])!r}" if place else ""
            fields = f"only {', '.join(row)}" if isinstance(row, dict) else "as it is not an object"
            return _Missing(f"no field {key!r}{inside}, {fields}")
        row = row[key]
    return row


def read_csv(source: OpenedFile, text_key: str) -> Iterator[Document | BadInput]:
    """Yield the rows of a CSV file after its header. Raises BadInput where the rest is lost."""
    csv.field_size_limit(MOST_FIELD_CHARS)
    # Bytes that are not UTF-8 become surrogates, so that each is a fault of its own row.
    text = io.TextIOWrapper(source.data, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, strict=True)
    column, num_columns = None, 0
    while True:
        place = f"line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except UserError as error:
            raise damaged(source.path, place, error) from error
        except csv.Error as error:
            bad = BadInput(source.path, place, "not CSV", f"not CSV ({error})")
            # A quote that is never closed takes the rest of the file.
            if column is None or re.search("unexpected end|larger than", str(error)):
                raise bad from error
            yield bad
            continue
        if row is None:
            return
        if column is None:
            if not _is_unicode("".join(row)):
                reason = "not UTF-8; convert the file, for example with iconv"
                raise BadInput(source.path, place, "not UTF-8", reason)
            if row.count(text_key) != 1:
                found = f"{row.count(text_key)} fields {text_key!r} in the header"
                reason = f"{found}, which has {', '.join(row)}; exactly one is needed: {FIX}"
                raise BadInput(source.path, "line 1", "no field", reason)
            column, num_columns = row.index(text_key), len(row)
        elif any(row[num_columns:]):
            reason = (
                f"{len(row)} fields, and the header has {num_columns}: put texts with commas into "
                "quotes, or skip such rows with --on-error skip"
            )
            yield BadInput(source.path, place, "too many fields", reason)
        elif len(row) > column:
            if _is_unicode(row[column]):
                yield Document(row[column], source.used(), source.path, place)
            else:
                reason = "not UTF-8; convert the file, or skip such rows with --on-error skip"
                yield BadInput(source.path, place, "not UTF-8", reason)
        elif row:  # else a blank line
            reason = f"{len(row)} fields, but {text_key!r} is number {column + 1}"
            yield BadInput(source.path, place, "no field", reason)


def _is_unicode(text: str) -> bool:
    """Return whether a text has no surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
