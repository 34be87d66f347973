"""A limit of the rows that are decoded at once, which batches take turns at."""

import asyncio
from collections import defaultdict

MOST_BYTES = 2**26
"""Limit of the bytes of rows that are decoded at once. A single row may be larger."""


class Window:
    """Rows that are decoded at once.

    Owners take turns, and so do the batches of an owner: they are served in the order in which they
    asked, and each asks for one row at a time.

    most_rows: Limit of rows.
    """

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._num_rows = self._num_bytes = 0
        self._turn = asyncio.Lock()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._has_left = asyncio.Event()

    async def enter(self, owner: str, num_bytes: int) -> None:
        """Wait until a row of an owner may be decoded."""
        async with self._turns[owner], self._turn:
            while not self._has_room(num_bytes):
                self._has_left.clear()
                await self._has_left.wait()
            self._num_rows += 1
            self._num_bytes += num_bytes

    def leave(self, num_bytes: int) -> None:
        """Note that a row has its result."""
        self._num_rows -= 1
        self._num_bytes -= num_bytes
        self._has_left.set()

    def _has_room(self, num_bytes: int) -> bool:
        is_small = self._num_bytes + num_bytes <= MOST_BYTES
        return self._num_rows == 0 or (self._num_rows < self._most_rows and is_small)
