"""Long work in slices, between which other requests' streams continue.

A thread alone is not enough: a call into C, such as `json.dumps` of a large answer, lets no other
thread run until it returns. In slices, each call returns within milliseconds.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from stu.common.text import escaped_line_ends

Result = TypeVar("Result")

SLICE_SECONDS = 0.005
MOST_VALUES, MOST_CONTAINERS = 4096, 64
"""Elements of a list that become text in one call: of numbers and strings, of lists and objects."""
PIECE_BYTES = 2**16
_COUNT = getattr(os, "process_cpu_count", os.cpu_count)  # as asyncio's executor counts them
MOST_THREADS = max(2, min(32, (_COUNT() or 1) + 4) // 2)
"""Threads that a client may use at once: half of asyncio's."""


class Threads:
    """Threads for long work. A client gets at most half of them, so that the bodies of others need
    not wait for all of its bodies."""

    def __init__(self) -> None:
        self._limits: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, client: str, work: Callable[..., Result], *args: Any) -> Result:
        """Return the result of `work`, called in a thread once the client may use one."""
        limit = self._limits.setdefault(client, asyncio.Semaphore(MOST_THREADS))
        async with limit:
            return await asyncio.to_thread(work, *args)


class Pauses:
    """Pauses of a task that computes for long without waiting for anything."""

    def __init__(self) -> None:
        self._resumed = time.monotonic()

    async def pause_if_due(self) -> None:
        """Let other tasks run if this one has run for `SLICE_SECONDS`."""
        if time.monotonic() - self._resumed > SLICE_SECONDS:
            await asyncio.sleep(0)
            self._resumed = time.monotonic()


def json_slices(value: Any) -> Iterator[str]:
    """Yield `value` as JSON, without spaces and ASCII escapes, in parts that each take a few
    milliseconds at most.

    Lists within lists are not divided, unless they are the only element. Raises ValueError for
    numbers that are not finite.
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
        if has_containers and len(value) == 1:
            yield "["
            yield from json_slices(value[0])
            yield "]"
            return
        count = MOST_CONTAINERS if has_containers else MOST_VALUES
        separator = "["
        for start in range(0, len(value), count):
            yield separator + _json(value[start : start + count])[1:-1]
            separator = ","
        yield "]"
    else:
        yield _json(value)


def sliced_line(value: Any) -> str:
    """Return `value` as JSON without any character that ends a line, for another thread."""
    return "".join(map(escaped_line_ends, json_slices(value)))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def pieces(texts: Iterator[str]) -> Iterator[bytes]:
    """Yield texts in UTF-8, joined into pieces of `PIECE_BYTES` or a little more."""
    piece = bytearray()
    for text in texts:
        piece += text.encode()
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)
