"""Decoding of the rows of a batch."""

import asyncio
import json
import secrets
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from serve.openai.errors import user_error_body
from serve.server.batches.lines import Line, answered, unanswered
from serve.server.batches.progress import Result
from serve.server.batches.rows import Reading, Rows
from serve.server.batches.window import Window, Windows
from serve.server.replicas.slices import Pauses
from stu.common.errors import UserError
from stu.common.text import Json

UNAVAILABLE_SECONDS = 0.5
"""Time after which a row is sent again that found no replica."""
MOST_BYTES_AT_ONCE = 2**18
"""Size of an answer above which another thread reads it."""


@dataclass(frozen=True)
class RowRequest:
    """A row as a request to the server."""

    path: str
    request_id: str
    owner: str
    """Owner of the batch."""
    body: bytes


class Answering(Protocol):
    """Answers rows as the server answers requests."""

    async def __call__(self, request: RowRequest) -> tuple[int, bytes] | None:
        """Return the HTTP status and the body of an answer; None if there is none now, and the
        request is to be sent again."""


class Decoding:
    """Decodes rows of a batch, in the order of its file for each model.

    The first reading of the file goes on to the rows of other models where those of a model have to
    wait: another reading then begins there, of the rows of that model alone. So however many rows
    wait, only a chunk of the file for each model is in memory.

    Args:
        rows: Rows to decode.
        answering: Answers them.
        windows: Limits of the rows that are decoded at once, of all batches.
        owner: Owner of the batch.
        endpoint: Path of the rows.
    """

    def __init__(
        self, rows: Rows, answering: Answering, windows: Windows, owner: str, endpoint: str
    ) -> None:
        self._rows, self._answering, self._windows = rows, answering, windows
        self._owner, self._endpoint = owner, endpoint
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._apart: set[Window] = set()
        """Windows whose rows have a reading of their own."""

    async def run(self) -> bool:
        """Decode all rows, and return True when their results are written."""
        try:
            await self._begin(self._rows.read())
            while self._tasks and self._failure is None:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._failure is not None:
                raise self._failure
            await self._rows.written()
            return True
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin(self, reading: Reading, own: Window | None = None) -> None:
        """Begin to decode the rows of a reading that it is to decode: those of its own window, or
        of all that have no other reading."""
        pauses = Pauses()
        async for line in reading:
            await pauses.pause_if_due()
            if self._failure is not None:
                return
            try:
                row = line.row()
            except UserError as error:
                if own is not None:
                    reading.leave(line)
                    continue
                values = "", new_request_id(), error.code or "", str(error), line.place.line
                await self._rows.add(unanswered(*values))
                continue
            window, num_bytes = self._windows.of(row["body"].get("model")), len(line.content)
            if not await self._enter(window, own, line):
                reading.leave(line)
                continue
            task = asyncio.create_task(self._decode(row, line.place.line, window.model))
            # A task that is cancelled before it begins does not even run its `finally`.
            task.add_done_callback(partial(_leave, window, num_bytes))
            self._add(task)

    async def _enter(self, window: Window, own: Window | None, line: Line) -> bool:
        """Wait until a row may be decoded, or return False if another reading has it."""
        num_bytes = len(line.content)
        if window is not own:
            if own is not None or window in self._apart:
                return False
            if window.try_enter(num_bytes):
                return True
            if self._windows.are_of_several_models:
                self._apart.add(window)
                self._add(asyncio.create_task(self._begin(self._rows.read(line.place), window)))
                return False
        await window.enter(self._owner, num_bytes)
        return True

    def _add(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._failure = self._failure or task.exception()

    async def _decode(self, row: Json, line: int, model: str) -> None:
        result = await self._result(row, line)
        await self._rows.add(replace(result, model=model))

    async def _result(self, row: Json, line: int) -> Result:
        body = row["body"]
        if body.get("stream") is True:
            error = UserError("stream", True, "false, as a batch has no streams")
            found = 400, json.dumps(user_error_body(error)).encode()
            return answered(row["custom_id"], new_request_id(), *found, line)
        content = json.dumps(body).encode()
        while True:
            request = RowRequest(self._endpoint, new_request_id(), self._owner, content)
            answer = await self._answering(request)
            if answer is not None:
                break
            await asyncio.sleep(UNAVAILABLE_SECONDS)
        status, content = answer
        values = row["custom_id"], request.request_id, status, content, line
        if len(content) > MOST_BYTES_AT_ONCE:
            return await asyncio.to_thread(answered, *values)
        return answered(*values)


def _leave(window: Window, num_bytes: int, _: asyncio.Task[None]) -> None:
    window.leave(num_bytes)


def new_request_id() -> str:
    """Return the id of a request."""
    return secrets.token_hex(12)
