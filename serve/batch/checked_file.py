"""Files that must stay the same between two readings.

The first reading hashes each block of a file; the second compares each block before any of it is
used, so that a change is found even where size and times are the same.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from stu.common.errors import UserError

MIN_BLOCK_BYTES = 2**20
MAX_BLOCKS = 2**16
HASH_BYTES = 16
"""Bytes of a block's hash."""
BUFFER_BYTES = 2**16


class RawFile(Protocol):
    """An open file: Python's without a buffer, or pyarrow's."""

    def read(self, size: int, /) -> bytes | None:
        """Return at most `size` bytes, none at the end."""

    def seek(self, offset: int, whence: int = ..., /) -> int | None:
        """Move to a position."""

    def tell(self) -> int:
        """Return the position."""

    def close(self) -> None:
        """Close the file."""


class Changed(UserError):
    """A file no longer has the bytes that it had at first."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            "input",
            message=f"input {path}: has changed since this run began. The output has rows of the "
            "old content: restore it and give the same command again, or decode the new content "
            "into another output or with --overwrite",
        )


@dataclass(frozen=True)
class FileDigest:
    """Hashes of a file."""

    num_bytes: int
    sha256: str
    block_bytes: int
    """Bytes of each block but the last."""
    blocks: str
    """Hexadecimal hashes of the blocks, concatenated."""
    signature: tuple[int, ...]
    """Inode, size and times; while they stay the same, nobody has written to the file."""

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Read and hash a file. Raises UserError if it is written meanwhile."""
        with path.open("rb", buffering=0) as file:
            before = _signature(file.fileno())
            digest = cls.of_file(file, path)
            if _signature(file.fileno()) != before:
                raise _being_written(path)
        return replace(digest, signature=before)

    @classmethod
    def of_file(cls, file: RawFile, path: Path) -> "FileDigest":
        """Read and hash an open file, of any file system; the digest has no signature.

        Raises UserError if it is written meanwhile."""
        num_bytes = _size(file)
        file.seek(0)
        block_bytes = max(MIN_BLOCK_BYTES, -(-num_bytes // MAX_BLOCKS))
        whole, blocks = hashlib.sha256(), []
        num_read = 0
        # A writer could move the end of the file for ever: stop at its present size.
        while num_read < num_bytes and (block := _read_whole(file, block_bytes)):
            whole.update(block)
            blocks.append(_hash(block).hex())
            num_read += len(block)
        if num_read != num_bytes:
            raise _being_written(path)
        return cls(num_read, whole.hexdigest(), block_bytes, "".join(blocks), ())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FileDigest":
        """Return the digest that `to_json` wrote."""
        return cls(**{**values, "signature": tuple(values["signature"])})

    def to_json(self) -> dict[str, Any]:
        """Return the digest as JSON values."""
        return asdict(self)

    def open(self, path: Path) -> BinaryIO:
        """Return a buffered reader of `path` that raises Changed at a block that differs."""
        return self.checked(path.open("rb", buffering=0), path)

    def checked(self, file: RawFile, path: Path) -> BinaryIO:
        """Return a buffered reader of an open file that raises Changed at a block that differs."""
        return cast(BinaryIO, io.BufferedReader(_CheckedFile(file, path, self), BUFFER_BYTES))

    def check(self, path: Path) -> None:
        """Raise Changed unless `path` is a file with these bytes."""
        try:
            with path.open("rb") as file:  # network file systems look again when a file is opened
                is_same = _signature(file.fileno()) == self.signature
            is_same = is_same or FileDigest.of(path).sha256 == self.sha256
        except (UserError, FileNotFoundError):  # it is being written, or is gone
            is_same = False
        if not is_same:
            raise Changed(path)


class _CheckedFile(io.RawIOBase):
    def __init__(self, file: RawFile, path: Path, digest: FileDigest) -> None:
        self._file, self._path, self._digest = file, path, digest
        self._position, self._index, self._block = 0, -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_CUR: self._position, os.SEEK_END: self._digest.num_bytes}
        self._position = starts.get(whence, 0) + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._digest.num_bytes:
            if _size(self._file) > self._digest.num_bytes:
                raise Changed(self._path)
            return 0
        index, start = divmod(self._position, self._digest.block_bytes)
        part = self._checked_block(index)[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _checked_block(self, index: int) -> bytes:
        if index != self._index:
            self._file.seek(index * self._digest.block_bytes)
            block = _read_whole(self._file, self._digest.block_bytes)
            place = 2 * HASH_BYTES * index
            if _hash(block).hex() != self._digest.blocks[place : place + 2 * HASH_BYTES]:
                raise Changed(self._path)
            self._index, self._block = index, block
        return self._block


def _hash(block: bytes) -> bytes:
    return hashlib.sha256(block).digest()[:HASH_BYTES]


def _size(file: RawFile) -> int:
    file.seek(0, os.SEEK_END)
    return file.tell()


def _being_written(path: Path) -> UserError:
    message = f"input {path}: is being written; give the command again when it is complete"
    return UserError("input", message=message)


def _read_whole(file: RawFile, num_bytes: int) -> bytes:
    """Read `num_bytes`, or up to the end of the file."""
    parts: list[bytes] = []
    while num_bytes and (part := file.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _signature(descriptor: int) -> tuple[int, ...]:
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
