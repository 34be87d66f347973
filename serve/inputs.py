"""Where rows come from: JSON lines, or Parquet; never all of them in memory."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from serve.prompts import show

PARQUET_MAGIC = b"PAR1"
PARQUET_ROWS = 256  # in memory at once: prompts may be long


class Source(Protocol):
    """Rows in order, each with its number, from 0: its fields, or why it cannot be read."""

    fraction_read: float
    """Of the last iteration, 0 to 1."""

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
        """From the beginning."""

    def place(self, number: int) -> str:
        """How an error calls row `number`."""


def open_input(path: Path, column: str | None, id_column: str | None) -> Source:
    """The rows of a Parquet file, or of a file of JSON lines. Columns are for Parquet alone.

    Raises ValueError if `path` is not a file, or has not these columns.
    """
    if not path.is_file():
        raise ValueError(f"input {path}: no such file")
    with path.open("rb") as file:
        is_parquet = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    if is_parquet:
        return ParquetRows(path, column or "prompt", id_column)
    for name, value in {"column": column, "id_column": id_column}.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for Parquet, and input {path} is not: leave it out, rows of "
                'JSON have the fields "prompt" and "id"'
            )
    return JsonLines(path)


class JsonLines:
    """One JSON object a line, in UTF-8; blank lines are no rows, but counted."""

    def __init__(self, path: Path) -> None:
        self.fraction_read = 0.0
        self._path = path

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
        num_read = 0
        with self._path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            for number, line in enumerate(file):
                num_read += len(line)
                self.fraction_read = num_read / num_bytes
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.isspace() and line:
                    yield number, _parse(line)
        self.fraction_read = 1.0

    def place(self, number: int) -> str:
        """Lines count from 1, as editors do."""
        return f"line {number + 1}"


class ParquetRows:
    """A column of prompts, and one of ids if it is named."""

    def __init__(self, path: Path, column: str, id_column: str | None) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ValueError(
                f"input {path}: reading Parquet needs pyarrow: pip install 'stu[data]'"
            ) from error
        self.fraction_read = 0.0
        self._path, self._open, self._arrow_error = path, pq.ParquetFile, pa.ArrowException
        self._fields = {"prompt": column}
        if id_column is not None:
            self._fields["id"] = id_column
        try:
            with pq.ParquetFile(path) as file:
                names = file.schema_arrow.names
        except pa.ArrowException as error:
            raise ValueError(f"input {path}: {error}") from error
        for option, name in zip(("--column", "--id-column"), self._fields.values(), strict=False):
            if name not in names:
                raise ValueError(
                    f"input {path}: no column {name!r}, only {', '.join(names)}; name it with "
                    f"{option}"
                )

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
        number = 0
        try:
            with self._open(self._path) as file:
                num_rows = file.metadata.num_rows
                columns = list(self._fields.values())
                for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                    values = {
                        field: batch.column(name).to_pylist()
                        for field, name in self._fields.items()
                    }
                    for row in zip(*values.values(), strict=True):
                        self.fraction_read = (number + 1) / num_rows
                        yield number, dict(zip(values, row, strict=True))
                        number += 1
        except self._arrow_error as error:
            raise ValueError(f"input {self._path}: {error}") from error
        self.fraction_read = 1.0

    def place(self, number: int) -> str:
        """Rows count from 0, as every reader of Parquet does."""
        return f"row {number}"


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
