"""Decoding of the rows of a batch."""

import asyncio
import json
import secrets
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from serve.openai.errors import user_error_body
from serve.server.batches.lines import answered, unanswered
from serve.server.batches.progress import Result
from serve.server.batches.rows import Rows
from serve.server.batches.window import Window, Windows
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
    """Decodes rows of a batch.

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

    async def run(self) -> bool:
        """Decode all rows, and return True when their results are written."""
        try:
            async for line in self._rows.read():
                try:
                    row = line.row()
                except UserError as error:
                    values = "", new_request_id(), error.code or "", str(error), line.place.line
                    await self._rows.add(unanswered(*values))
                    continue
                window, num_bytes = self._windows.of(row["body"].get("model")), len(line.content)
                await window.enter(self._owner, num_bytes)
                task = asyncio.create_task(self._decode(row, line.place.line, window.model))
                self._tasks.add(task)
                # A task that is cancelled before it begins does not even run its `finally`.
                task.add_done_callback(partial(self._ended, window, num_bytes))
                if self._failure is not None:
                    break
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

    def _ended(self, window: Window, num_bytes: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        window.leave(num_bytes)
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


def new_request_id() -> str:
    """Return the id of a request."""
    return secrets.token_hex(12)
