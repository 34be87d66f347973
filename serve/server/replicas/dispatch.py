"""Dispatch of clients' requests to replicas.

A request goes to the least busy replica, or to one that remembers more of its prompt and so has
fewer tokens to compute before its first one. If that replica ends or no longer responds, the
request continues in another one, after the tokens that it has. Its reader sees no gap and no
repetition, because a token depends only on the request, its seed and its position.
"""

import logging
from collections.abc import Iterable, Sequence

from serve.engine.stats import Stats
from serve.request import Output
from serve.server.replicas.dispatcher import ENGINE_FAILED, LOADING, NO_REPLICA, Dispatcher
from serve.server.replicas.replica import Replica
from serve.server.replicas.slices import Pauses
from serve.server.replicas.stream import EngineError, Stream, Unavailable
from serve.server.replicas.supervisor import ReplicasConfig, Supervisor
from serve.wire import Message, error_from_wire, output_from_wire, pack, request_to_wire

logger = logging.getLogger(__name__)


class Replicas(Supervisor, Dispatcher):
    """All replicas on this machine, and the requests that they have or that wait for them."""

    def __init__(self, config: ReplicasConfig) -> None:
        Supervisor.__init__(self, config)
        Dispatcher.__init__(self, config.max_waiting)

    def abort(self, stream: Stream) -> None:
        """See `Dispatcher.abort`."""
        self._waiting.remove(stream)
        for replica in self._started:
            if replica.streams.pop(stream.number, None) is not None:
                replica.send(pack({"abort": stream.number}))
        self._place_waiting()

    def _require_available(self) -> None:
        if self._cannot_start:
            raise Unavailable(NO_REPLICA)
        if self.is_loading:
            raise Unavailable(LOADING)

    def _held(self) -> Iterable[Stream]:
        return (stream for replica in self._started for stream in replica.streams.values())

    def _place_waiting(self) -> None:
        while (placement := self._placement()) is not None:
            stream, replica = placement
            self._waiting.take(stream)
            try:
                packed = pack({"add": stream.number, "request": request_to_wire(stream.rest())})
            except Exception:  # of this request alone, or it would end one replica after the other
                logger.exception("request %d cannot be sent to a replica", stream.number)
                stream.outputs.put_nowait(EngineError(ENGINE_FAILED))
                continue
            stream.expect_prefill(replica.num_remembered(stream) if len(self) > 1 else 0)
            if len(self) > 1:
                replica.prefixes.add(stream.prefix)
            replica.streams[stream.number] = stream
            replica.send(packed)

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
        moved = [stream for stream in streams.values() if stream.move()]
        self.num_resumed += len(moved)
        self._waiting.put_back(moved)
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
