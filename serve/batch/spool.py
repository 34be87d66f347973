"""Standard input and pipes can be read once: they are kept in a file, which can be read again."""

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
DESCRIPTORS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # another process has others
READ_BYTES = 2**20
HASH_DIGITS = 16


def is_stream(path: Path) -> bool:
    """Whether an input can be read once only, or by this process only."""
    if path == STANDARD or str(path).startswith(DESCRIPTORS):
        return True
    return path.exists() and not (path.is_file() or path.is_dir())


@contextmanager
def readable_again(source: Path, output: Path) -> Iterator[Path]:
    """The path of `source`, or of a copy of it if it is a stream.

    The copy lies beside `output` as OUTPUT.input-HASH, and stays if the run does not come to its
    end; all copies go when one does, be it a run that reads one of them. Beside standard output it
    is a temporary file.
    """
    if not is_stream(source):
        yield source
        if output != STANDARD and any(source.samefile(copy) for copy in _copies(output)):
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
                f"stu-generate: {source} was read to its end; if this run is stopped, the same "
                f"command with --input {copy} goes on",
                file=sys.stderr,
            )
        yield copy
        if output != STANDARD:
            _remove_copies(output)


def _copies(output: Path) -> list[Path]:
    name = re.compile(re.escape(f"{output.name}.input-") + rf"[0-9a-f]{{{HASH_DIGITS}}}")
    return [path for path in output.parent.iterdir() if name.fullmatch(path.name)]


def _remove_copies(output: Path) -> None:
    for copy in _copies(output):
        copy.unlink(missing_ok=True)


def _copy(source: Path, folder: Path, name: str) -> Path:
    """A file that is whole on disk, under a name that its contents decide."""
    digest = hashlib.sha256()
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file, _open(source) as stream:
            while piece := stream.read1(READ_BYTES):
                digest.update(piece)
                file.write(piece)
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
