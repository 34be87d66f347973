"""Rows of a batch: lines of its input file, and of the files with their results."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from serve.server.batches.progress import Place, Result, Tokens
from stu.common.errors import UserError
from stu.common.text import Json, escaped_line_ends, json_line

CHUNK_BYTES = 2**18
"""Size at which a chunk of lines ends."""
SKIP_BYTES = 2**16
MOST_LEVELS = 200
"""Limit of objects and lists in one another in a row, far below what Python's parser takes on any
stack."""
INVALID_JSON = "invalid_json_line"
"""OpenAI's code of the error of a line that is no row."""


@dataclass(frozen=True)
class Line:
    """A line of an input file."""

    place: Place
    content: bytes
    """Content with the line's end, cut off beyond the limit of a line."""
    following: Place
    """Beginning of the next line."""

    @property
    def is_whole(self) -> bool:
        """Whether `content` is not cut off."""
        return self.following.offset == self.place.offset + len(self.content)

    @property
    def is_blank(self) -> bool:
        """Whether the line is no row."""
        return self.is_whole and not self.content.strip()

    def value(self) -> Any:
        """Return the JSON value of the line. Raises UserError."""
        is_first = self.place.offset == 0
        try:
            found = json.loads(self.content.removeprefix(codecs.BOM_UTF8 if is_first else b""))
        except (ValueError, RecursionError) as error:
            message = f"the line is not JSON in UTF-8: {error}"
            raise UserError("", message=message, code=INVALID_JSON) from error
        if self.content.count(b"[") + self.content.count(b"{") > MOST_LEVELS:
            _require_flat(found)
        return found

    def row(self) -> Json:
        """Return the row of the line, which was valid when its batch began. Raises UserError if
        the file has changed since, or was checked by a version that allowed more."""
        if isinstance(self.parsed, UserError):
            raise self.parsed
        return self.parsed

    @cached_property
    def parsed(self) -> Json | UserError:
        """The row, or the error of `row`."""
        try:
            return self._row()
        except UserError as error:
            return error

    def _row(self) -> Json:
        found = self.value()
        is_row = isinstance(found, dict) and isinstance(found.get("custom_id"), str)
        if not is_row or not isinstance(found.get("body"), dict):
            message = "the line has no custom_id and body: its file has changed"
            raise UserError("", message=message, code=INVALID_JSON)
        return dict(found)


def read_lines(path: Path, place: Place, most_bytes: int) -> Iterator[Line]:
    """Yield the lines from a place on, blank ones too. A line may have `most_bytes`."""
    with path.open("rb") as file:
        file.seek(place.offset)
        while content := file.readline(most_bytes):
            offset = place.offset + len(content)
            part = content
            while not part.endswith(b"\n") and (part := file.readline(SKIP_BYTES)):
                offset += len(part)
            line = Line(place, content, Place(place.line + 1, offset))
            yield line
            place = line.following


def read_chunk(path: Path, place: Place, most_bytes: int) -> list[Line]:
    """Return the next lines that are not blank, about `CHUNK_BYTES` of them; none at the end."""
    end = place.offset + CHUNK_BYTES
    chunk = []
    for line in read_lines(path, place, most_bytes):
        if not line.is_blank:
            chunk.append(line)
        if chunk and line.following.offset >= end:
            break
    return chunk


def answered(custom_id: str, request_id: str, status: int, body: bytes, line: int) -> Result:
    """Return the result of a row that was answered with an HTTP status and a body in JSON."""
    text = escaped_line_ends(body.decode())
    head = json_line({"id": f"batch_req_{request_id}", "custom_id": custom_id})[:-1]
    named = json_line({"status_code": status, "request_id": request_id})[:-1]
    written = f'{head}, "response": {named}, "body": {text}}}, "error": null}}\n'
    tokens = Tokens() if status >= 400 else _tokens(json.loads(text).get("usage") or {})
    return Result(line, written.encode(), status >= 400, tokens)


def unanswered(custom_id: str, request_id: str, code: str, message: str, line: int) -> Result:
    """Return the result of a row that was not decoded."""
    values = {
        "id": f"batch_req_{request_id}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return Result(line, f"{json_line(values)}\n".encode(), is_error=True)


def _require_flat(value: Any) -> None:
    """Raise UserError if a JSON value has more than `MOST_LEVELS` levels."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MOST_LEVELS):
        inner = [found.values() if isinstance(found, dict) else found for found in level]
        level = [found for values in inner for found in values if isinstance(found, (dict, list))]
        if not level:
            return
    message = f"objects and lists may be nested in {MOST_LEVELS} levels at most"
    raise UserError("", message=message, code=INVALID_JSON)


def _tokens(usage: Any) -> Tokens:
    """Return the numbers of tokens in the usage of a completion, an embedding or a response."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return Tokens(
        usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        details.get("cached_tokens", 0),
        usage.get("completion_tokens", usage.get("output_tokens", 0)),
    )
