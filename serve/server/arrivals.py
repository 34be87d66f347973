"""Outputs that a client has yet to take, within bounds."""

import asyncio
from collections.abc import Callable

from serve.request import Output

MOST_BYTES_BEHIND = 64 * 2**20
"""Memory of what one client has yet to read, beside what its socket holds."""
BYTES_OF_OUTPUT, BYTES_OF_LOGPROB = 500, 100
"""Memory of an output, and of a token's log probability, about."""


class EngineError(Exception):
    """An engine could not go on with a request."""


class BehindError(EngineError):
    """A client read so slowly that its connection was closed."""


class Arrivals:
    """Outputs that a reader has yet to take: `fall_behind` is called, once, if they are too many.

    They are counted by the memory that they take, about.
    """

    def __init__(self, fall_behind: Callable[[int], None]) -> None:
        self._queue: asyncio.Queue[tuple[int, Output | Exception | None]] = asyncio.Queue()
        self._fall_behind: Callable[[int], None] | None = fall_behind
        self._num_bytes = 0

    def put(self, index: int, output: Output | Exception | None) -> None:
        """Add what came for choice `index`: an output, why there are no more, or their end."""
        if self._fall_behind is None:
            return
        if self._num_bytes > MOST_BYTES_BEHIND:
            fall_behind, self._fall_behind = self._fall_behind, None
            self._queue = asyncio.Queue()
            output = BehindError("the client reads too slowly")
            fall_behind(self._num_bytes)
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
    of_logprobs = [
        len(logprobs) * (1 + len(logprobs[0].top))
        for logprobs in (output.logprobs, output.prompt_logprobs)
        if logprobs
    ]
    return BYTES_OF_OUTPUT + BYTES_OF_LOGPROB * (len(output.tokens) + sum(of_logprobs))
