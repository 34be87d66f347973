"""Files that all hosts of a cluster can read: on a file system that they share, or at a URL."""

import re
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from stu.common.errors import UserError

URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])")
"""Start of a URL; a `Path` has one slash of its two."""


def open_filesystem(path: Path) -> tuple[FileSystem, str]:
    """Return the file system of a path or URL, and its name there.

    Raises UserError for a URL whose file system pyarrow does not know.
    """
    if not URL.match(str(path)):
        return LocalFileSystem(), str(path.absolute())
    url = URL.sub(r"\1://", str(path), count=1)
    try:
        filesystem, name = FileSystem.from_uri(url)
    except (ValueError, OSError, NotImplementedError) as error:
        raise UserError("input", message=f"input {url}: {error}") from error
    return filesystem, name


def file_names(filesystem: FileSystem, base: str) -> list[str]:
    """Return the names of the files in a folder, relative to it and in order; "" if `base` is a
    single file.

    Names that begin with `_` or `.` are left out. Raises UserError if there is no file.
    """
    kind = filesystem.get_file_info(base).type
    if kind == FileType.File:
        return [""]
    if kind == FileType.NotFound:
        raise UserError("input", message=f"input {base}: no such file")
    prefix = base.rstrip("/") + "/"
    names = [
        info.path.removeprefix(prefix)
        for info in filesystem.get_file_info(FileSelector(base, recursive=True))
        if info.type == FileType.File
    ]
    names = [name for name in names if not any(part[0] in "_." for part in name.split("/"))]
    if not names:
        raise UserError("input", message=f"input {base}: the folder has no files to read")
    return sorted(names)
