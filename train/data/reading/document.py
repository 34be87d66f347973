"""A document as it is read from a source, and input that cannot be read."""

from typing import NamedTuple

from train.data.reading.remote import InputFile

FIX = "name it with --text-key"


class Document(NamedTuple):
    """A text, or a piece of a text."""

    text: str
    source_bytes: int  # bytes of the file, compressed or not, that were read for it
    path: InputFile
    place: str = ""  # where in the file, such as "line 3"; empty for the file as a whole
    starts: bool = True  # False: continues the document before it
    ends: bool = True  # False: the next document continues it


class BadInput(Exception):
    """A row, or the rest of a file, that cannot be read.

    Args:
        path: The file.
        place: Where in the file, such as "line 3"; empty for the file as a whole.
        kind: Kind of error, by which errors are counted.
        reason: Explanation for the user.
    """

    def __init__(self, path: InputFile, place: str, kind: str, reason: str) -> None:
        super().__init__(f"{path}{place and ' '}{place}: {reason}")
        self.path, self.place, self.kind, self.reason = path, place, kind, reason
