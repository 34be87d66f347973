"""Places in token shards where documents begin.

```
DIR/train-00000.starts ...     positions in train-00000.bin, as little-endian int64, in order
```

A shard may begin with the rest of a document of the shard before it. Folders made by an older
stu-prepare have no such files; there, the tokens that mark documents tell.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stu.common.errors import UserError
from stu.tokenizer import Tokenizer

SUFFIX = ".starts"
DTYPE = np.dtype("<i8")
BLOCK_TOKENS = 1 << 24


def starts_file(shard: Path) -> Path:
    """Return the path of the file for the tokens in `shard`."""
    return shard.with_suffix(SUFFIX)


def write_starts(shard: Path, starts: Sequence[int]) -> None:
    """Write where documents begin in a shard."""
    np.asarray(starts, dtype=DTYPE).tofile(starts_file(shard))


def read_starts(shard: Path, num_documents: int) -> NDArray[np.int64] | None:
    """Map the positions at which documents begin in a shard; None if there is no file.

    Raises UserError if the file has another size.
    """
    path = starts_file(shard)
    if not path.is_file():
        return None
    size, expected = path.stat().st_size, num_documents * DTYPE.itemsize
    if size != expected:
        reason = f"{size} bytes, expected {expected}; copy it or run stu-prepare again"
        raise UserError(str(path), message=f"{path}: {reason}")
    return np.memmap(path, dtype=DTYPE, mode="r") if size else np.zeros(0, dtype=DTYPE)


def find_starts(
    shard: Path, tokens: NDArray[Any], num_documents: int, tokenizer: Tokenizer
) -> NDArray[np.int64]:
    """Find the positions at which documents begin by the tokens that mark documents.

    Raises UserError if they do not mark `num_documents`.
    """
    if tokenizer.start_ids:
        starts = _places(tokens, tokenizer.start_ids[0])
    elif tokenizer.end_ids:
        starts = np.append(0, _places(tokens, tokenizer.end_ids[-1]) + 1)
        starts = starts[starts < len(tokens)]
    else:
        starts = np.zeros(0, dtype=DTYPE)
    if len(starts) != num_documents:
        raise UserError(
            str(shard),
            message=f"{shard}: its tokens mark {len(starts):,} documents, and it has "
            f"{num_documents:,}; run stu-prepare again, which notes where documents begin",
        )
    return starts


def _places(tokens: NDArray[Any], token: int) -> NDArray[np.int64]:
    found = [
        start + np.flatnonzero(tokens[start : start + BLOCK_TOKENS] == token)
        for start in range(0, len(tokens), BLOCK_TOKENS)
    ]
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


class DocumentStarts:
    """Positions in a split at which its documents begin.

    Args:
        parts: Positions in each shard.
        offsets: Position of each shard in the split.
        num_tokens: Tokens of the split.
    """

    def __init__(
        self, parts: Sequence[NDArray[np.int64]], offsets: Sequence[int], num_tokens: int
    ) -> None:
        self._parts, self._offsets, self._num_tokens = parts, np.asarray(offsets), num_tokens
        self._numbers = np.cumsum([0, *map(len, parts)])

    @classmethod
    def open(
        cls,
        shards: Sequence[Path],
        tokens: Sequence[NDArray[Any]],
        num_documents: Sequence[int],
        tokenizer: Callable[[], Tokenizer],
    ) -> "DocumentStarts":
        """Read where documents begin from the files beside the shards of a split, or else find it
        by their tokens, all of which are read then.

        Raises UserError if that cannot be told.
        """
        parts = []
        for path, own, count in zip(shards, tokens, num_documents, strict=True):
            starts = read_starts(path, count)
            parts.append(find_starts(path, own, count, tokenizer()) if starts is None else starts)
        ends = np.cumsum([0, *map(len, tokens)]).tolist()
        return cls(parts, ends[:-1], ends[-1])

    def __len__(self) -> int:
        """Return the number of documents."""
        return int(self._numbers[-1])

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the positions from `start` to `stop - 1` at which documents begin."""
        first = max(0, int(np.searchsorted(self._offsets, start, side="right")) - 1)
        last = int(np.searchsorted(self._offsets, stop))
        found = [np.zeros(0, dtype=np.int64)]
        for part, offset in zip(
            self._parts[first:last], self._offsets[first:last].tolist(), strict=True
        ):
            begin, end = np.searchsorted(part, [start - offset, stop - offset])
            found.append(part[begin:end] + offset)
        return np.concatenate(found)

    def at(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the documents of these numbers begin; the one after the last, where the
        split ends."""
        places = np.full(len(numbers), self._num_tokens)
        parts = np.searchsorted(self._numbers, numbers, side="right") - 1
        for part in np.unique(parts[numbers < len(self)]).tolist():
            own = parts == part
            within = numbers[own] - self._numbers[part]
            places[own] = self._parts[part][within] + self._offsets[part]
        return places

    def lengths(self, start: int, stop: int) -> list[int]:
        """Return the tokens of each document, or part of one, from `start` to `stop - 1`."""
        inner = self.between(start + 1, stop)
        lengths: list[int] = np.diff(inner, prepend=start, append=stop).tolist()
        return lengths
