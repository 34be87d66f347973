"""Documents in columns: Parquet, and Arrow's IPC format, as Hugging Face datasets are saved."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from stu.common.errors import UserError, how_to_install
from train.data.reading.document import FIX, BadInput, Document
from train.data.reading.remote import InputFile, size_of

ROWS = 64  # rows in memory at once: documents may be megabytes long
ARROW_MAGIC = b"ARROW1"
"""First bytes of the file format; the stream format, which datasets use, has none."""
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"
"""Files in the folder of a dataset that was saved to disk, and in that of one with splits."""


def read_parquet(path: InputFile, text_key: str) -> Iterator[Document | BadInput]:
    """Yield the rows of a Parquet file. Raises BadInput, or UserError without pyarrow."""
    pq = _import_pyarrow(path, "Parquet").parquet
    with _damage(path, "Parquet"), _opened(path) as source, pq.ParquetFile(source) as file:
        names = _resolve(path, file.schema_arrow, text_key)
        num_rows, done, size = file.metadata.num_rows, 0, size_of(path)
        for batch in file.iter_batches(batch_size=ROWS, columns=[text_key]):
            for text in _texts(batch, names):
                share = size * (done + 1) // num_rows - size * done // num_rows
                done += 1
                yield _row(text, share, path, done)


def read_arrow(path: InputFile, text_key: str) -> Iterator[Document | BadInput]:
    """Yield the rows of an Arrow file or stream. Raises BadInput, or UserError without pyarrow."""
    pa = _import_pyarrow(path, "Arrow")
    with _damage(path, "Arrow"), _opened(path) as source:
        file = pa.memory_map(source) if isinstance(source, str) else pa.PythonFile(source, mode="r")
        is_file = file.read(len(ARROW_MAGIC)) == ARROW_MAGIC
        file.seek(0)
        reader: Any = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        names = _resolve(path, reader.schema, text_key)
        done, used, size = 0, 0, size_of(path)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for number, batch in enumerate(batches, 1):
            end = size * number // reader.num_record_batches if is_file else file.tell()
            for start in range(0, len(batch), ROWS):
                for text in _texts(batch.slice(start, ROWS), names):
                    done += 1
                    yield _row(text, end - used, path, done)
                    used = end


def dataset_files(folder: Path) -> list[Path] | None:
    """Return the files of a Hugging Face dataset that was saved to `folder`; None if none was.

    Raises UserError if it has splits, of which one must be chosen, or lacks a file.
    """
    if (folder / SPLITS_FILE).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{STATE_FILE}"))
        fix = " or ".join(str(folder / split) for split in splits)
        raise _refused(folder, f"a dataset with splits {', '.join(splits)}: name {fix}")
    if not (folder / STATE_FILE).is_file():
        return None
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        files = [folder / row["filename"] for row in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{STATE_FILE} is not that of a saved dataset ({error!r})"
        raise _refused(folder, reason) from error
    if state.get("_indices_data_files"):
        reason = "it selects rows by indices, as old versions of datasets saved it: save it again"
        raise _refused(folder, reason)
    for file in files:
        if not file.is_file():
            raise _refused(folder, f"{file.name} of the dataset is missing; save or copy it again")
    return files


def _texts(batch: Any, names: list[str]) -> list[str | None]:
    """Return the texts of a record batch: "" where one or what it lies in is null, and None where
    one is not UTF-8."""
    import pyarrow.compute as pc

    column = batch.column(names[0])
    if len(names) > 1:
        column = pc.struct_field(column, names[1:])
    try:
        return [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        return [_text(value) for value in column]


def _text(value: Any) -> str | None:
    try:
        return value.as_py() or ""
    except UnicodeDecodeError:
        return None


def _row(text: str | None, source_bytes: int, path: InputFile, number: int) -> Document | BadInput:
    place = f"row {number}"
    if text is None:
        return BadInput(path, place, "not UTF-8", "not UTF-8")
    return Document(text, source_bytes, path, place)


def _resolve(path: InputFile, schema: Any, text_key: str) -> list[str]:
    """Return the names that lead to the texts: a column, and fields of structs within it.

    Raises BadInput unless there is exactly one such column, of strings.
    """
    import pyarrow as pa

    names = schema.names
    keys = [text_key] if text_key in names else text_key.split(".")
    if names.count(keys[0]) != 1:
        count = "several columns" if keys[0] in names else "no column"
        reason = f"{count} {keys[0]!r}, only {', '.join(names)}; {FIX}"
        raise BadInput(path, "", "no field", reason)
    kind = schema.field(keys[0]).type
    for place, key in enumerate(keys[1:], 1):
        outer = ".".join(keys[:place])
        inside = [field.name for field in kind] if pa.types.is_struct(kind) else []
        if inside.count(key) != 1:
            found = f"only {', '.join(inside)}" if inside else f"as it is {kind}"
            raise BadInput(path, "", "no field", f"no field {key!r} in {outer!r}, {found}; {FIX}")
        kind = kind.field(key).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        reason = f"column {text_key!r} is {kind}, not a string"
        raise BadInput(path, "", "not a string", reason)
    return keys


@contextmanager
def _opened(path: InputFile) -> Iterator[Any]:
    """Yield the path of a local file, which pyarrow maps, or a remote file."""
    if isinstance(path, Path):
        yield str(path)
    else:
        with path.open("rb") as file:
            yield file


@contextmanager
def _damage(path: InputFile, kind: str) -> Iterator[None]:
    """Turn errors of pyarrow about a damaged file into BadInput."""
    pa = _import_pyarrow(path, kind)
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault
            raise
        raise BadInput(path, "", f"not {kind}", f"damaged, or not {kind} ({error})") from error
    except UnicodeDecodeError as error:
        raise BadInput(path, "", "not UTF-8", f"not UTF-8 ({error})") from error


def _import_pyarrow(path: InputFile, kind: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        message = f"{path}: reading {kind} needs pyarrow: {how_to_install('data')}"
        raise UserError(str(path), message=message) from error
    return cast(Any, pa)


def _refused(folder: Path, reason: str) -> UserError:
    return UserError("SOURCE", str(folder), message=f"source {folder}: {reason}")
