"""Replicas that Ray Serve runs, as the server sees them.

The server keeps its clients' streams. When a replica or its host ends, each of its requests goes to
another one, after the tokens that it has.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from serve.engine.stats import Stats
from serve.ray.router import pack_prefix
from serve.server.replicas.dispatcher import ENGINE_FAILED, LOADING, Dispatcher
from serve.server.replicas.replica import AHEAD
from serve.server.replicas.stream import Abandoned, EngineError, Stream, Unavailable
from serve.server.replicas.supervisor import Totals, log_failure
from serve.wire import (
    Message,
    Unpacker,
    error_from_wire,
    output_from_wire,
    pack,
    request_to_wire,
)

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0
"""Time between two reports of all replicas."""
MOST_TRIES = 20
"""Times that a request may have to look for another replica before its next token."""
RETRY_SECONDS = 0.5
"""Time before a request whose replica ended looks for another one."""
KILL_SECONDS = 2.0
"""Time to tell Ray that the replicas are to end at once, if it does not answer."""
ENDED = (RayError, RayServeException)
"""Errors of a call whose replica or host ended, or is not known to have started yet."""


class RayReplicas(Dispatcher):
    """Replicas of a deployment of `serve.ray.engine_replica.EngineReplica`.

    Args:
        connect: Function that returns a handle of the deployment, and deploys it if need be. It may
            take minutes.
        disconnect: Function to call at the end, with whether it is to wait until the replicas have
            ended.
        num_replicas: Replicas that are wanted at least.
        max_running: Requests that a replica decodes together.
        max_waiting: Limit of requests that wait.
        watchdog_seconds: Time without a report after which no replica counts as healthy.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        disconnect: Callable[[bool], None],
        num_replicas: int,
        max_running: int,
        max_waiting: int,
        watchdog_seconds: float,
    ) -> None:
        super().__init__(max_waiting)
        self._connect, self._disconnect = connect, disconnect
        self._num_replicas, self._max_running = num_replicas, max_running
        self._watchdog_seconds = watchdog_seconds
        self._handle: Any = None
        self._failure: Exception | None = None
        self._calls: dict[int, tuple[Stream, asyncio.Task[None]]] = {}
        """Requests that Ray Serve has, by number, each with the task that reads its outputs."""
        self._reports: dict[str, list[Stats]] = {}
        """Last reports of the replicas that run, by their ids."""
        self._totals: dict[str, Totals] = {}
        """Last counts of all replicas that there have been, by their ids."""
        self._restarts: dict[str, int] = {}
        """Engines that were replaced within each of them."""
        self._last_report: float | None = None
        self._watching: asyncio.Task[None] | None = None
        self.num_restarts = 0

    def __len__(self) -> int:
        return self._num_replicas

    @property
    def is_loading(self) -> bool:
        """See `Dispatcher.is_loading`."""
        return self._last_report is None

    @property
    def num_loading(self) -> int:
        """0: Ray loads them, and the server exchanges no versions, for which it would wait."""
        return 0

    @property
    def is_healthy(self) -> bool:
        """See `Dispatcher.is_healthy`."""
        oldest = time.monotonic() - self._watchdog_seconds
        return self._last_report is not None and self._last_report >= oldest

    @property
    def stats(self) -> list[Stats]:
        """See `Dispatcher.stats`."""
        return [engine for engines in self._reports.values() for engine in engines]

    async def start(self) -> None:
        """Connect to the deployment, while the server answers already."""
        self._watching = asyncio.create_task(self._watch())
        self._watching.add_done_callback(log_failure)

    async def ready(self, is_wanted: Callable[[], bool]) -> None:
        """See `Dispatcher.ready`."""
        while is_wanted() and self.is_loading:
            if self._failure is not None:
                raise OSError(f"Ray cannot run the replicas: {self._failure}") from self._failure
            await asyncio.sleep(RETRY_SECONDS / 10)

    async def stop(self) -> None:
        """See `Dispatcher.stop`."""
        tasks = [task for _, task in self._calls.values()]
        tasks += [self._watching] if self._watching else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._disconnect, True)

    def kill(self) -> None:
        """See `Dispatcher.kill`.

        In another thread, as Ray may not answer, or this one may hold a lock of it.
        """
        thread = threading.Thread(target=self._disconnect, args=(False,), daemon=True)
        thread.start()
        thread.join(KILL_SECONDS)

    def totals(self) -> Totals:
        """See `Dispatcher.totals`."""
        totals = Totals()
        for counts in self._totals.values():
            totals.add(counts)
        return totals

    def abort(self, stream: Stream) -> None:
        """See `Dispatcher.abort`."""
        self._waiting.remove(stream)
        if (call := self._calls.pop(stream.number, None)) is not None:
            call[1].cancel()
        self._place_waiting()

    def _require_available(self) -> None:
        if self.is_loading:
            raise Unavailable(LOADING)

    def _held(self) -> Iterable[Stream]:
        return [stream for stream, _ in self._calls.values()]

    def _place_waiting(self) -> None:
        while (stream := self._next()) is not None:
            self._waiting.take(stream)
            task = asyncio.create_task(self._decode(stream))
            self._calls[stream.number] = stream, task

    def _next(self) -> Stream | None:
        """Return the next request that Ray Serve may have, if there is one.

        It has more than the replicas decode, so that it starts more of them. Requests of lower
        priority do not count, as engines preempt them.
        """
        most = AHEAD * self._max_running * max(1, len(self._reports))
        before: dict[int, list[str]] = {}
        """Clients of the requests that one of a priority does not overtake."""
        for stream in self._waiting.heads():
            priority = stream.priority
            if priority not in before:
                before[priority] = [
                    other.client for other in self._held() if other.priority <= priority
                ]
            if len(before[priority]) < most or stream.client not in before[priority]:
                return stream
        return None

    async def _decode(self, stream: Stream) -> None:
        """Put the outputs of a request into its stream, from one replica after another if they
        end."""
        num_tries, num_tokens = 0, 0
        try:
            while not await self._decode_once(stream):
                if len(stream.new_token_ids) > num_tokens:
                    num_tries, num_tokens = 0, len(stream.new_token_ids)
                num_tries += 1
                if num_tries > MOST_TRIES:
                    message = f"no replica could decode this request, in {num_tries} tries"
                    stream.outputs.put_nowait(Unavailable(message))
                    return
                await asyncio.sleep(RETRY_SECONDS)
        except Exception as error:
            logger.exception("a request failed")
            stream.outputs.put_nowait(EngineError(f"{ENGINE_FAILED} ({type(error).__name__})"))
        finally:
            self._calls.pop(stream.number, None)
            self._place_waiting()

    async def _decode_once(self, stream: Stream) -> bool:
        """Decode the rest of a request on one replica; return whether it ended."""
        prompt = pack(request_to_wire(stream.rest()))
        sent = time.monotonic()
        # An engine without a prefix cache never looks for any prefix.
        is_remembered = any(counts.prefix_tokens_asked for counts in self._totals.values())
        prefix = pack_prefix(stream.prefix) if is_remembered else b""
        response = self._handle.options(stream=True).decode.remote(
            prompt, prefix=prefix, cost=stream.cost, num_moves=stream.num_moves
        )
        try:
            async for packed in response:
                (message,) = Unpacker().feed(packed)
                if self._take(stream, message, sent):
                    return True
        except ENDED as error:
            if isinstance(error, RayTaskError) and not isinstance(error.cause, ENDED):
                raise  # an exception in the replica, which goes on
            logger.warning("a replica ended during a request: %s", str(error).partition("\n")[0])
            if not isinstance(error, RayServeException):
                may_move = stream.move()
                self.num_resumed += may_move
                return not may_move
        finally:
            response.cancel()
        return False

    def _take(self, stream: Stream, message: Message, sent: float) -> bool:
        """Put the outputs or the error of a message into a stream; return whether it ended."""
        if "refused" in message:
            stream.outputs.put_nowait(error_from_wire(message["refused"]))
            return True
        if "failed" in message:
            stream.outputs.put_nowait(EngineError(message["failed"]))
            return True
        if "abandoned" in message:
            stream.outputs.put_nowait(Abandoned(message["abandoned"]))
            return True
        if "unavailable" in message:
            return False
        if "waited" in message:
            stream.schedule(sent + message["waited"])
        for values in message["outputs"]:
            output = output_from_wire(values)
            if output.new_token_ids or output.finish_reason is not None:
                stream.take(output, time.monotonic())
            if output.finish_reason is not None:
                return True
        stream.num_moves = message["num_moves"]
        return False

    async def _watch(self) -> None:
        """Connect, and ask all replicas for reports again and again."""
        try:
            self._handle = await asyncio.to_thread(self._connect)
        except Exception as error:
            logger.exception("Ray cannot run the replicas")
            self._failure = error
            return
        while True:
            with suppress(*ENDED, TimeoutError, asyncio.TimeoutError):
                reports = await self._handle.broadcast("report").results_async(
                    timeout_s=self._watchdog_seconds, return_exceptions=True
                )
                self._hear([report for report in reports if isinstance(report, dict)])
            await asyncio.sleep(REPORT_SECONDS)

    def _hear(self, reports: Sequence[Message]) -> None:
        """Take the reports of all replicas that run."""
        self._reports = {}
        for report in reports:
            name = report["replica"]
            self._reports[name] = [Stats.from_json(values) for values in report["stats"]]
            self._totals[name] = Totals(**report["totals"])
            self._restarts[name] = report["num_restarts"]
        self.num_restarts = sum(self._restarts.values())
        if reports:
            self._last_report = time.monotonic()
        self._place_waiting()
