"""A limit of the rows of a model that are decoded at once, which batches take turns at."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping

MOST_BYTES = 2**26
"""Limit of the bytes of rows of a model that are decoded at once. A single row may be larger."""


class Windows:
    """Windows of all models, so that rows of a model wait for none of another model and another
    batch. Rows of no model, which are refused, have a window of their own.

    Args:
        most_rows: Limits of rows, by the names of models, the one of rows that name none first.
        model_of: Returns the name of the model that the field `model` of a body stands for, or
            None if there is no such model.
    """

    def __init__(self, most_rows: Mapping[str, int], model_of: Callable[[str], str | None]) -> None:
        self._windows = {model: Window(model, most) for model, most in most_rows.items()}
        self._first = next(iter(self._windows.values()))
        self._of_none = Window("", max(most_rows.values()))
        self._model_of = model_of

    @property
    def are_of_several_models(self) -> bool:
        """Whether rows of one model could go on while those of another wait."""
        return len(self._windows) > 1

    def of(self, named: object) -> "Window":
        """Return the window of a row whose body has this `model`; None if it has none."""
        if named is None:
            return self._first
        model = self._model_of(named) if isinstance(named, str) else None
        return self._of_none if model is None else self._windows[model]


class Window:
    """Rows of a model that are decoded at once.

    Owners take turns, and so do the batches of an owner: they are served in the order in which they
    asked, and each asks for one row at a time.

    Args:
        model: Name of the model; empty for rows of none.
        most_rows: Limit of rows.
    """

    def __init__(self, model: str, most_rows: int) -> None:
        self.model, self._most_rows = model, most_rows
        self._num_rows = self._num_bytes = self._num_waiting = 0
        self._turn = asyncio.Lock()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._has_left = asyncio.Event()

    async def enter(self, owner: str, num_bytes: int) -> None:
        """Wait until a row of an owner may be decoded."""
        self._num_waiting += 1
        try:
            async with self._turns[owner], self._turn:
                while not self._has_room(num_bytes):
                    self._has_left.clear()
                    await self._has_left.wait()
                self._add(num_bytes)
        finally:
            self._num_waiting -= 1

    def try_enter(self, num_bytes: int) -> bool:
        """Let a row be decoded if that needs no waiting, and return whether it is."""
        if self._num_waiting or not self._has_room(num_bytes):
            return False
        self._add(num_bytes)
        return True

    def leave(self, num_bytes: int) -> None:
        """Note that a row has its result."""
        self._num_rows -= 1
        self._num_bytes -= num_bytes
        self._has_left.set()

    def _add(self, num_bytes: int) -> None:
        self._num_rows += 1
        self._num_bytes += num_bytes

    def _has_room(self, num_bytes: int) -> bool:
        is_small = self._num_bytes + num_bytes <= MOST_BYTES
        return self._num_rows == 0 or (self._num_rows < self._most_rows and is_small)
