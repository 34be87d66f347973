"""Files and folders that appear complete or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stu.common.errors import UserError


def cache_folder() -> Path:
    """Return the folder for what can be computed again, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "stu"


@contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, or vanishes if it raises.

    Files directly inside it are on disk before `path` appears. Raises UserError if `path` exists
    and is not an empty folder, unless `overwrite`, which deletes the old one last, or is where a
    disk is mounted, which no other folder can replace.
    """
    path = path.resolve()
    require_no_mount(path)
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and not overwrite:
        message = f"output {path}: exists and is not empty; choose another, or delete it"
        raise UserError("output", str(path), message=message)
    # Missing parents are made last, so that a failure leaves none of them either.
    existing = next(parent for parent in path.parents if parent.exists())
    temporary = _temporary_name(existing / path.name)
    temporary.mkdir()
    try:
        yield temporary
        for written in [*temporary.iterdir(), temporary]:
            fsync(written)
        path.parent.mkdir(parents=True, exist_ok=True)
        if occupied:
            old = path.rename(_temporary_name(path))
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(path.parent)


def require_no_mount(output: Path) -> None:
    """Raise UserError if a disk is mounted at `output`."""
    if os.path.ismount(output):
        fix = "a disk is mounted there: name a new folder inside it"
        raise UserError("output", str(output), fix=fix)


def require_apart(source: Path, output: Path) -> None:
    """Raise UserError if replacing the output would delete what `source` lies in; a folder may take
    the place of itself."""
    inside, target = source.resolve(), output.resolve()
    if target in inside.parents:
        raise UserError("output", str(output), f"a folder that {source} does not lie in")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path`, or vanishes on an error."""
    path = path.resolve()
    temporary = _temporary_name(path)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError, naming the file, if it has none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(str(file), message=f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(str(file), message=f"{file}: a JSON object is needed")
    return values


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def fsync(path: Path) -> None:
    """Return when a file, or the names in a folder, would survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
