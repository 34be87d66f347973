"""Read gzip and Zstandard, recognised by their first bytes, as if the file were not compressed."""

import gzip
import io
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from stu.common.errors import UserError, how_to_install

MAGIC_BYTES = 8
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
"""After a byte 0x50 to 0x5f: a frame without data, which some writers put first."""
OTHER_MAGICS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"\x04\x22M\x18": "lz4",
}
ZSTD_WINDOW_LOG = 31
"""The largest window, which `zstd --long=31` writes."""


def compression_of(start: bytes) -> str | None:
    """Return the compression of a file that begins with `start` (`MAGIC_BYTES` or more bytes).

    It is "gzip", "zstd", the name of a compression that is not supported, or None.
    """
    if start.startswith(GZIP_MAGIC):
        return "gzip"
    is_skippable = start[1:4] == ZSTD_SKIPPABLE and 0x50 <= start[0] <= 0x5F
    if start.startswith(ZSTD_MAGIC) or is_skippable:
        return "zstd"
    return next((kind for magic, kind in OTHER_MAGICS.items() if start.startswith(magic)), None)


def open_decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """Return a buffered reader of the decompressed contents, or `file` itself if not compressed.

    Several gzip members or Zstandard frames are read one after the other.

    Args:
        file: A seekable file.
        name: Name of the file in errors.

    Raises UserError for other compressions. Reading raises it where the file is cut short or
    damaged, after all data before that place.
    """
    start = file.read(MAGIC_BYTES)
    file.seek(0)
    kind = compression_of(start)
    if kind is None:
        return file
    if kind not in _OPENERS:
        raise UserError(
            name,
            message=f"{name}: {kind} is not supported: decompress it, or compress it with gzip or "
            "zstd",
        )
    opened, errors = _OPENERS[kind](file, name)
    reader = io.BufferedReader(_Decompressed(opened, errors, name, kind))
    if inner := compression_of(reader.peek(MAGIC_BYTES)[:MAGIC_BYTES]):
        raise UserError(name, message=f"{name}: {inner} inside {kind}: decompress it once")
    return cast(BinaryIO, reader)


class _Decompressed(io.RawIOBase):
    """A decompressor whose errors name the file."""

    def __init__(
        self, opened: Any, errors: tuple[type[Exception], ...], name: str, kind: str
    ) -> None:
        self._opened, self._errors, self._name, self._kind = opened, errors, name, kind

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # `read` would lose what it has when the end is damaged.
            data = self._opened.read1(len(buffer))
        except self._errors as error:
            message = f"{self._name}: damaged {self._kind} file ({error}): copy or write it again"
            raise UserError(self._name, message=message) from error
        buffer[: len(data)] = data
        return len(data)


def _open_gzip(file: BinaryIO, name: str) -> tuple[Any, tuple[type[Exception], ...]]:
    return gzip.GzipFile(fileobj=file), (EOFError, gzip.BadGzipFile, zlib.error)


def _open_zstd(file: BinaryIO, name: str) -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        message = f"{name}: reading Zstandard needs backports.zstd: {how_to_install('data')}"
        raise UserError(name, message=message) from error
    options = {int(zstd.DecompressionParameter.window_log_max): ZSTD_WINDOW_LOG}
    return zstd.ZstdFile(file, options=options), (EOFError, zstd.ZstdError)


_Opener = Callable[[BinaryIO, str], tuple[Any, tuple[type[Exception], ...]]]
_OPENERS: dict[str, _Opener] = {"gzip": _open_gzip, "zstd": _open_zstd}
