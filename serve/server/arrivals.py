"""Outputs that a client has yet to take, within bounds."""

import asyncio
from collections.abc import Callable

from serve.request import Output
from serve.server.replicas.wire import PackedLogprobs

MOST_BYTES_BEHIND = 16 * 2**20
"""Memory of what one client has yet to read, beside what its socket holds."""
BYTES_OF_OUTPUT, BYTES_OF_TOKEN = 500, 8
"""Memory of an output without its tokens and log probabilities, about, and of a token."""


class EngineError(Exception):
    """An engine could not go on with a request."""


class BehindError(EngineError):
    """A client read so slowly that its connection was closed."""


class Arrivals:
    """Outputs that a reader has yet to take.

    cut_off: called with their memory, about, while it is too much. It returns whether the reader is
    cut off, and nothing more is kept for it.
    """

    def __init__(self, cut_off: Callable[[int], bool]) -> None:
        self._queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue()
        self._cut_off = cut_off
        self._is_cut_off = False
        self._num_bytes = 0

    def put(self, index: int, output: Output | Exception | None) -> None:
        """Add what came for choice `index`: an output, why there are no more, or their end."""
        if self._is_cut_off:
            return
        if self._num_bytes > MOST_BYTES_BEHIND and self._cut_off(self._num_bytes):
            self._is_cut_off = True
            while not self._queue.empty():
                self._queue.get_nowait()
            output = BehindError("the client reads too slowly")
        self._queue.put_nowait((index, output))
        self._num_bytes += _num_bytes(output)

    async def take(self) -> tuple[int, Output | Exception | None]:
        """Wait for the next one."""
        index, output = await self._queue.get()
        self._num_bytes -= _num_bytes(output)
        return index, output


def _num_bytes(output: Output | Exception | None) -> int:
    if not isinstance(output, Output):
        return 0
    packed = [output.logprobs, output.prompt_logprobs]
    of_logprobs = sum(its.num_bytes for its in packed if isinstance(its, PackedLogprobs))
    return BYTES_OF_OUTPUT + BYTES_OF_TOKEN * len(output.new_token_ids) + of_logprobs
