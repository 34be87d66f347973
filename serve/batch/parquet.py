"""Rows of a Parquet file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serve.batch.checked_file import FileDigest
from stu.common.errors import UserError, how_to_install

BATCH_ROWS = 256
"""Rows in memory at a time: prompts may be long."""


class ParquetRows:
    """A column of prompts, and a column of ids if one is named.

    column, id_column: names of the columns in the file; a field of a struct is named
    `struct.field`.
    """

    def __init__(self, path: Path, digest: FileDigest, column: str, id_column: str | None) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            message = f"input {path}: reading Parquet needs pyarrow: {how_to_install('data')}"
            raise UserError("input", message=message) from error
        self.fraction_read, self.num_read = 0.0, 0
        self._path, self._digest, self._open = path, digest, pq.ParquetFile
        self._errors = (pa.ArrowException, OSError)
        """Errors that pyarrow raises for a damaged file."""
        self._fields = {"prompt": column}
        if id_column is not None:
            self._fields["id"] = id_column
        try:
            with digest.open(path) as file, pq.ParquetFile(file) as parquet:
                schema = parquet.schema_arrow
        except self._errors as error:
            raise UserError("input", message=f"input {path}: {error}") from error
        for option, name in zip(("column", "id-column"), self._fields.values(), strict=False):
            _require_column(path, schema, option, name)

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any] | UserError]]:
        number = self.num_read = 0
        try:
            with self._digest.open(self._path) as file, self._open(file) as parquet:
                num_rows = parquet.metadata.num_rows
                names = list(self._fields.values())
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=names):
                    columns = [_values(batch, name) for name in names]
                    for row in zip(*columns, strict=True):
                        number += 1
                        self.fraction_read, self.num_read = number / num_rows, number
                        errors = [value for value in row if isinstance(value, UserError)]
                        fields = dict(zip(self._fields, row, strict=True))
                        yield number - 1, errors[0] if errors else fields
        except self._errors as error:
            raise UserError(
                "input",
                message=f"input {self._path}: is damaged after row {number - 1} ({error}); copy it "
                "again",
            ) from error
        self.fraction_read = 1.0

    def place(self, number: int) -> str:
        """Return the row's number from 0, as readers of Parquet count."""
        return f"row {number}"


def _require_column(path: Path, schema: Any, option: str, name: str) -> None:
    """Raise UserError unless exactly one column has this name."""
    count = schema.names.count(name)
    if count == 1:
        return
    if count > 1:
        raise UserError(
            option,
            message=f"input {path}: {count} columns are named {name!r}; rename all but one, or "
            f"name another with --{option}",
        )
    first, *others = name.split(".")
    if others and schema.names.count(first) == 1:
        kind = schema.field(first).type
        for part in others:
            if not hasattr(kind, "get_field_index") or kind.get_field_index(part) < 0:
                break
            kind = kind.field(part).type
        else:
            return
    raise UserError(
        option,
        message=f"input {path}: no column {name!r}, only {', '.join(schema.names)}; name one with "
        f"--{option}",
    )


def _values(batch: Any, name: str) -> list[Any]:
    """Return a column's values, with a UserError for each that Python cannot represent."""
    if name in batch.schema.names:
        return _as_python(batch.column(name))
    first, *others = name.split(".")
    values = _as_python(batch.column(first))
    for part in others:
        values = [value[part] if isinstance(value, dict) else value for value in values]
    return values


def _as_python(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except ValueError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return UserError("input", message="is not UTF-8; convert the file")
    except ValueError as error:
        return UserError("input", message=f"has a value that cannot be read ({error})")
