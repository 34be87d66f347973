"""Token shards: a folder of raw token files, the tokenizer that made them, and an index.

```
DIR/index.json                 contents of the folder, and the settings it was made with (`Index`)
DIR/tokenizer.model            or the files of another tokenizer (`stu.tokenizer`)
DIR/parts.json                 settings that all parts had in common, if it was made in parts
DIR/skipped.jsonl              the first rows that could not be read (`--on-error skip`)
DIR/train-00000.bin ...        documents, each BOS tokens EOS, as little-endian unsigned integers;
                               without EOS if that is the same token as BOS
DIR/train-00000.starts ...     where documents begin in them (`train.data.rows.starts`)
DIR/validation-00000.bin ...
DIR/chat_template.jinja        of conversations: the template that wrote them
DIR/train.answers ...          of conversations: a byte for each token, 1 if an answer has it
```
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stu.common.errors import UserError
from stu.common.files import new_file
from stu.tokenizer import files_sha256, find_tokenizer, read_tokenizer, tokenizer_files
from train.data.rows.starts import DocumentStarts, write_starts

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
TOKEN_DTYPES = ("uint16", "uint32")
WRITE_BUFFER_BYTES = 1 << 20
ANSWERS_SUFFIX = ".answers"
FINGERPRINT_PIECES, FINGERPRINT_TOKENS = 256, 1024


@dataclass(frozen=True)
class Shard:
    """A file of tokens."""

    file: str
    num_tokens: int
    num_documents: int
    sha256: str = ""
    """Checksum of the file; empty in folders made by an older stu-prepare."""


@dataclass(frozen=True)
class Split:
    """Shards of the split `train` or `validation`, in order, and their totals."""

    num_tokens: int
    """Tokens, including BOS and EOS of every document."""
    num_documents: int
    num_bytes: int
    """Bytes of the documents' text in UTF-8."""
    shards: list[Shard]


@dataclass(frozen=True)
class Index:
    """Contents of a folder of token shards, as in `index.json`."""

    dtype: str
    """Type of the tokens in the files: `uint16` or `uint32`."""
    tokenizer_sha256: str
    vocab_size: int
    seed: int
    validation_fraction: float
    sources: list[str]
    num_skipped_files: int
    num_empty_documents: int
    splits: dict[str, Split]
    num_hidden_files: int = 0
    """Files and folders in the sources that were not read because their names begin with a dot."""
    num_repeated_files: int = 0
    """Paths that lead to a file already read by another path."""
    num_bad_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows, and rests of files, that could not be read, by kind of error (`--on-error skip`)."""
    chat_seq_len: int = 0
    """Tokens of each row, if the documents are conversations, packed into rows."""
    answers_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    """Checksums of the files of answers by split, for conversations."""
    format_version: int = FORMAT_VERSION

    @property
    def num_documents(self) -> dict[str, int]:
        """Documents in each split."""
        return {name: split.num_documents for name, split in self.splits.items()}

    @property
    def num_read(self) -> int:
        """Documents that were read, including empty ones."""
        return sum(self.num_documents.values()) + self.num_empty_documents

    def save(self, folder: Path) -> None:
        """Write `index.json` atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        with new_file(folder / INDEX_FILE) as temporary:
            # Names of files may not be UTF-8.
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """Read `index.json`. Raises UserError if this version cannot read it."""
        path = folder / INDEX_FILE
        if not path.is_file():
            raise _unusable(folder, f"no {INDEX_FILE}; make token shards with stu-prepare")
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if data["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"format_version {data['format_version']}, this program reads {FORMAT_VERSION}"
                )
            if data["dtype"] not in TOKEN_DTYPES:
                raise ValueError(f"dtype {data['dtype']!r}, expected {' or '.join(TOKEN_DTYPES)}")
            splits = {
                name: Split(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
                for name, split in data.pop("splits").items()
            }
            return cls(splits=splits, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unusable(path, f"not an index of token shards ({error!r})") from error


def shard_file(split: str, number: int) -> str:
    """Return the file name of shard `number` of a split."""
    return f"{split}-{number:05d}.bin"


class SplitWriter:
    """Writer of the shards of one split, document by document.

    A shard holds whole documents, or whole pieces of documents that come in pieces. It has at most
    `shard_tokens` tokens, unless its only document is longer.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype.newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._num_bytes = 0
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._starts: list[int] = []  # of documents in the last shard
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, tokens: NDArray[Any], num_bytes: int, starts: bool = True) -> None:
        """Append a document of `tokens`, including BOS and EOS, from `num_bytes` of text.

        starts: False for a piece that continues the document before it.
        """
        if self._file is None or self._shards[-1].num_tokens + len(tokens) > self._shard_tokens:
            self._next_shard()
        assert self._file is not None
        contents = tokens.astype(self._dtype).tobytes()
        self._file.write(contents)
        self._sha256.update(contents)
        self._num_bytes += num_bytes
        last = self._shards[-1]
        if starts:
            self._starts.append(last.num_tokens)
        num_documents = last.num_documents + starts
        self._shards[-1] = Shard(last.file, last.num_tokens + len(tokens), num_documents)

    def finish(self) -> Split:
        """Close the last shard, and return the shards and their totals."""
        self._finish_shard()
        num_tokens = sum(shard.num_tokens for shard in self._shards)
        num_documents = sum(shard.num_documents for shard in self._shards)
        return Split(num_tokens, num_documents, self._num_bytes, self._shards)

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            checksum = self._sha256.hexdigest()
            self._shards[-1] = dataclasses.replace(self._shards[-1], sha256=checksum)
            write_starts(self._folder / self._shards[-1].file, self._starts)

    def _next_shard(self) -> None:
        self._finish_shard()
        self._starts, self._sha256 = [], hashlib.sha256()
        name = shard_file(self._split, len(self._shards))
        self._file = (self._folder / name).open("wb", buffering=WRITE_BUFFER_BYTES)
        self._shards.append(Shard(name, 0, 0))


class TokenShards:
    """Tokens of one split as one long sequence, memory-mapped.

    Raises UserError if the folder differs from its index: a shard is missing or has another size,
    or the tokenizer is a different one.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = Path(folder)
        self.index = Index.load(self.folder)
        if split not in self.index.splits:
            splits = ", ".join(self.index.splits)
            raise _unusable(self.folder, f"no split {split!r}, only {splits}")
        self._name, self.split = split, self.index.splits[split]
        self._check_tokenizer()
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        self._shards = [
            self._open(self.folder / shard.file, shard.num_tokens, dtype)
            for shard in self.split.shards
        ]
        # [shards + 1]: the position in the whole sequence at which each shard starts
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.answers: NDArray[np.uint8] | None = None
        """Whether each token belongs to an answer: `[len(self)]`, only of conversations."""
        if self.index.chat_seq_len:
            file = self.folder / f"{split}{ANSWERS_SUFFIX}"
            self.answers = self._open(file, len(self), np.dtype(np.uint8))

    def __len__(self) -> int:
        """Return the number of tokens in the split."""
        return self.split.num_tokens

    @property
    def tokenizer_path(self) -> Path:
        """Main file of the tokenizer."""
        return find_tokenizer(self.folder)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens `start` to `stop - 1`, which may lie in several shards: `[stop - start]`.

        Raises IndexError unless `0 <= start <= stop <= len(self)`.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        tokens = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled = 0
        while filled < len(tokens):
            begin = start + filled - int(self._starts[shard])
            found = self._shards[shard][begin : begin + len(tokens) - filled]
            tokens[filled : filled + len(found)] = found
            filled += len(found)
            shard += 1
        return tokens

    @cached_property
    def documents(self) -> DocumentStarts:
        """Where documents begin; raises UserError if that cannot be told."""
        paths = [self.folder / shard.file for shard in self.split.shards]
        counts = [shard.num_documents for shard in self.split.shards]
        tokenizer = partial(read_tokenizer, self.tokenizer_path)
        return DocumentStarts.open(paths, self._shards, counts, tokenizer)

    def fingerprint(self) -> str:
        """Return a hash of the checksums in the index and of samples of tokens from all files.

        It detects other tokens of the same number without reading all of them.
        """
        sums = [shard.sha256 for shard in self.split.shards]
        sums.append(self.index.answers_sha256.get(self._name, ""))
        digest = hashlib.sha256("".join(sums).encode())
        step = max(FINGERPRINT_TOKENS, len(self) // FINGERPRINT_PIECES)
        for start in range(0, len(self), step):
            stop = min(start + FINGERPRINT_TOKENS, len(self))
            digest.update(self.read(start, stop).astype("<u4").tobytes())
        return digest.hexdigest()

    def _check_tokenizer(self) -> None:
        try:
            sha256 = files_sha256(tokenizer_files(self.folder))
        except UserError as error:
            raise _unusable(self.folder, f"{error}; run stu-prepare again") from error
        if sha256 != self.index.tokenizer_sha256:
            raise _unusable(
                self.tokenizer_path,
                f"not the tokenizer that made these shards (sha256 {sha256}, expected "
                f"{self.index.tokenizer_sha256}); run stu-prepare again",
            )

    def _open(self, path: Path, num_tokens: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        size = path.stat().st_size if path.is_file() else 0
        expected = num_tokens * dtype.itemsize
        if size != expected:
            reason = f"{size} bytes, expected {expected}; copy it or run stu-prepare again"
            raise _unusable(path, reason)
        return np.memmap(path, dtype=dtype, mode="r")


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(str(path), message=f"{path}: {reason}")
