"""Documents packed whole into rows, by best-fit decreasing.

The longest document goes first, and each goes into the fullest row that has room for it. Counts of
lengths are enough to see which lengths share a row, so that this takes about the same time for any
number of documents.

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.
"""

from bisect import bisect_left, insort
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.data.rows.starts import DocumentStarts

MOST_DOCUMENTS = 100_000
"""Documents by which a whole split is judged."""


class Pattern(NamedTuple):
    """Rows that hold documents of the same lengths."""

    num_rows: int
    parts: tuple[tuple[int, int], ...] = ()
    """Lengths, from the longest on, and how many documents of each a row holds."""


def best_fit(counts: NDArray[np.int64], row_tokens: int) -> list[Pattern]:
    """Pack documents into rows.

    counts: number of documents of each length, up to `row_tokens` at most, from length 0 on.
    """
    rows = _Rows()
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left and (room := rows.least_room(length)):
            patterns = rows.take(room)
            while patterns:
                pattern = patterns.pop()
                left = rows.fill(pattern, room, length, left)
        if left:
            new = Pattern(-(-left // (row_tokens // length)))
            rows.fill(new, row_tokens, length, left)
    return rows.patterns()


class _Rows:
    """Patterns by the room that is left in their rows."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # in order
        self._patterns: dict[int, list[Pattern]] = {}

    def least_room(self, length: int) -> int:
        """Return the least room that is not less than `length`, or 0."""
        place = bisect_left(self._rooms, length)
        return self._rooms[place] if place < len(self._rooms) else 0

    def take(self, room: int) -> list[Pattern]:
        """Remove and return the patterns that have this room."""
        del self._rooms[bisect_left(self._rooms, room)]
        return self._patterns.pop(room)

    def fill(self, pattern: Pattern, room: int, length: int, left: int) -> int:
        """Put documents of one length into rows that have some room, row by row, and return how
        many of the `left` ones are left then."""
        most = room // length
        num_full = min(pattern.num_rows, left // most)
        rest = left - num_full * most if num_full < pattern.num_rows else 0
        num_empty = pattern.num_rows - num_full - (rest > 0)
        for num_rows, count in ((num_full, most), (int(rest > 0), rest), (num_empty, 0)):
            if num_rows:
                parts = (*pattern.parts, (length, count)) if count else pattern.parts
                self._put(room - count * length, Pattern(num_rows, parts))
        return left - num_full * most - rest

    def patterns(self) -> list[Pattern]:
        """Return all patterns, from the fullest rows on."""
        return [pattern for room in sorted(self._patterns) for pattern in self._patterns[room]]

    def _put(self, room: int, pattern: Pattern) -> None:
        if room not in self._patterns:
            self._patterns[room] = []
            if room:
                insort(self._rooms, room)
        self._patterns[room].append(pattern)


class PackedRows:
    """Rows of `row_tokens` in which the documents of a split lie, by number.

    A document that is longer is cut into whole rows, and its rest is packed like a document. Which
    documents share a row depends on the split alone. It takes 4 bytes of memory for each document.
    """

    def __init__(self, starts: DocumentStarts, row_tokens: int) -> None:
        self._starts, self._row_tokens = starts, row_tokens
        lengths = np.diff(all_bounds(starts))
        whole, rests = lengths // row_tokens, lengths % row_tokens
        self._long = np.flatnonzero(whole)  # documents that fill rows alone
        self._whole = np.append(0, whole[self._long].cumsum())
        counts = np.bincount(rests, minlength=row_tokens)
        index = np.int32 if len(starts) < 2**31 else np.int64
        self._by_rest = rests.argsort(kind="stable").astype(index)
        next_place = counts.cumsum() - counts  # of the documents of each length, in `_by_rest`
        counts[0] = 0
        patterns = best_fit(counts, row_tokens)
        self._parts: list[list[tuple[int, int, int]]] = []  # length, documents, place of the first
        for pattern in patterns:
            own = []
            for length, count in pattern.parts:
                own.append((length, count, int(next_place[length])))
                next_place[length] += pattern.num_rows * count
            self._parts.append(own)
        num_rows = (pattern.num_rows for pattern in patterns)
        self._firsts = np.array([*accumulate(num_rows, initial=int(self._whole[-1]))])

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._firsts[-1])

    def __getitem__(self, number: int) -> list[tuple[int, int]]:
        """Return where each document of a row begins in the split, and its tokens in the row."""
        if number < self._whole[-1]:
            place = int(np.searchsorted(self._whole, number, side="right")) - 1
            (start,) = self._starts.at(self._long[place : place + 1]).tolist()
            start += int(number - self._whole[place]) * self._row_tokens
            return [(start, self._row_tokens)]
        pattern = int(np.searchsorted(self._firsts, number, side="right")) - 1
        row = number - int(self._firsts[pattern])
        found = []
        for length, count, first in self._parts[pattern]:
            place = first + row * count
            documents = self._by_rest[place : place + count].astype(np.int64)
            ends = self._starts.at(documents + 1).tolist()
            found += [(end - length, length) for end in ends]
        return found


def all_bounds(starts: DocumentStarts) -> NDArray[np.int64]:
    """Return where each document begins, and where the last one ends."""
    return starts.at(np.arange(len(starts) + 1))


def first_bounds(starts: DocumentStarts) -> NDArray[np.int64]:
    """Return the bounds of the first documents, by which a split can be judged."""
    return starts.at(np.arange(min(MOST_DOCUMENTS, len(starts)) + 1))


def context_of_tokens(starts: DocumentStarts, row_tokens: int) -> int:
    """Return the length of the document in which an average token lies, without what rows cut
    off."""
    lengths = np.diff(first_bounds(starts))
    squares = (lengths // row_tokens).sum() * row_tokens**2
    squares += np.square(lengths % row_tokens).sum()
    return max(1, round(float(squares / lengths.sum())))


def effects(starts: DocumentStarts, row_tokens: int) -> str:
    """Return words on what rows do to documents, in either way of laying them into rows."""
    bounds = first_bounds(starts)
    cut = shares_of_cutting(bounds - bounds[0], row_tokens)
    return f"cut: {cut}; best_fit: {shares_of_packing(bounds, row_tokens)}"


class Shares(NamedTuple):
    """Effects of a way to lay documents into rows."""

    cut: float
    """Share of the documents that are cut."""
    without_beginning: float
    """Share of the tokens that follow a cut, so that a model does not see how their document
    begins."""
    padding: float
    """Share of padding in the rows."""

    def __str__(self) -> str:
        return (
            f"{self.cut:.1%} of the documents are cut, {self.without_beginning:.1%} of the tokens "
            f"follow a cut, {self.padding:.1%} of the rows are padding"
        )


def shares_of_cutting(bounds: NDArray[np.int64], row_tokens: int) -> Shares:
    """Return the effects of cutting documents, which lie between `bounds`, into rows of consecutive
    tokens from 0 on."""
    begins, ends = bounds[:-1], bounds[1:]
    next_row = (begins // row_tokens + 1) * row_tokens
    return _shares(bounds, np.maximum(0, ends - next_row), 0.0)


def shares_of_packing(bounds: NDArray[np.int64], row_tokens: int) -> Shares:
    """Return the effects of packing documents, which lie between `bounds` (`PackedRows`)."""
    lengths = np.diff(bounds)
    counts = np.bincount(lengths % row_tokens)
    counts[0] = 0
    num_rows = (lengths // row_tokens).sum() + sum(p.num_rows for p in best_fit(counts, row_tokens))
    padding = 1 - lengths.sum() / (num_rows * row_tokens)
    return _shares(bounds, np.maximum(0, lengths - row_tokens), float(padding))


def _shares(bounds: NDArray[np.int64], behind: NDArray[np.int64], padding: float) -> Shares:
    """behind: tokens of each document that follow a cut."""
    total = bounds[-1] - bounds[0]
    return Shares(float((behind > 0).mean()), float(behind.sum() / total), padding)
