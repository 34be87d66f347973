"""Token shards: a folder of raw token files, the tokenizer that made them, and an index.

```
DIR/index.json                 Index: what is here and how it was made
DIR/tokenizer.model
DIR/parts.json                 of a folder made in parts: what these had in common
DIR/skipped.jsonl              of rows that could not be read, the first ones (`--on-error skip`)
DIR/train-00000.bin ...        little-endian unsigned integers, documents as BOS tokens EOS
DIR/validation-00000.bin ...
```
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stu.common.files import new_file

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.model"
TOKEN_DTYPES = ("uint16", "uint32")
WRITE_BUFFER_BYTES = 1 << 20
FINGERPRINT_PIECES, FINGERPRINT_TOKENS = 256, 1024


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    num_tokens: int
    num_documents: int
    sha256: str = ""
    """The file's checksum; empty in folders that an older stu-prepare made."""


@dataclass(frozen=True)
class Split:
    """One side of the corpus, `train` or `validation`: its shards in order, and their totals."""

    num_tokens: int
    """BOS and EOS of every document included."""
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the documents' text."""
    shards: list[Shard]


@dataclass(frozen=True)
class Index:
    """The contents of a folder of token shards, as `index.json` holds them."""

    dtype: str
    """Of the tokens in the files: `uint16` or `uint32`."""
    tokenizer_sha256: str
    vocab_size: int
    seed: int
    validation_fraction: float
    sources: list[str]
    num_skipped_files: int
    num_empty_documents: int
    splits: dict[str, Split]
    num_hidden_files: int = 0
    """Files and folders of the sources whose names begin with a dot, which were not read."""
    num_repeated_files: int = 0
    """Paths of files that were read by another path."""
    num_bad_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows, and rests of files, that could not be read, by what was wrong (`--on-error skip`)."""
    format_version: int = FORMAT_VERSION

    @property
    def num_documents(self) -> dict[str, int]:
        """Of each split."""
        return {name: split.num_documents for name, split in self.splits.items()}

    @property
    def num_read(self) -> int:
        """Documents that were read: those of both splits, and the empty ones."""
        return sum(self.num_documents.values()) + self.num_empty_documents

    def save(self, folder: Path) -> None:
        """Write `index.json`, whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        with new_file(folder / INDEX_FILE) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """Raises ValueError if `folder` has no index that this version can read."""
        path = folder / INDEX_FILE
        if not path.is_file():
            raise ValueError(f"{folder}: no {INDEX_FILE}; make token shards with stu-prepare")
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
            raise ValueError(f"{path}: not an index of token shards ({error!r})") from error


def shard_file(split: str, number: int) -> str:
    """Name of the file with the tokens of shard `number` of a split."""
    return f"{split}-{number:05d}.bin"


class SplitWriter:
    """Writes the shards of one split, document by document.

    A shard holds whole documents, or whole pieces of those that come in pieces: at most
    `shard_tokens` tokens unless one is longer.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype.newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._num_bytes = 0
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, tokens: NDArray[Any], num_bytes: int, starts: bool = True) -> None:
        """Append one document of `tokens` (BOS and EOS included) made of `num_bytes` of text.

        starts: False for what goes on with the document before.
        """
        if self._file is None or self._shards[-1].num_tokens + len(tokens) > self._shard_tokens:
            self._next_shard()
        assert self._file is not None
        contents = tokens.astype(self._dtype).tobytes()
        self._file.write(contents)
        self._sha256.update(contents)
        self._num_bytes += num_bytes
        last = self._shards[-1]
        num_documents = last.num_documents + starts
        self._shards[-1] = Shard(last.file, last.num_tokens + len(tokens), num_documents)

    def finish(self) -> Split:
        self._finish_shard()
        num_tokens = sum(shard.num_tokens for shard in self._shards)
        num_documents = sum(shard.num_documents for shard in self._shards)
        return Split(num_tokens, num_documents, self._num_bytes, self._shards)

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            checksum = self._sha256.hexdigest()
            self._shards[-1] = dataclasses.replace(self._shards[-1], sha256=checksum)

    def _next_shard(self) -> None:
        self._finish_shard()
        self._sha256 = hashlib.sha256()
        name = shard_file(self._split, len(self._shards))
        self._file = (self._folder / name).open("wb", buffering=WRITE_BUFFER_BYTES)
        self._shards.append(Shard(name, 0, 0))


class TokenShards:
    """The tokens of one split as one long sequence, memory-mapped.

    Raises ValueError if the folder is not what its index says: a shard missing or of another size,
    another tokenizer.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = Path(folder)
        self.index = Index.load(self.folder)
        if split not in self.index.splits:
            raise ValueError(f"{folder}: no split {split!r}, only {', '.join(self.index.splits)}")
        self.split = self.index.splits[split]
        self._check_tokenizer()
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        self._shards = [self._open(shard, dtype) for shard in self.split.shards]
        # [shards + 1]: the position in the whole sequence at which each shard starts
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def __len__(self) -> int:
        """Tokens in the split."""
        return self.split.num_tokens

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER_FILE

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start` to `stop - 1`, across shards: `[stop - start]`.

        Raises IndexError unless `0 <= start <= stop <= len(self)`.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        tokens = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled = 0
        while filled < len(tokens):
            begin = start + filled - int(self._starts[shard])
            part = self._shards[shard][begin : begin + len(tokens) - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return tokens

    def fingerprint(self) -> str:
        """Return a hash that tells these tokens from others of the same number: of the checksums
        in the index, and of pieces of the files, spread over all of them."""
        digest = hashlib.sha256("".join(shard.sha256 for shard in self.split.shards).encode())
        step = max(FINGERPRINT_TOKENS, len(self) // FINGERPRINT_PIECES)
        for start in range(0, len(self), step):
            stop = min(start + FINGERPRINT_TOKENS, len(self))
            digest.update(self.read(start, stop).astype("<u4").tobytes())
        return digest.hexdigest()

    def _check_tokenizer(self) -> None:
        if not self.tokenizer_path.is_file():
            raise ValueError(f"{self.tokenizer_path}: no such file; run stu-prepare again")
        sha256 = hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest()
        if sha256 != self.index.tokenizer_sha256:
            raise ValueError(
                f"{self.tokenizer_path}: not the tokenizer that made these shards (sha256 "
                f"{sha256}, expected {self.index.tokenizer_sha256}); run stu-prepare again"
            )

    def _open(self, shard: Shard, dtype: np.dtype[Any]) -> NDArray[Any]:
        path = self.folder / shard.file
        size = path.stat().st_size if path.is_file() else 0
        expected = shard.num_tokens * dtype.itemsize
        if size != expected:
            raise ValueError(
                f"{path}: {size} bytes, expected {expected}; copy it or run stu-prepare again"
            )
        return np.memmap(path, dtype=dtype, mode="r")
