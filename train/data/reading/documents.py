"""Documents in plain text, JSON lines, CSV, Parquet and Python's own sources."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from stu.common.compressed import open_decompressed
from stu.common.errors import UserError
from train.data.reading.skipped import BadInput
from train.data.reading.sources import MOST_PIECE_BYTES, kind_of, read_python

PARQUET_ROWS = 64  # rows in memory at once: documents may be megabytes long
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
MOST_FIELD_CHARS = 1 << 26
"""Longest field of a CSV file. Python's default of 128 Ki is too short for documents; without a
limit, a quote that is never closed would read the whole file into memory."""
FIX = "name it with --text-key"


class Document(NamedTuple):
    """A text, or a piece of a text."""

    text: str
    source_bytes: int  # bytes of the file, compressed or not, that were read for it
    starts: bool = True  # False: continues the document before it
    ends: bool = True  # False: the next document continues it
    place: str = ""  # file, and where in it the text is, for messages


def read_documents(
    files: Sequence[Path], text_key: str = "text", piece_bytes: int = MOST_PIECE_BYTES
) -> Iterator[Document | BadInput]:
    """Yield the documents of `files` in order: text and Python files, and rows of other files.

    A row whose text is null is an empty document. A text file of more than `piece_bytes` comes in
    pieces of at most that size, cut at blank lines, else at line ends, else between characters. A
    row, or the rest of a file, that cannot be read comes as BadInput. Only a few documents are in
    memory at a time.

    text_key: field or column that holds a row's text. Raises UserError if a library is missing.
    """
    for path in files:
        yield from _read_file(path, text_key, piece_bytes)


def _read_file(path: Path, text_key: str, piece_bytes: int) -> Iterator[Document | BadInput]:
    kind = kind_of(path)
    try:
        if path.suffix == ".py":
            yield Document(read_python(path), path.stat().st_size, place=str(path))
        elif kind == "parquet":
            yield from _read_parquet(path, text_key)
        else:
            with path.open("rb") as file:
                source = _Source(path, file)
                if kind == "text":
                    yield from _read_text(source, piece_bytes)
                elif kind == "csv":
                    yield from _read_csv(source, text_key)
                else:
                    yield from _read_json_lines(source, text_key)
    except BadInput as error:  # the rest of the file is lost
        yield error


class _Source:
    """An open file, decompressed while it is read. Methods raise BadInput if it is damaged."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file, self._used = path, file, 0
        try:
            self.data = open_decompressed(file, str(path))
        except UserError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            raise _damaged(path, "", error) from error

    def used(self) -> int:
        """Return the bytes of the file, compressed or not, that were read since the last call."""
        before, self._used = self._used, self._file.tell()
        return self._used - before

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        try:
            return self.data.read(size)
        except UserError as error:
            raise _damaged(self.path, "", error) from error

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield lines and their numbers, from 1."""
        number = 1
        try:
            while line := self.data.readline():
                yield number, line
                number += 1
        except UserError as error:
            raise _damaged(self.path, f"line {number}", error) from error


def _damaged(path: Path, place: str, error: UserError) -> BadInput:
    return BadInput(path, place, "damaged archive", str(error).removeprefix(f"{path}: "))


def _read_text(source: _Source, piece_bytes: int) -> Iterator[Document | BadInput]:
    held, offset, starts = b"", 0, True
    while True:
        held += source.read(piece_bytes + 1 - len(held))
        ends = len(held) <= piece_bytes
        cut = len(held) if ends else _cut(held, piece_bytes)
        piece, held = held[:cut], held[cut:]
        text = _decode(piece, source.path, "", offset)
        if isinstance(text, BadInput):
            yield text
            starts = True
        else:
            if not offset:
                text = text.removeprefix("\ufeff")
            place = f"{source.path} from byte {offset}" if offset else str(source.path)
            yield Document(text, source.used(), starts, ends, place)
            starts = False
        offset += cut
        if ends:
            return


def _cut(data: bytes, size: int) -> int:
    """Return where to end a piece of at most `size` bytes.

    It ends after a blank line in the second half, else after a line, else after a character.
    """
    for ending in (b"\n\n", b"\n\r\n", b"\n"):
        if (found := data.rfind(ending, size // 2 if ending != b"\n" else 0, size)) >= 0:
            return found + len(ending)
    cut = size
    while cut > size - 4 and data[cut] & 0xC0 == 0x80:  # within a character
        cut -= 1
    return cut or size


def _decode(data: bytes, path: Path, place: str, offset: int) -> str | BadInput:
    """Decode `data`, which starts `offset` bytes into the text of `path`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if not offset and data[:2] in UTF16_MARKS else "LATIN1"
        return BadInput(
            path,
            place,
            "not UTF-8",
            f"not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file, for "
            f"example with `iconv -f {encoding} -t UTF-8`, or skip such text with --on-error skip",
        )


def _read_json_lines(source: _Source, text_key: str) -> Iterator[Document | BadInput]:
    offset = 0
    for number, line in source.lines():
        place = f"line {number}"
        text = _decode(line, source.path, place, offset)
        offset += len(line)
        if isinstance(text, str):
            text = _json_text(text, source.path, place, text_key)
        if isinstance(text, str):
            yield Document(text, source.used(), place=f"{source.path} {place}")
        else:
            yield text


def _json_text(line: str, path: Path, place: str, text_key: str) -> str | BadInput:
    if not line.strip():
        return ""
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return BadInput(path, place, "not JSON", f"not JSON ({error})")
    if not isinstance(row, dict) or text_key not in row:
        fields = f"only {', '.join(row)}" if isinstance(row, dict) else "as it is not an object"
        return BadInput(path, place, "no field", f"no field {text_key!r}, {fields}; {FIX}")
    text = row[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        reason = f"field {text_key!r} is {type(text).__name__}, not a string"
        return BadInput(path, place, "not a string", reason)
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = f"field {text_key!r} has half of a surrogate pair"
        return BadInput(path, place, "not a string", reason)
    return text


def _read_csv(source: _Source, text_key: str) -> Iterator[Document | BadInput]:
    csv.field_size_limit(MOST_FIELD_CHARS)
    rows = csv.reader(io.TextIOWrapper(source.data, encoding="utf-8-sig", newline=""))
    column = None
    while True:
        place = f"line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except UserError as error:
            raise _damaged(source.path, place, error) from error
        except csv.Error as error:
            raise BadInput(source.path, place, "not CSV", f"not CSV ({error})") from error
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 from here on ({error}); convert the file"
            raise BadInput(source.path, place, "not UTF-8", reason) from error
        if row is None:
            return
        if column is None:
            if row.count(text_key) != 1:
                found = f"{row.count(text_key)} fields {text_key!r} in the header"
                reason = f"{found}, which has {', '.join(row)}; exactly one is needed: {FIX}"
                raise BadInput(source.path, "line 1", "no field", reason)
            column = row.index(text_key)
        elif len(row) > column:
            yield Document(row[column], source.used(), place=f"{source.path} {place}")
        elif row:  # else a blank line
            reason = f"{len(row)} fields, but {text_key!r} is number {column + 1}"
            yield BadInput(source.path, place, "no field", reason)


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        message = f"{path}: reading Parquet needs pyarrow: pip install 'stu[data]'"
        raise UserError(str(path), message=message) from error
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if names.count(text_key) != 1:
                count = "several columns" if text_key in names else "no column"
                reason = f"{count} {text_key!r}, only {', '.join(names)}; {FIX}"
                raise BadInput(path, "", "no field", reason)
            kind = file.schema_arrow.field(text_key).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                reason = f"column {text_key!r} is {kind}, not a string"
                raise BadInput(path, "", "not a string", reason)
            size, num_rows, done = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    share = size * (done + 1) // num_rows - size * done // num_rows
                    done += 1
                    yield Document(text or "", share, place=f"{path} row {done}")
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault
            raise
        raise BadInput(path, "", "not Parquet", f"damaged, or not Parquet ({error})") from error
    except UnicodeDecodeError as error:
        raise BadInput(path, "", "not UTF-8", f"not UTF-8 ({error})") from error
