"""Documents from files: plain text, JSON lines, Parquet, the Python standard library."""

import glob
import gzip
import io
import json
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

STDLIB = "stdlib:"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
PARQUET_ROWS = 64  # rows in memory at once: documents may be megabytes long


class Files(NamedTuple):
    """What the sources named."""

    documents: list[Path]  # in the order they are read
    skipped: list[Path]  # in a source folder but of another kind, or not decodable (`stdlib:` only)


class Document(NamedTuple):
    """One text, and how much of its file it used up."""

    text: str
    source_bytes: int  # sums to the sizes of the files, compressed if they are: for progress


def find_files(sources: Sequence[str]) -> Files:
    """The files that `sources` name: `stdlib:`, a file, a folder (searched to the bottom), a glob.

    Sorted within each source, each file once. Raises ValueError for a source that names nothing
    that can be read.
    """
    found = [_find_source(source) for source in sources]
    documents = list(dict.fromkeys(path for files in found for path in files.documents))
    skipped = list(dict.fromkeys(path for files in found for path in files.skipped))
    return Files(documents, skipped)


def read_documents(files: Sequence[Path], text_key: str = "text") -> Iterator[Document]:
    """Every document of `files` in order: a whole .txt or .py file, a row of the other kinds.

    `text_key` names the field or column that holds a row's text; a row where it is null is an empty
    document. Memory holds a few documents, whatever the size of the files.

    Raises ValueError naming the file and the place for anything that is not readable text.
    """
    for path in files:
        if path.suffix == ".py":
            yield Document(_read_python(path), path.stat().st_size)
        elif path.suffix == ".txt":
            data = path.read_bytes()
            yield Document(_decode(data, path, 0).removeprefix("\ufeff"), len(data))
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, text_key)
        else:
            yield from _read_json_lines(path, text_key)


def _find_source(source: str) -> Files:
    if source == STDLIB:
        return _find_stdlib()
    path = Path(source)
    if path.is_dir():
        inside = sorted(item for item in path.rglob("*") if item.is_file())
        readable = [item for item in inside if item.name.endswith(SUFFIXES)]
        if not readable:
            raise ValueError(f"source {source}: no {_suffixes()} file in this folder")
        return Files(readable, [item for item in inside if not item.name.endswith(SUFFIXES)])
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"source {source}: not a {_suffixes()} file")
        return Files([path], [])
    matches = sorted(glob.glob(source, recursive=True))
    if not matches:
        raise ValueError(f"source {source}: no such file or folder, and no glob that matches one")
    inner = [_find_source(match) for match in matches]
    return Files([p for f in inner for p in f.documents], [p for f in inner for p in f.skipped])


def _find_stdlib() -> Files:
    """The running Python's own modules, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    modules = sorted(
        path
        for path in root.rglob("*.py")
        if left_out.isdisjoint(path.relative_to(root).parts[:-1]) and path.is_file()
    )
    if not modules:
        raise ValueError(f"source {STDLIB}: this Python has no library sources in {root}")
    skipped = [path for path in modules if not _is_decodable(path)]
    return Files([path for path in modules if path not in skipped], skipped)


def _is_decodable(path: Path) -> bool:
    try:
        _read_python(path)
    except (SyntaxError, UnicodeDecodeError):
        return False
    return True


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _read_python(path: Path) -> str:
    with path.open("rb") as file:
        encoding, _ = tokenize.detect_encoding(file.readline)  # a PEP 263 comment, or UTF-8
    return path.read_bytes().decode(encoding)


def _decode(data: bytes, path: Path, offset: int) -> str:
    """`data`, which starts `offset` bytes into the text of `path`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file, "
            f"for example with `iconv -f LATIN1 -t UTF-8`"
        ) from error


def _read_json_lines(path: Path, text_key: str) -> Iterator[Document]:
    compressed = path.name.endswith(".gz")
    with path.open("rb") as raw:
        lines: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if compressed else raw
        offset = used = 0
        try:
            for number, line in enumerate(lines, start=1):
                text = _json_text(_decode(line, path, offset), f"{path} line {number}", text_key)
                offset += len(line)
                now = raw.tell() if compressed else offset
                yield Document(text, now - used)
                used = now
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: broken gzip file ({error})") from error


def _json_text(line: str, where: str, text_key: str) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or text_key not in row:
        fields = f"only {', '.join(row)}" if isinstance(row, dict) else "and no fields at all"
        raise ValueError(f"{where}: no field {text_key!r}, {fields}; name it with --text-key")
    text = row[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {text_key!r} is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {text_key!r} has half of a surrogate pair") from error
    return text


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
            if text_key not in file.schema_arrow.names:
                raise ValueError(
                    f"no column {text_key!r}, only {', '.join(file.schema_arrow.names)}; "
                    f"name it with --text-key"
                )
            kind = file.schema_arrow.field(text_key).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"column {text_key!r} is {kind}, not a string")
            size, rows, done = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    yield Document(text or "", size * (done + 1) // rows - size * done // rows)
                    done += 1
    except (ValueError, pa.ArrowException) as error:  # of these, some lack the name of the file
        raise ValueError(f"{path}: {error}") from error
