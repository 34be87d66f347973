"""Clocks of the rows of a cache, whose pages are aligned to them.

Rows step together, and where their clocks agree their slots are next to each other, so that slices
reach them at once. A row that has taken several tokens in a step is ahead of the others from then
on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """Consecutive rows whose clocks agree."""

    places: slice
    """Their places among the rows of the batch, or a part of it."""
    rows: slice
    ahead: int
    """Steps by which they are ahead."""


class RowClocks:
    """The time that all rows have in common, and by how much some are ahead of it.

    Args:
        max_rows: Number of rows.
    """

    def __init__(self, max_rows: int) -> None:
        self.time = 0
        """Time of a row that is not ahead, in steps."""
        self._ahead = np.zeros(max_rows, dtype=np.int64)

    def of(self, row: int) -> int:
        """Return the time of a row."""
        return self.time + int(self._ahead[row])

    def ahead(self, row: int) -> int:
        """Return the steps by which a row is ahead."""
        return int(self._ahead[row])

    def start(self, row: int, ahead: int = 0) -> None:
        """Start the clock of a row that joins the batch."""
        self._ahead[row] = ahead

    def move(self, row: int, steps: int) -> None:
        """Let a row get ahead by some steps."""
        self._ahead[row] += steps

    def align(self, rows: Sequence[int]) -> None:
        """Move the common time to that of the last of `rows`, all of the batch."""
        if rows:
            own = list(rows)
            least = int(self._ahead[own].min())
            self.time += least
            self._ahead[own] -= least

    def agree(self, rows: Sequence[int]) -> bool:
        """Return whether no row is ahead."""
        return not self._ahead[list(rows)].any()

    def runs(self, rows: Sequence[int]) -> list[Run]:
        """Divide rows in ascending order into runs, so that slices reach them."""
        clocks = [(row - place, self.ahead(row)) for place, row in enumerate(rows)]
        starts = [i for i, clock in enumerate(clocks) if i == 0 or clock != clocks[i - 1]]
        ends = [*starts, len(rows)][1:]
        return [
            Run(slice(start, stop), slice(rows[start], rows[stop - 1] + 1), self.ahead(rows[start]))
            for start, stop in zip(starts, ends, strict=True)
        ]
