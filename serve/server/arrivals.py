"""A bounded queue of outputs that a client has yet to take."""

import asyncio
from collections.abc import Callable

from serve.request import Output
from serve.server.replicas.stream import EngineError
from serve.wire import PackedLogprobs

MOST_BYTES_BEHIND = 16 * 2**20
"""Limit of the memory that outputs for one client take, without those in its socket."""
BYTES_OF_OUTPUT, BYTES_OF_TOKEN = 500, 8
"""Approximate memory of an output without tokens and log probabilities, and of a token."""


class BehindError(EngineError):
    """A client took outputs so slowly that its connection was closed."""


class Arrivals:
    """Outputs of all choices of a body that a client has yet to take.

    Args:
        cut_off: Called with their approximate memory in bytes when that is over the limit. It
            returns whether the client is cut off; if so, nothing more is kept for it.
    """

    def __init__(self, cut_off: Callable[[int], bool]) -> None:
        self._queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue()
        self._cut_off = cut_off
        self._is_cut_off = False
        self._num_bytes = 0

    def put(self, index: int, output: Output | Exception | None) -> None:
        """Add an output of choice `index`, the error that ended it, or None at its end."""
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
        """Wait for the next one, and return it with the index of its choice."""
        index, output = await self._queue.get()
        self._num_bytes -= _num_bytes(output)
        return index, output


def _num_bytes(output: Output | Exception | None) -> int:
    if not isinstance(output, Output):
        return 0
    packed = [output.logprobs, output.prompt_logprobs]
    of_logprobs = sum(part.num_bytes for part in packed if isinstance(part, PackedLogprobs))
    return BYTES_OF_OUTPUT + BYTES_OF_TOKEN * len(output.new_token_ids) + of_logprobs
