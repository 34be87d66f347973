"""Forms with a file, which goes to the disk as it comes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from stu.common.errors import UserError

BLOCK_BYTES = 2**20
"""Size of the blocks in which a file is written."""
MOST_HEADER_BYTES, MOST_VALUE_BYTES = 2**13, 2**10
"""Limits of a header of a field, and of its value."""
MOST_NAME_CHARACTERS = 255
FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")


class Form:
    """A form of multipart/form-data.

    Args:
        content_type: Header of the request.
        file: Takes the content of the field `file`.
        reserve: Called with the size of the file so far before more of it is written.

    Raises UserError, here and in `read`, for what is no such form.
    """

    def __init__(
        self, content_type: str, file: BinaryIO, reserve: Callable[[int], Awaitable[None]]
    ) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            fix = "send a form with the fields file and purpose, as multipart/form-data"
            raise UserError("content-type", content_type, fix=fix)
        self.values: dict[str, str] = {}
        """Values of the other fields."""
        self.filename: str | None = None
        """Name of the file; None if there is none."""
        self.num_bytes = 0
        """Size of the file."""
        self._file, self._reserve, self._block = file, reserve, bytearray()
        self._header, self._header_value, self._disposition = bytearray(), bytearray(), b""
        self._field, self._value = "", bytearray()
        self._is_whole = False
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_header,
                    "on_header_value": self._add_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._add_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _no_form(str(error)) from error

    async def read(self, body: AsyncIterator[bytes]) -> None:
        """Read the body of the request."""
        try:
            async for part in body:
                self._parser.write(part)
                if len(self._block) >= BLOCK_BYTES:
                    await self._write()
            self._parser.finalize()
        except FormParserError as error:
            raise _no_form(str(error)) from error
        if not self._is_whole:
            raise _no_form("it ends too early")
        await self._write()

    async def _write(self) -> None:
        await self._reserve(self.num_bytes)
        block, self._block = self._block, bytearray()
        await asyncio.to_thread(self._file.write, block)

    def _begin_part(self) -> None:
        self._disposition, self._value = b"", bytearray()

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._require_short_headers()

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._require_short_headers()

    def _require_short_headers(self) -> None:
        if len(self._header) + len(self._header_value) > MOST_HEADER_BYTES:
            raise _no_form(f"a header has more than {MOST_HEADER_BYTES} bytes")

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header, self._header_value = bytearray(), bytearray()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = _text("name", options.get(b"name", b""))
        if name not in FIELDS:
            allowed = f"one of {', '.join(FIELDS)}"
            raise UserError(name or "name", message=f"the form has a field {name!r}: {allowed}")
        if name in self.values or (name == "file" and self.filename is not None):
            raise UserError(name, fix="the form has it twice: give one")
        if name == "file":
            filename = _text("file", options.get(b"filename", b"file"))
            self.filename = filename[-MOST_NAME_CHARACTERS:]
        self._field = name

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == "file":
            self._block += data[start:end]
            self.num_bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > MOST_VALUE_BYTES:
            raise UserError(self._field, allowed=f"a text of at most {MOST_VALUE_BYTES} bytes")

    def _end_part(self) -> None:
        if self._field != "file":
            self.values[self._field] = _text(self._field, bytes(self._value))

    def _end(self) -> None:
        self._is_whole = True


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(name, allowed="a text in UTF-8") from error


def _no_form(reason: str) -> UserError:
    return UserError("body", message=f"the body is no form of multipart/form-data: {reason}")
