"""Long work in slices, so that other requests' streams go on meanwhile.

A thread alone does not do: a call into C, such as `json.dumps` of a large answer, lets no other
thread run before it returns. In slices it returns every few milliseconds.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakValueDictionary

Result = TypeVar("Result")

SLICE_SECONDS = 0.005
MOST_VALUES, MOST_CONTAINERS = 4096, 64
"""Elements of a list that become text in one call: numbers and strings, or lists and objects."""
PIECE_BYTES = 2**16
MOST_THREADS = max(2, min(32, (os.cpu_count() or 1) + 4) // 2)
"""Threads that one client may use at once: half of those that asyncio has."""


class Threads:
    """Threads for long work, of which one client has half at most: the bodies of others need not
    wait until all of its bodies are done."""

    def __init__(self) -> None:
        self._limits: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, client: str, work: Callable[..., Result], *given: Any) -> Result:
        """Return what `work` gives, called in a thread once the client may have one."""
        limit = self._limits.setdefault(client, asyncio.Semaphore(MOST_THREADS))
        async with limit:
            return await asyncio.to_thread(work, *given)


class Pauses:
    """Pauses of a task that has much to do without waiting for anything."""

    def __init__(self) -> None:
        self._resumed = time.monotonic()

    async def pause_if_due(self) -> None:
        """Let other tasks run if this one has run for `SLICE_SECONDS`."""
        if time.monotonic() - self._resumed > SLICE_SECONDS:
            await asyncio.sleep(0)
            self._resumed = time.monotonic()


def json_slices(value: Any) -> Iterator[str]:
    """Yield the text that `json.dumps` gives of `value`, without spaces and beyond ASCII as it is,
    in parts that each take a few milliseconds at most.

    Lists within lists are not divided. Raises ValueError for numbers that are not finite.
    """
    if isinstance(value, dict) and value:
        separator = "{"
        for key, element in value.items():
            yield f"{separator}{_json(key)}:"
            yield from json_slices(element)
            separator = ","
        yield "}"
    elif isinstance(value, list) and value:
        has_containers = isinstance(value[-1], dict | list)
        count = MOST_CONTAINERS if has_containers else MOST_VALUES
        separator = "["
        for start in range(0, len(value), count):
            yield separator + _json(value[start : start + count])[1:-1]
            separator = ","
        yield "]"
    else:
        yield _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def pieces(texts: Iterator[str]) -> Iterator[bytes]:
    """Yield texts in UTF-8, joined to pieces of `PIECE_BYTES` or a little more."""
    piece = bytearray()
    for text in texts:
        piece += text.encode()
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)
