"""Copies of standard input and pipes, so that a batch run can read them again."""

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path

from stu.common.files import fsync

STANDARD = Path("-")
DESCRIPTORS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # they differ between processes
READ_BYTES = 2**20
HASH_DIGITS = 16


@contextmanager
def rereadable(source: Path, output: Path) -> Iterator[Path]:
    """Yield `source`, or the path of a copy if it is standard input or a pipe.

    The copy is OUTPUT.input-HASH, beside the output. It stays if the block raises, so that a later
    run can read it, and is removed when a run ends, including one that reads the copy itself.
    For standard output the copy is a temporary file.
    """
    if not is_stream(source):
        yield source
        copies = _copies(output) if output != STANDARD and source.exists() else []
        if any(source.samefile(copy) for copy in copies):
            _remove_copies(output)
        return
    with ExitStack() as stack:
        if output == STANDARD:
            folder, name = Path(stack.enter_context(tempfile.TemporaryDirectory())), "input-"
        else:
            folder, name = output.parent, f"{output.name}.input-"
        copy = _copy(source, folder, name)
        if output != STANDARD:
            print(
                f"stu-generate: read all of {source}; to resume this run after a stop, give the "
                f"same command with --input {copy}",
                file=sys.stderr,
            )
        yield copy
        if output != STANDARD:
            _remove_copies(output)


def is_stream(path: Path) -> bool:
    """Return whether an input can be read only once, or only by this process."""
    if path == STANDARD or str(path).startswith(DESCRIPTORS):
        return True
    return path.exists() and not (path.is_file() or path.is_dir())


def _copies(output: Path) -> list[Path]:
    name = re.compile(re.escape(f"{output.name}.input-") + rf"[0-9a-f]{{{HASH_DIGITS}}}")
    return [path for path in output.parent.iterdir() if name.fullmatch(path.name)]


def _remove_copies(output: Path) -> None:
    for copy in _copies(output):
        copy.unlink(missing_ok=True)


def _copy(source: Path, folder: Path, name: str) -> Path:
    """Write a copy named after a hash of its contents, and return when it is on disk."""
    digest = hashlib.sha256()
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file, _open(source) as stream:
            while block := stream.read1(READ_BYTES):
                digest.update(block)
                file.write(block)
        copy = folder / f"{name}{digest.hexdigest()[:HASH_DIGITS]}"
        fsync(Path(temporary))
        os.replace(temporary, copy)
        fsync(folder)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return copy


def _open(source: Path) -> BufferedReader:
    if source == STANDARD:
        return open(0, "rb", closefd=False)
    return source.open("rb")
