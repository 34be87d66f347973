"""Dispatch of clients' requests to replicas.

A request goes to the least busy replica, or to one that remembers more of its prompt and so has
fewer tokens to compute before its first one. If that replica ends or no longer responds, the
request continues in another one, after the tokens that it has. Its reader sees no gap and no
repetition, because a token depends only on the request, its seed and its position.
"""

import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from serve.engine.stats import Stats
from serve.request import Output, Request
from serve.server.replicas.fair_queue import FairQueue
from serve.server.replicas.replica import Replica
from serve.server.replicas.slices import Pauses
from serve.server.replicas.stream import Abandoned, Busy, EngineError, Stream, Unavailable
from serve.server.replicas.supervisor import ReplicasConfig, Supervisor
from serve.wire import Message, error_from_wire, output_from_wire, request_to_wire

logger = logging.getLogger(__name__)

MOST_MOVES = 5
"""Replicas that may end during a request before its next token."""
ENGINE_FAILED = "the engine failed; the server's log has the reason"
NO_REPLICA = "no replica can be started; the server's log has the reason"


class Replicas(Supervisor):
    """All replicas of the server, and the requests that they have or that wait for them."""

    def __init__(self, config: ReplicasConfig) -> None:
        super().__init__(config)
        self._waiting: FairQueue[Stream] = FairQueue()
        self._numbers = itertools.count()
        self.num_resumed = 0
        """Requests that continued in another replica."""
        self.step_observers: list[Callable[[Message], None]] = []
        """Functions to call with each report of an engine."""

    @property
    def num_waiting(self) -> int:
        """Number of requests whose prefill has not begun."""
        return len(self._all_waiting())

    def submit(
        self, requests: Sequence[Request], client: str = "", is_background: bool = False
    ) -> list[Stream]:
        """Queue requests of a client, and return their streams. Those in the background take no
        places of others in the queue, and have no limit.

        Raises:
            Busy: Too many requests wait.
            Unavailable: There is no replica.
        """
        if self._cannot_start:
            raise Unavailable(NO_REPLICA)
        if self.is_loading:
            raise Unavailable("the model is being loaded: try again in a moment")
        if not is_background:
            self._require_room(len(requests), client)
        streams = [
            Stream(next(self._numbers), request, client, is_background, list(request.new_token_ids))
            for request in requests
        ]
        self._waiting.add(streams)
        self._place_waiting()
        return streams

    async def outputs(self, stream: Stream) -> AsyncIterator[Output]:
        """Yield the outputs of a request. It is aborted if its reader stops early.

        Raises:
            UserError: The engine refuses the request.
            EngineError: The engine failed.
            Unavailable: There is no replica any more.
        """
        is_over = False
        try:
            while not is_over:
                output = await stream.outputs.get()
                if isinstance(output, Exception):
                    is_over = True
                    raise output
                is_over = output.finish_reason is not None
                yield output
        finally:
            if not is_over:
                self.abort(stream)

    def abort(self, stream: Stream) -> None:
        """End a request now; its pages are free within a step."""
        self._waiting.remove(stream)
        for replica in self._started:
            if replica.streams.pop(stream.number, None) is not None:
                replica.send({"abort": stream.number})
        self._place_waiting()

    def give_up(self) -> None:
        """End every request with Unavailable, as the server stops."""
        streams = list(self._waiting)
        for replica in self._started:
            streams += replica.streams.values()
        for stream in streams:
            stream.outputs.put_nowait(Unavailable("the server is stopping: try another one"))

    @property
    def is_idle(self) -> bool:
        """Whether there are no requests."""
        return not len(self._waiting) and not any(own.streams for own in self._started)

    def _all_waiting(self) -> list[Stream]:
        streams = [stream for replica in self.running for stream in replica.streams.values()]
        return [*self._waiting, *(stream for stream in streams if stream.scheduled is None)]

    def _require_room(self, count: int, client: str) -> None:
        """Raise Busy if `count` more requests of a client may not wait.

        A client alone may fill the queue. A full queue still has room for other clients, up to an
        equal share for each that waits.
        """
        most = self._config.max_waiting
        waiting = Counter(
            stream.client for stream in self._all_waiting() if not stream.is_background
        )
        if waiting.total() + count <= most:
            return
        share = most // len(waiting.keys() | {client})
        if waiting[client] + count > share:
            raise Busy(f"{waiting.total()} requests wait, of at most {most}: try again later")

    def _place_waiting(self) -> None:
        """Send waiting requests to replicas that have room."""
        while (placement := self._placement()) is not None:
            stream, replica = placement
            self._waiting.take(stream)
            stream.expect_prefill(replica.num_remembered(stream) if len(self) > 1 else 0)
            if len(self) > 1:
                replica.prefixes.add(stream.prefix)
            replica.streams[stream.number] = stream
            replica.send({"add": stream.number, "request": request_to_wire(stream.rest())})

    def _placement(self) -> tuple[Stream, Replica] | None:
        """Return the next request that a replica has room for, and the replica."""
        for stream in self._waiting.heads():
            free = [replica for replica in self.running if replica.has_room(stream)]
            if free:
                return stream, _soonest(stream, free)
            if stream.is_suspect:
                return None  # replicas finish what they have, or it would never run
        return None

    async def _hear(self, index: int, replica: Replica, message: Message) -> None:
        if "ready" in message:
            replica.stats = Stats.from_json(message["ready"])
            self._has_started(index)
            if replica.last_output:
                logger.info("%s: %s", self._name(index), replica.last_output)
            self._place_waiting()
        elif "refused" in message:
            error = error_from_wire(message["error"])
            self._end(replica, message["refused"], error)
        elif "failed" in message:
            logger.error("%s cannot add a request: %s", self._name(index), message["trace"])
            self._end(replica, message["failed"], EngineError(ENGINE_FAILED))
        else:
            await self._take_report(replica, message)

    async def _take_report(self, replica: Replica, message: Message) -> None:
        replica.stats = Stats.from_json(message["stats"])
        if "free_bytes" in message:
            replica.free_bytes = message["free_bytes"]
        for number, time_scheduled in message["scheduled"]:
            if (stream := replica.streams.get(number)) is not None:
                stream.schedule(time_scheduled)
        pauses = Pauses()
        for values in message["outputs"]:
            self._take(replica, output_from_wire(values), message["time"])
            await pauses.pause_if_due()
        self._place_waiting()
        for observe in self.step_observers:
            observe(message)

    def _take(self, replica: Replica, output: Output, moment: float) -> None:
        stream = replica.streams.get(output.request_id)
        if stream is None:
            return  # its reader went away
        if output.finish_reason is not None:
            del replica.streams[output.request_id]
        stream.take(output, moment)

    def _end(self, replica: Replica, number: int, error: Exception) -> None:
        stream = replica.streams.pop(number, None)
        if stream is not None:
            stream.outputs.put_nowait(error)

    def _move(self, replica: Replica) -> None:
        streams, replica.streams = replica.streams, {}
        for stream in list(streams.values()):
            stream.num_moves += 1
            if stream.num_moves > MOST_MOVES:
                del streams[stream.number]
                message = (
                    f"{stream.num_moves} replicas ended during this request, which may be the cause"
                )
                stream.outputs.put_nowait(Abandoned(message))
        self.num_resumed += len(streams)
        self._waiting.put_back(streams.values())
        self._place_waiting()

    def _refuse_waiting(self) -> None:
        for stream in self._waiting.clear():
            stream.outputs.put_nowait(Unavailable(NO_REPLICA))


def _soonest(stream: Stream, replicas: Sequence[Replica]) -> Replica:
    """Return the replica with the fewest tokens to compute before `stream` has its first one.

    Tokens of its own prompt count twice: they also delay requests that come after it.
    """
    if len(replicas) == 1:
        return replicas[0]

    def cost(replica: Replica) -> tuple[int, int]:
        before, total = replica.cost(stream)
        return before - 2 * replica.num_remembered(stream), total

    return min(replicas, key=cost)
