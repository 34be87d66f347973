"""Where rows come from: JSON lines, compressed or not, or Parquet; one file or a folder of them;
never all rows in memory."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.batch.checked_file import Changed, FileDigest
from stu.common.compressed import open_decompressed
from stu.common.errors import show

PARQUET_MAGIC = b"PAR1"


class Source(Protocol):
    """Rows in order, each with its number, from 0: its fields, or why it cannot be read.

    Iteration raises ValueError where the input is damaged, or is not what it was when its digest
    was made; all rows before were given then.
    """

    fraction_read: float
    """Of the last iteration, 0 to 1."""
    num_read: int
    """Numbers given out by the last iteration, with those of blank lines."""

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
        """From the beginning."""

    def place(self, number: int) -> str:
        """How an error calls row `number`."""


@dataclass(frozen=True)
class InputDigest:
    """The hashes of an input's files, by their names within it: "" for an input of one file."""

    files: Mapping[str, FileDigest]

    @classmethod
    def of(cls, path: Path) -> "InputDigest":
        """Read an input. Raises ValueError if it is none, or is written meanwhile."""
        return cls({name: FileDigest.of(path / name) for name in _names(path)})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "InputDigest":
        """From `to_json`."""
        return cls({name: FileDigest.from_json(file) for name, file in values.items()})

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: file.to_json() for name, file in self.files.items()}

    def check(self, path: Path) -> None:
        """Raises Changed unless `path` is still what was read."""
        if _names(path, self.files) != list(self.files):
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
    """The rows of an input of which `digest` was made. Columns are for Parquet alone.

    Raises ValueError if it cannot be read, or has not these columns.
    """
    sources = [
        _open_file(path / name, file, column, id_column) for name, file in digest.files.items()
    ]
    return sources[0] if list(digest.files) == [""] else Folder(list(digest.files), sources)


class JsonLines:
    """One JSON object a line, in UTF-8; blank lines are no rows, but counted."""

    def __init__(self, path: Path, digest: FileDigest) -> None:
        self.fraction_read, self.num_read = 0.0, 0
        self._path, self._digest = path, digest

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
        num_bytes = self.num_read = 0
        with self._digest.open(self._path) as file:
            lines = open_decompressed(file, f"input {self._path}")
            for number, line in enumerate(lines):
                num_bytes = num_bytes + len(line) if lines is file else file.tell()
                self.fraction_read, self.num_read = num_bytes / self._digest.num_bytes, number + 1
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.isspace() and line:
                    yield number, _parse(line)
        self.fraction_read = 1.0

    def place(self, number: int) -> str:
        """Lines count from 1, as editors do."""
        return f"line {number + 1}"


class Folder:
    """The rows of several files, one after the other, numbered throughout."""

    def __init__(self, names: list[str], sources: list[Source]) -> None:
        self.fraction_read, self.num_read = 0.0, 0
        self._names, self._sources = names, sources
        self._starts: list[int] = []
        """Numbers of the first rows of the files that were read."""

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
        self._starts = []
        start = 0
        for index, source in enumerate(self._sources):
            self._starts.append(start)
            for number, given in source:
                self.fraction_read = (index + source.fraction_read) / len(self._sources)
                self.num_read = start + source.num_read
                yield start + number, given
            start += source.num_read
        self.fraction_read, self.num_read = 1.0, start

    def place(self, number: int) -> str:
        """With the name of the file."""
        index = max(i for i, start in enumerate(self._starts) if start <= number)
        return f"{self._names[index]} {self._sources[index].place(number - self._starts[index])}"


def _names(path: Path, known: Mapping[str, Any] | None = None) -> list[str]:
    """The files of an input, in order: "" for an input of one file.

    known: what was there before, for an input that may have vanished.
    """
    if not path.is_dir():
        if not path.is_file() and known is None:
            raise ValueError(f"input {path}: no such file")
        return [""]
    names = [its.relative_to(path) for its in path.rglob("*") if its.is_file()]
    # As Spark and Arrow do: what begins with _ or . is no data.
    names = [its for its in names if not any(part[0] in "_." for part in its.parts)]
    if not names and known is None:
        raise ValueError(f"input {path}: a folder without files; give a file, or a folder of some")
    return sorted(its.as_posix() for its in names)


def _open_file(path: Path, digest: FileDigest, column: str | None, id_column: str | None) -> Source:
    with digest.open(path) as file:
        is_parquet = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
        file.seek(0)
        lines = open_decompressed(file, f"input {path}")
        if lines is not file and lines.peek(4).startswith(PARQUET_MAGIC):  # type: ignore[attr-defined]
            raise ValueError(f"input {path}: Parquet inside a compressed file: decompress it first")
    if is_parquet:
        from serve.batch.parquet import ParquetRows

        return ParquetRows(path, digest, column or "prompt", id_column)
    if path.suffix == ".parquet":
        raise ValueError(f"input {path}: not a Parquet file: write or copy it again, or rename it")
    for name, value in {"column": column, "id_column": id_column}.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for Parquet, and input {path} is not: leave it out, rows of "
                'JSON have the fields "prompt" and "id"'
            )
    return JsonLines(path, digest)


def _parse(line: bytes) -> Mapping[str, Any] | ValueError:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return ValueError("not UTF-8; convert the file")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error.msg}, column {error.colno}): write one object a line")
    except (ValueError, RecursionError) as error:  # numbers too long, nesting too deep
        return ValueError(f"not JSON that can be read ({error})")
    if not isinstance(row, dict):
        return ValueError(f'{show(row)} is not a JSON object: write {{"prompt": "..."}}')
    return row
