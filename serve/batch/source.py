"""Rows of an input: JSON lines or Parquet, one file or a folder, read one by one."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.batch.checked_file import Changed, FileDigest
from stu.common.compressed import open_decompressed
from stu.common.errors import UserError, show

PARQUET_MAGIC = b"PAR1"
NumberedRow = tuple[int, Mapping[str, Any] | UserError]
"""Number of a row from 0, and its fields, or why they cannot be read."""


class Source(Protocol):
    """Rows in order.

    Iteration yields `NumberedRow`. It raises UserError where the input is damaged or differs from
    its digest, after it has yielded all rows before.
    """

    fraction_read: float
    """Part of the input that the last iteration has read, 0 to 1."""
    num_read: int
    """Row numbers that the last iteration has used, including blank lines."""

    def __iter__(self) -> Iterator[NumberedRow]:
        """Read from the beginning."""

    def place(self, number: int) -> str:
        """Return the name of row `number` in error messages."""


@dataclass(frozen=True)
class InputDigest:
    """Digests of the files of an input, by their names within it; "" if it is a single file."""

    files: Mapping[str, FileDigest]

    @classmethod
    def of(cls, path: Path) -> "InputDigest":
        """Read and hash an input. Raises UserError if there is none or it is being written."""
        return cls({name: FileDigest.of(path / name) for name in _names(path)})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "InputDigest":
        """Return the digest that `to_json` wrote."""
        return cls({name: FileDigest.from_json(file) for name, file in values.items()})

    def to_json(self) -> dict[str, Any]:
        """Return the digest as JSON values."""
        return {name: file.to_json() for name, file in self.files.items()}

    def check(self, path: Path) -> None:
        """Raise Changed unless `path` still has the same content."""
        if _names(path, may_be_missing=True) != list(self.files):
            raise Changed(path)
        for name, file in self.files.items():
            file.check(path / name)

    def __str__(self) -> str:
        if list(self.files) == [""]:
            return f"{self.files[''].num_bytes} bytes, sha256 {self.files[''].sha256}"
        listing = json.dumps({name: file.sha256 for name, file in self.files.items()})
        num_bytes = sum(file.num_bytes for file in self.files.values())
        sha256 = hashlib.sha256(listing.encode()).hexdigest()
        return f"{len(self.files)} files, {num_bytes} bytes, sha256 {sha256}"


def open_input(
    path: Path, digest: InputDigest, column: str | None, id_column: str | None
) -> Source:
    """Return the rows of an input whose digest is `digest`; columns are for Parquet only.

    Raises UserError if the input cannot be read or has no such columns.
    """
    sources = [
        open_file(path / name, file, column, id_column) for name, file in digest.files.items()
    ]
    return sources[0] if list(digest.files) == [""] else Folder(list(digest.files), sources)


class JsonLines:
    """A JSON object on each line, in UTF-8. Blank lines are numbered but skipped."""

    def __init__(self, path: Path, digest: FileDigest) -> None:
        self.fraction_read, self.num_read = 0.0, 0
        self._path, self._digest = path, digest

    def __iter__(self) -> Iterator[NumberedRow]:
        num_bytes = self.num_read = 0
        with self._digest.open(self._path) as file:
            lines = open_decompressed(file, f"input {self._path}")
            for number, line in enumerate(lines):
                num_bytes = num_bytes + len(line) if lines is file else file.tell()
                self.fraction_read, self.num_read = num_bytes / self._digest.num_bytes, number + 1
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _parse(line)
        self.fraction_read = 1.0

    def place(self, number: int) -> str:
        """Return the line's number from 1, as editors count."""
        return f"line {number + 1}"


class Folder:
    """Rows of several files in turn, numbered throughout."""

    def __init__(self, names: list[str], sources: list[Source]) -> None:
        self.fraction_read, self.num_read = 0.0, 0
        self._names, self._sources = names, sources
        self._starts: list[int] = []
        """Number of the first row of each file read so far."""

    def __iter__(self) -> Iterator[NumberedRow]:
        self._starts = []
        start = 0
        for index, source in enumerate(self._sources):
            self._starts.append(start)
            for number, fields in source:
                self.fraction_read = (index + source.fraction_read) / len(self._sources)
                self.num_read = start + source.num_read
                yield start + number, fields
            start += source.num_read
        self.fraction_read, self.num_read = 1.0, start

    def place(self, number: int) -> str:
        """Return the name of the file and the row's place in it."""
        index = max(i for i, start in enumerate(self._starts) if start <= number)
        return f"{self._names[index]} {self._sources[index].place(number - self._starts[index])}"


def _names(path: Path, may_be_missing: bool = False) -> list[str]:
    """Return the names of an input's files in order; "" if it is a single file."""
    if not path.is_dir():
        if not path.is_file() and not may_be_missing:
            raise UserError("input", message=f"input {path}: no such file")
        return [""]
    names = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    # Spark and Arrow skip these names too: they are not data.
    names = [name for name in names if not any(part[0] in "_." for part in name.parts)]
    if not names and not may_be_missing:
        raise UserError("input", message=f"input {path}: the folder has no files to read")
    return sorted(name.as_posix() for name in names)


def open_file(path: Path, digest: FileDigest, column: str | None, id_column: str | None) -> Source:
    """Return the rows of one file of an input, as `open_input` does."""
    with digest.open(path) as file:
        is_parquet = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
        file.seek(0)
        lines = open_decompressed(file, f"input {path}")
        if lines is not file and lines.peek(4).startswith(PARQUET_MAGIC):  # type: ignore[attr-defined]
            raise UserError(
                "input", message=f"input {path}: Parquet inside a compressed file; decompress it"
            )
    if is_parquet:
        from serve.batch.parquet import ParquetRows

        return ParquetRows(path, digest, column or "prompt", id_column)
    if path.suffix == ".parquet":
        raise UserError(
            "input", message=f"input {path}: is not a Parquet file; copy it again, or rename it"
        )
    for option, value in {"column": column, "id_column": id_column}.items():
        if value is not None:
            raise UserError(
                option,
                value,
                fix=f"it is for Parquet, and {path} has rows of JSON, whose fields are "
                '"prompt" and "id"; leave it out',
            )
    return JsonLines(path, digest)


def _parse(line: bytes) -> Mapping[str, Any] | UserError:
    problem = ""
    try:
        row = json.loads(line.decode())
        if isinstance(row, dict):
            return row
        problem = f'{show(row)} is not a JSON object; write {{"prompt": "..."}}'
    except UnicodeDecodeError:
        problem = "is not UTF-8; convert the file"
    except json.JSONDecodeError as error:
        problem = f"is not JSON ({error.msg}, column {error.colno}); write an object on each line"
    except (ValueError, RecursionError) as error:  # too long a number, too deep nesting
        problem = f"is not JSON that can be read ({error})"
    return UserError("input", message=problem)
