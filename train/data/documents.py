"""Documents out of files: plain text, JSON lines, CSV, Parquet, Python's own sources."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stu.common.compressed import open_decompressed
from train.data.sources import MOST_PIECE_BYTES, kind_of, read_python

PARQUET_ROWS = 64  # rows in memory at once: documents may be megabytes long
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
MOST_FIELD_CHARS = 1 << 26
"""Longest field of a CSV file: more than the usual 128 Ki, less than a file whose quote is never
closed."""
FIX = "name it with --text-key"


class Document(NamedTuple):
    """One text, and how much of its file it used up."""

    text: str
    source_bytes: int  # sums to the sizes of the files, compressed if they are: for progress
    starts: bool = True  # False: goes on where the one before ended
    ends: bool = True  # False: the next one goes on


class BadInput(ValueError):
    """A row, or the rest of a file, that cannot be read."""

    def __init__(self, path: Path, place: str, kind: str, reason: str) -> None:
        super().__init__(f"{path}{place and ' '}{place}: {reason}")
        self.path, self.place, self.kind, self.reason = path, place, kind, reason


def read_documents(
    files: Sequence[Path],
    text_key: str = "text",
    piece_bytes: int = MOST_PIECE_BYTES,
    on_bad: Callable[[BadInput], None] | None = None,
) -> Iterator[Document]:
    """Every document of `files` in order: a text or .py file, a row of the other kinds.

    `text_key` names the field or column that holds a row's text; a row where it is null is an empty
    document. A text file of more than `piece_bytes` comes in pieces of at most so many: they end at
    blank lines, or else at line ends, or else between characters. Memory holds a few documents.

    on_bad: takes what is not readable text, and reading goes on behind it; without it the first
    raises BadInput. Raises ValueError if a library is missing.
    """
    for path in files:
        items = _read_file(path, text_key, piece_bytes)
        while True:
            try:
                item = next(items, None)
            except BadInput as error:  # the rest of the file is lost
                if on_bad is None:
                    raise
                on_bad(error)
                break
            if item is None:
                break
            if isinstance(item, Document):
                yield item
            elif on_bad is None:
                raise item
            else:
                on_bad(item)


def _read_file(path: Path, text_key: str, piece_bytes: int) -> Iterator[Document | BadInput]:
    kind = kind_of(path)
    if path.suffix == ".py":
        yield Document(read_python(path), path.stat().st_size)
    elif kind == "parquet":
        yield from _read_parquet(path, text_key)
    else:
        with path.open("rb") as raw:
            try:
                data = open_decompressed(raw, str(path))
            except ValueError as error:
                if isinstance(error.__cause__, ImportError):
                    raise
                raise BadInput(path, "", "damaged archive", _without_name(error, path)) from error
            source = _Source(path, raw, data)
            if kind == "text":
                yield from _read_text(source, piece_bytes)
            elif kind == "csv":
                yield from _read_csv(source, text_key)
            else:
                yield from _read_json_lines(source, text_key)


class _Source:
    """A file that is being read, perhaps compressed."""

    def __init__(self, path: Path, raw: BinaryIO, data: BinaryIO) -> None:
        self.path, self.data = path, data
        self._raw, self._used = raw, 0

    def used(self, offset: int | None = None) -> int:
        """Bytes of the file since the last call, of which `offset` are used up if it is plain."""
        now = self._raw.tell() if offset is None or self.data is not self._raw else offset
        used, self._used = now - self._used, now
        return used

    def read(self, size: int) -> bytes:
        with _Damage(self.path, ""):
            return self.data.read(size)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines and their numbers, from 1."""
        number = 0
        while True:
            number += 1
            with _Damage(self.path, f"line {number}"):
                line = self.data.readline()
            if not line:
                return
            yield number, line


class _Damage:
    """Turns the error of a decompressor into one of this module."""

    def __init__(self, path: Path, place: str) -> None:
        self._path, self._place = path, place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            reason = _without_name(error, self._path)
            raise BadInput(self._path, self._place, "damaged archive", reason) from error


def _without_name(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


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
            yield Document(text, source.used(offset + cut), starts, ends)
            starts = False
        offset += cut
        if ends:
            return


def _cut(data: bytes, size: int) -> int:
    """Where to end a piece of at most `size` bytes: behind a blank line of the second half, or else
    the last line, or else the last whole character."""
    for ending in (b"\n\n", b"\n\r\n", b"\n"):
        if (found := data.rfind(ending, size // 2 if ending != b"\n" else 0, size)) >= 0:
            return found + len(ending)
    cut = size
    while cut > size - 4 and data[cut] & 0xC0 == 0x80:  # within a character
        cut -= 1
    return cut or size


def _decode(data: bytes, path: Path, place: str, offset: int) -> str | BadInput:
    """`data`, which starts `offset` bytes into the text of `path`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if not offset and data[:2] in UTF16_MARKS else "LATIN1"
        return BadInput(
            path,
            place,
            "not UTF-8",
            f"not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file, "
            f"for example with `iconv -f {encoding} -t UTF-8`, or leave such out with --on-error "
            "skip",
        )


def _read_json_lines(source: _Source, text_key: str) -> Iterator[Document | BadInput]:
    offset = 0
    for number, line in source.lines():
        place = f"line {number}"
        text = _decode(line, source.path, place, offset)
        offset += len(line)
        if isinstance(text, str):
            text = _json_text(text, source.path, place, text_key)
        if isinstance(text, BadInput):
            yield text
        else:
            yield Document(text, source.used(offset))


def _json_text(line: str, path: Path, place: str, text_key: str) -> str | BadInput:
    if not line.strip():
        return ""
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return BadInput(path, place, "not JSON", f"not JSON ({error})")
    if not isinstance(row, dict) or text_key not in row:
        fields = f"only {', '.join(row)}" if isinstance(row, dict) else "and no fields at all"
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
            with _Damage(source.path, place):
                row = next(rows, None)
        except (csv.Error, UnicodeDecodeError) as error:
            is_text = isinstance(error, csv.Error)
            kind, reason = ("not CSV", f"not CSV ({error})") if is_text else ("not UTF-8", "")
            reason = reason or f"not UTF-8 in what follows ({error}); convert the file"
            raise BadInput(source.path, place, kind, reason) from error
        if row is None:
            return
        if column is None:
            if row.count(text_key) != 1:
                found = f"{row.count(text_key)} fields {text_key!r} in the header, of "
                reason = f"{found}{', '.join(row)}; one is needed: {FIX}"
                raise BadInput(source.path, "line 1", "no field", reason)
            column = row.index(text_key)
        elif len(row) > column:
            yield Document(row[column], source.used())
        elif row:  # else a blank line
            reason = f"{len(row)} fields, and {text_key!r} is number {column + 1}"
            yield BadInput(source.path, place, "no field", reason)


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow: pip install 'stu[data]'"
        ) from error
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
            size, rows, done = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    yield Document(text or "", size * (done + 1) // rows - size * done // rows)
                    done += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a disk's, not the file's
            raise
        raise BadInput(path, "", "not Parquet", f"damaged, or not Parquet ({error})") from error
    except UnicodeDecodeError as error:
        raise BadInput(path, "", "not UTF-8", f"not UTF-8 ({error})") from error
