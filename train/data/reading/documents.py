"""Documents of sources of every kind."""

from collections.abc import Iterator, Sequence

from train.data.reading.columns import read_arrow, read_parquet
from train.data.reading.document import BadInput, Document
from train.data.reading.opened import OpenedFile, decode
from train.data.reading.remote import InputFile, size_of
from train.data.reading.rows import read_csv, read_json_lines
from train.data.reading.sources import MOST_PIECE_BYTES, kind_of, read_python


def read_documents(
    files: Sequence[InputFile],
    text_key: str = "text",
    piece_bytes: int = MOST_PIECE_BYTES,
    kind: str | None = None,
) -> Iterator[Document | BadInput]:
    """Yield the documents of `files` in order: text and Python files, and rows of other files.

    A row whose text is null is an empty document. A text file of more than `piece_bytes` comes in
    pieces of at most that size, cut at blank lines, else at line ends, else between characters. A
    row, or the rest of a file, that cannot be read comes as BadInput. Only a few documents are in
    memory at a time.

    Args:
        files: Files to read.
        text_key: Field or column that holds a row's text; `a.b` is field `b` in field `a`. Empty
            for the whole row of JSON.
        piece_bytes: Largest piece of a text file.
        kind: Kind of all files; None: by their names.

    Raises UserError if a library is missing.
    """
    for path in files:
        yield from _read_file(path, text_key, piece_bytes, kind or kind_of(path))


def _read_file(
    path: InputFile, text_key: str, piece_bytes: int, kind: str | None
) -> Iterator[Document | BadInput]:
    try:
        if kind == "parquet":
            yield from read_parquet(path, text_key)
        elif kind == "arrow":
            yield from read_arrow(path, text_key)
        elif kind is None:  # Python, of which kind_of knows nothing as folders leave it out
            yield Document(read_python(path), size_of(path), path)
        else:
            with path.open("rb") as file:
                opened = OpenedFile(path, file)
                if kind == "text":
                    yield from _read_text(opened, piece_bytes)
                elif kind == "csv":
                    yield from read_csv(opened, text_key)
                else:
                    yield from read_json_lines(opened, text_key)
    except BadInput as error:  # the rest of the file is lost
        yield error


def _read_text(source: OpenedFile, piece_bytes: int) -> Iterator[Document | BadInput]:
    held, offset, starts = b"", 0, True
    while True:
        held += source.read(piece_bytes + 1 - len(held))
        ends = len(held) <= piece_bytes
        cut = len(held) if ends else _cut(held, piece_bytes)
        piece, held = held[:cut], held[cut:]
        text = decode(piece, source.path, "", offset)
        if isinstance(text, BadInput):
            yield text
            starts = True
        else:
            if not offset:
                text = text.removeprefix("\ufeff")
            place = f"from byte {offset}" if offset else ""
            yield Document(text, source.used(), source.path, place, starts, ends)
            starts = False
        offset += cut
        if ends:
            return


def _cut(data: bytes, size: int) -> int:
    """Return where to end a piece of at most `size` bytes.

    It ends after a blank line in the second half, else after a line, else after a character.
    """
    for ending in (b"\n\n", b"\n\r\n", b"\n"):
        if (found := data.rfind(ending, size // 2 if ending != b"\n" else 0, size)) >= 0:
            return found + len(ending)
    cut = size
    while cut > size - 4 and data[cut] & 0xC0 == 0x80:  # within a character
        cut -= 1
    return cut or size
