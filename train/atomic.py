"""A folder that appears complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends, or vanishes if it raises.

    Files directly inside are on disk before the name appears. Raises ValueError if `path` is there
    already and not an empty folder.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output {path}: exists and is not empty; choose another, or delete it")
    # Missing parents are made last, so that a failure leaves none of them either.
    existing = next(parent for parent in path.parents if parent.exists())
    temporary = existing / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for written in [*temporary.iterdir(), temporary]:
            _fsync(written)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
