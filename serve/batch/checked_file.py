"""Files that must not change between two readings: the second compares what it reads to the first.

Each block of a file has a hash of its own, so that a change is seen before anything of a changed
block is used, whatever the file's size and times say.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

MIN_BLOCK_BYTES = 2**20
MOST_BLOCKS = 2**16
HASH_BYTES = 16  # of a block
BUFFER_BYTES = 2**16


class Changed(ValueError):
    """A file has other bytes than it had."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"input {path}: has changed since this run began; the rows that are written are those "
            "of the old content. Put that back and give the same command again, or decode the new "
            "content into another output or with --overwrite"
        )


@dataclass(frozen=True)
class FileDigest:
    """The hashes of a file."""

    num_bytes: int
    sha256: str
    block_bytes: int
    blocks: str
    """Hexadecimal hashes, one after the other."""
    signature: tuple[int, ...]
    """Inode, size and times: while these stay, nobody has written to the file."""

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Read a file. Raises ValueError if it is written meanwhile."""
        with path.open("rb", buffering=0) as file:
            before = _signature(file.fileno())
            num_bytes = os.fstat(file.fileno()).st_size
            block_bytes = max(MIN_BLOCK_BYTES, -(-num_bytes // MOST_BLOCKS))
            whole, blocks = hashlib.sha256(), []
            num_read = 0
            # Not to its end, from which a writer may keep it away for ever.
            while num_read < num_bytes and (block := _read_whole(file, block_bytes)):
                whole.update(block)
                blocks.append(_hash(block).hex())
                num_read += len(block)
            if num_read != num_bytes or _signature(file.fileno()) != before:
                raise ValueError(
                    f"input {path}: is being written: give the command again when it is complete"
                )
        return cls(num_read, whole.hexdigest(), block_bytes, "".join(blocks), before)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FileDigest":
        """From `to_json`."""
        return cls(**{**values, "signature": tuple(values["signature"])})

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def open(self, path: Path) -> BinaryIO:
        """A buffered reader of the file; it raises Changed where the file has other bytes."""
        return cast(BinaryIO, io.BufferedReader(_CheckedFile(path, self), BUFFER_BYTES))

    def check(self, path: Path) -> None:
        """Raises Changed unless `path` is a file with these bytes."""
        try:
            with path.open("rb") as file:  # a network file system looks anew when a file is opened
                is_same = _signature(file.fileno()) == self.signature
            is_same = is_same or FileDigest.of(path).sha256 == self.sha256
        except (ValueError, FileNotFoundError):  # being written, or gone
            is_same = False
        if not is_same:
            raise Changed(path)


class _CheckedFile(io.RawIOBase):
    def __init__(self, path: Path, digest: FileDigest) -> None:
        self._file = path.open("rb", buffering=0)
        self._path, self._digest = path, digest
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
            if os.fstat(self._file.fileno()).st_size > self._digest.num_bytes:
                raise Changed(self._path)
            return 0
        index, start = divmod(self._position, self._digest.block_bytes)
        part = self._verified(index)[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _verified(self, index: int) -> bytes:
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


def _read_whole(file: io.RawIOBase | io.FileIO, num_bytes: int) -> bytes:
    """As many bytes, or those up to the end."""
    parts: list[bytes] = []
    while num_bytes and (part := file.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _signature(descriptor: int) -> tuple[int, ...]:
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
