"""Rows of an input as a dataset of Ray Data.

Files are read by tasks on the hosts of the cluster, through the file systems of pyarrow, which
Ray Data's own readers use too. As elsewhere, their blocks are compared with the hashes made at the
start of the run, so that each row has the same number and content whenever it is read.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import ray
from pyarrow.fs import FileSystem
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from serve.batch.checked_file import FileDigest
from serve.batch.config import BatchConfig
from serve.batch.source import InputDigest, NumberedRow, open_file
from serve.ray.files import file_names, open_filesystem
from stu.common.array_task import ArrayTask
from stu.common.errors import UserError

BLOCK_ROWS = 64
"""Rows that an engine is given at once, and decodes again if it is killed."""
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("place", pa.string()),
        ("fields", pa.large_string()),
        ("error", pa.string()),
    ]
)
"""Number and name of a row, and its fields as JSON, or the reason why it has none."""


@dataclass(frozen=True)
class StoredDigest(FileDigest):
    """Hashes of a file of any file system."""

    filesystem: FileSystem
    location: str
    """Name of the file there."""

    def open(self, path: Path) -> BinaryIO:
        """See `FileDigest.open`."""
        return self.checked(self.filesystem.open_input_file(self.location), path)


@dataclass(frozen=True)
class StoredFile:
    """A file of an input."""

    path: Path
    """Path or URL, for errors."""
    place: str
    """Prefix of the names of its rows."""
    digest: StoredDigest
    first_row: int
    """Number of its first row in the input."""
    num_rows: int


class ClusterInput:
    """Files of an input, hashed and counted by tasks of the cluster.

    Raises UserError if the input cannot be read.
    """

    def __init__(self, config: BatchConfig) -> None:
        filesystem, base = open_filesystem(config.input)
        names = file_names(filesystem, base)
        columns = config.column, config.id_column
        measure = ray.remote(_measured).options(max_retries=-1)
        measured = ray.get(
            [
                measure.remote(
                    config.input / name, filesystem, f"{base}/{name}".rstrip("/"), *columns
                )
                for name in names
            ]
        )
        self.files: list[StoredFile] = []
        self.num_rows = 0
        """Numbers that rows have, including those of blank lines."""
        self._blank: list[int] = []
        """Numbers of blank lines."""
        for name, (result, num_rows, blank) in zip(names, measured, strict=True):
            if isinstance(result, UserError):
                raise result
            self._blank += [self.num_rows + number for number in blank]
            place = f"{name} " if name else ""
            path = config.input / name
            self.files.append(StoredFile(path, place, result, self.num_rows, num_rows))
            self.num_rows += num_rows
        self.digest = InputDigest(
            {name: file.digest for name, file in zip(names, self.files, strict=True)}
        )
        self._config = config

    def count(self, task: ArrayTask) -> int:
        """Return the number of rows of `task`."""
        numbers = range(task.index, self.num_rows, task.count)
        return len(numbers) - sum(number in task for number in self._blank)

    def first_fields(self) -> Mapping[str, Any]:
        """Return the fields of the first row that has any, none if there is no such row."""
        for file in self.files:
            for _, fields in open_file(
                file.path, file.digest, self._config.column, self._config.id_column
            ):
                if not isinstance(fields, UserError):
                    return fields
        return {}

    def dataset(self, task: ArrayTask, done: Iterable[int]) -> Any:
        """Return the rows of `task` that are not in `done` as a dataset with `SCHEMA`."""
        is_done = np.zeros(self.num_rows, bool)
        is_done[list(done)] = True
        packed = ray.put(np.packbits(is_done))
        files = [file for file in self.files if file.num_rows]
        source = _RowSource(files, task, packed, self._config.column, self._config.id_column)
        dataset = ray.data.read_datasource(source, override_num_blocks=max(1, len(files)))
        return dataset.repartition(target_num_rows_per_block=BLOCK_ROWS)


class _RowSource(Datasource):  # type: ignore[misc]
    """Reads each file in a task of its own."""

    def __init__(
        self,
        files: list[StoredFile],
        task: ArrayTask,
        done: Any,
        column: str | None,
        id_column: str | None,
    ) -> None:
        super().__init__()
        self._files, self._task, self._done = files, task, done
        self._columns = column, id_column

    def get_name(self) -> str:
        return "rows"

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(file.digest.num_bytes for file in self._files)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_tables, file, self._task, self._done, *self._columns),
                BlockMetadata(
                    num_rows=None,
                    size_bytes=file.digest.num_bytes,
                    exec_stats=None,
                    input_files=(str(file.path),),
                ),
                schema=SCHEMA,
            )
            for file in self._files
        ]


def _measured(
    path: Path, filesystem: FileSystem, location: str, column: str | None, id_column: str | None
) -> tuple[StoredDigest | UserError, int, list[int]]:
    """Return the digest of a file, the number of its rows and the numbers of blank lines among
    them, or the error of one that cannot be read."""
    try:
        with filesystem.open_input_file(location) as file:
            found = FileDigest.of_file(file, path)
        digest = StoredDigest(**vars(found), filesystem=filesystem, location=location)
        source = open_file(path, digest, column, id_column)
        blank: list[int] = []
        expected = 0
        for number, _ in source:
            blank += range(expected, number)
            expected = number + 1
    except UserError as error:
        return error, 0, []
    return digest, source.num_read, [*blank, *range(expected, source.num_read)]


def _tables(
    file: StoredFile, task: ArrayTask, done: Any, column: str | None, id_column: str | None
) -> Iterator[pa.Table]:
    is_done = np.unpackbits(ray.get(done)).view(bool)
    source = open_file(file.path, file.digest, column, id_column)
    rows: list[dict[str, Any]] = []
    for number, fields in source:
        place = f"{file.place}{source.place(number)}"
        number += file.first_row
        if number in task and not is_done[number]:
            rows.append(_stored(number, place, fields))
        if len(rows) == BLOCK_ROWS:
            yield pa.Table.from_pylist(rows, SCHEMA)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, SCHEMA)


def _stored(number: int, place: str, fields: NumberedRow | Any) -> dict[str, Any]:
    # Arrow's strings have no halves of surrogate pairs.
    place = place.encode(errors="backslashreplace").decode()
    values = {"number": number, "place": place, "fields": "", "error": ""}
    if isinstance(fields, UserError):
        return {**values, "error": str(fields).encode(errors="backslashreplace").decode()}
    try:
        return {**values, "fields": json.dumps(fields)}
    except (TypeError, ValueError) as error:  # a column of bytes, say
        return {**values, "error": f"has a value that is no text, number or list ({error})"}
