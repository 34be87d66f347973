"""Files of sources: local ones, and those of any file system that fsspec knows by its URL."""

import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from stu.common.errors import UserError

URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://")
HUB = "hf"
OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
"""Environment variables that keep Hugging Face's libraries from the network."""
READ_BYTES = 1 << 20
"""Bytes that are asked of a file system at once, or more."""


@dataclass(frozen=True)
class RemoteFile:
    """File with a URL; it has the parts of Path's interface that reading needs."""

    url: str
    size: int

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.url).suffixes

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file. Raises UserError if its file system does not; reading raises OSError."""
        with _named(self.url):
            system, path = _open_system(self.url)
            file = system.open(path, mode)
        return io.BufferedReader(_Reader(file, self.url), READ_BYTES)


class _Reader(io.RawIOBase):
    """An open file of a file system, whose errors name it and are no faults of its contents."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._called(self._file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._called(self._file.seek, offset, whence)  # some return nothing
        return int(self._called(self._file.tell))

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _called(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # of any kind, as in _named
            reason = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
            raise OSError(errno.EIO, reason, self._url) from error


InputFile = Path | RemoteFile


def size_of(file: InputFile) -> int:
    """Return the size of a file in bytes."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def identity(file: InputFile) -> tuple[object, ...]:
    """Return what two paths to the same file have in common."""
    if isinstance(file, RemoteFile):
        return (file.url,)
    status = file.stat()
    return status.st_dev, status.st_ino


def full_name(file: InputFile) -> str:
    """Return a name of the file that is the same in every working directory."""
    return file.url if isinstance(file, RemoteFile) else str(file.absolute())


def is_url(source: str) -> bool:
    """Return whether a source is the URL of a file, a folder or a glob."""
    return URL.match(source) is not None


def list_remote(source: str, allow_hub: bool) -> list[tuple[RemoteFile, bool]]:
    """Return the files that a URL names, sorted, each with whether it was found in a folder.

    allow_hub: whether URLs may be of the Hugging Face Hub. Raises UserError if the file system
    needs a package that is not installed, refuses, or has no such file.
    """
    if source.startswith(f"{HUB}://"):
        _require_hub(source, allow_hub)
    with _named(source):
        system, path = _open_system(source)
        if system.isdir(path):
            found = system.find(path, detail=True)
        elif system.exists(path):
            found = {path: system.info(path)}
        else:
            found = system.glob(path, detail=True)
        is_folder = system.isdir(path)
        files = [
            (RemoteFile(system.unstrip_protocol(name), int(info["size"] or 0)), is_folder)
            for name, info in sorted(found.items())
            if info["type"] == "file"
        ]
    if not files:
        raise _refused(source, "no such file or folder, and no glob that matches any")
    return files


def _require_hub(source: str, allow_hub: bool) -> None:
    if not allow_hub:
        raise _refused(source, "reading from the Hugging Face Hub needs --allow-hub")
    for name in OFFLINE:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise _refused(source, f"{name} is set, so the Hugging Face Hub is not read")


def _open_system(source: str) -> tuple[Any, str]:
    import fsspec

    system, path = fsspec.core.url_to_fs(source)
    return system, path


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Turn errors of a file system into a UserError that names the source."""
    try:
        yield
    except ImportError as error:
        reason = f"it needs a package that is not installed ({error})"
        raise _refused(source, reason) from error
    except Exception as error:  # packages for file systems raise exceptions of many kinds
        reason = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
        raise _refused(source, reason) from error


def _refused(source: str, reason: str) -> UserError:
    return UserError("SOURCE", source, message=f"source {source}: {reason}")
