"""Find the files that sources name: folders, globs, URLs, the Python standard library."""

import glob
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from stu.common.errors import UserError
from train.data.reading.columns import dataset_files
from train.data.reading.remote import InputFile, identity, is_url, list_remote, size_of

STDLIB = "stdlib:"
KINDS = {
    **{".txt": "text", ".md": "text", ".jsonl": "jsonl", ".csv": "csv"},
    **{".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"},
}
COMPRESSED = (".gz", ".zst")
BINARY = ("parquet", "arrow")
"""Kinds that are compressed inside, if at all."""
CACHE = "cache-"
"""Beginning of the names of files that the datasets library keeps beside a dataset."""
ALLOWED = ".txt, .md, .jsonl, .csv (each also as .gz or .zst), .parquet or .arrow"
LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 1 << 12, 1 << 20
PIECES = 256


class Files(NamedTuple):
    """Files that the sources name."""

    documents: list[InputFile]  # to read, in this order
    skipped: list[InputFile]  # in a source folder, but of another kind; in `stdlib:`, not decodable
    num_hidden: int = 0  # files and folders whose names begin with a dot
    num_repeated: int = 0  # other paths of files that are in `documents`
    piece_bytes: int = MOST_PIECE_BYTES  # largest piece of a text file


def find_files(sources: Sequence[str], kind: str | None = None, allow_hub: bool = False) -> Files:
    """Return the files that `sources` name: `stdlib:`, files, folders, globs, or URLs of these.

    Folders are searched recursively: links are followed, hidden files are left out. Files are
    sorted within a source. A file with several paths is returned once. Raises UserError for a
    source without readable files.

    Args:
        sources: Names of sources.
        kind: Kind of all files; None: by their names, and files with other names are left out.
        allow_hub: Whether URLs may be of the Hugging Face Hub.
    """
    found = [
        _find_remote(path, kind, allow_hub) if is_url(path) else _find_path(path, kind)
        for source in sources
        for path in _expand(source)
    ]
    paths = [path for files in found for path in files.documents]
    first: dict[tuple[object, ...], InputFile] = {}
    for path in paths:
        first.setdefault(identity(path), path)
    documents = list(first.values())
    skipped = list(dict.fromkeys(path for files in found for path in files.skipped))
    total = sum(map(size_of, documents))
    return Files(
        documents,
        skipped,
        sum(files.num_hidden for files in found),
        len(paths) - len(documents),
        max(LEAST_PIECE_BYTES, min(MOST_PIECE_BYTES, total // PIECES)),
    )


def kind_of(path: InputFile) -> str | None:
    """Return one of the values of `KINDS` by a file's name, or None for any other kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED and KINDS.get(suffixes[-2]) not in BINARY:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def read_python(path: InputFile) -> str:
    """Read a Python source in the encoding that it declares (PEP 263), or else UTF-8."""
    with path.open("rb") as file:
        encoding, _ = tokenize.detect_encoding(file.readline)
        file.seek(0)
        return file.read().decode(encoding)


def _expand(source: str) -> list[str]:
    """Return the paths that match a glob, or any other source by itself."""
    if source == STDLIB or is_url(source) or os.path.lexists(source):
        return [source]
    if matches := sorted(glob.glob(source, recursive=True)):
        return matches
    raise _bad_source(source, "no such file or folder, and no glob that matches any")


def _find_path(source: str, kind: str | None) -> Files:
    path = Path(source)
    if source == STDLIB:
        return _find_stdlib()
    if path.is_dir():
        return _find_in_folder(path, kind)
    if path.is_file() and (kind or kind_of(path)):
        return Files([path], [])
    if path.is_file():
        hint = "; write its objects to a .jsonl file, each on a line of its own"
        is_json = path.suffix.lower() == ".json"
        raise _bad_source(source, f"not a {ALLOWED} file{hint if is_json else ''}")
    raise _bad_source(source, "neither a file nor a folder" if path.exists() else "a broken link")


def _find_remote(source: str, kind: str | None, allow_hub: bool) -> Files:
    readable: list[InputFile] = []
    skipped: list[InputFile] = []
    num_hidden = 0
    for file, is_in_folder in list_remote(source, allow_hub):
        inside = PurePosixPath(file.url.removeprefix(source.rstrip("/")))
        if is_in_folder and any(part.startswith(".") for part in inside.parts):
            num_hidden += 1
        elif kind or kind_of(file):
            readable.append(file)
        else:
            skipped.append(file)
    if not readable:
        raise _bad_source(source, f"no {ALLOWED} file here")
    return Files(readable, skipped, num_hidden)


def _find_in_folder(folder: Path, kind: str | None) -> Files:
    if kind is None and (dataset := dataset_files(folder)) is not None:
        return Files([*dataset], [])
    inside: list[Path] = []
    num_hidden = 0
    for path in _walk(folder):
        if path.name.startswith("."):
            num_hidden += 1
        else:
            inside.append(path)
    readable: list[InputFile] = [
        path
        for path in sorted(inside)
        if (kind or (kind_of(path) and not _is_cache(path))) and path.is_file()
    ]
    if not readable:
        raise _bad_source(str(folder), f"no {ALLOWED} file in this folder")
    known = set(readable)
    skipped: list[InputFile] = [path for path in sorted(inside) if path not in known]
    return Files(readable, skipped, num_hidden)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every file below `folder`, and every hidden folder instead of the files in it.

    Links are followed. As they may form a circle, no folder is entered twice.
    """
    seen = set()
    for name, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        here = Path(name)
        if identity(here) in seen:
            folders.clear()
            continue
        seen.add(identity(here))
        folders.sort()  # of two paths to a folder, take the same one on every machine
        yield from (here / file for file in files)
        yield from (here / inner for inner in folders if inner.startswith("."))
        folders[:] = [inner for inner in folders if not inner.startswith(".")]


def _is_cache(path: Path) -> bool:
    return path.name.startswith(CACHE) and kind_of(path) == "arrow"


def _raise(error: OSError) -> None:
    raise error


def _bad_source(source: str, reason: str) -> UserError:
    return UserError("SOURCE", source, message=f"source {source}: {reason}")


def _find_stdlib() -> Files:
    """Return the modules of the running Python, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    modules = sorted(
        path
        for path in root.rglob("*.py")
        if left_out.isdisjoint(path.relative_to(root).parts[:-1]) and path.is_file()
    )
    if not modules:
        raise _bad_source(STDLIB, f"this Python has no library sources in {root}")
    skipped: list[InputFile] = [path for path in modules if not _is_decodable(path)]
    return Files([path for path in modules if path not in skipped], skipped)


def _is_decodable(path: Path) -> bool:
    try:
        read_python(path)
    except (SyntaxError, UnicodeDecodeError):
        return False
    return True
