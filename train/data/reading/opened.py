"""Open files of sources: decompressed while they are read, with errors that say where."""

from collections.abc import Iterator
from typing import BinaryIO

from stu.common.compressed import open_decompressed
from stu.common.errors import UserError
from train.data.reading.document import BadInput
from train.data.reading.remote import InputFile

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class OpenedFile:
    """An open file, decompressed while it is read. Methods raise BadInput if it is damaged."""

    def __init__(self, path: InputFile, file: BinaryIO) -> None:
        self.path, self._file, self._used = path, file, 0
        try:
            self.data = open_decompressed(file, str(path))
        except UserError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            raise damaged(path, "", error) from error

    def used(self) -> int:
        """Return the bytes of the file, compressed or not, that were read since the last call."""
        before, self._used = self._used, self._file.tell()
        return self._used - before

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        try:
            return self.data.read(size)
        except UserError as error:
            raise damaged(self.path, "", error) from error

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield lines and their numbers, from 1."""
        number = 1
        try:
            while line := self.data.readline():
                yield number, line
                number += 1
        except UserError as error:
            raise damaged(self.path, f"line {number}", error) from error


def damaged(path: InputFile, place: str, error: UserError) -> BadInput:
    """Return what to raise for an error of decompression at a place in a file."""
    return BadInput(path, place, "damaged archive", str(error).removeprefix(f"{path}: "))


def decode(data: bytes, path: InputFile, place: str, offset: int) -> str | BadInput:
    """Decode UTF-8 that starts `offset` bytes into the text of `path`, at `place`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if not offset and data[:2] in UTF16_MARKS else "LATIN1"
        return BadInput(
            path,
            place,
            "not UTF-8",
            f"not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file, for "
            f"example with `iconv -f {encoding} -t UTF-8`, or skip such text with --on-error skip",
        )
