"""Requests of clients, which wait for replicas or are decoded by them.

Replicas are processes of this machine (`serve.server.replicas.dispatch`) or run on the hosts of a
cluster (`serve.ray.replicas`).
"""

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from serve.engine.stats import Stats
from serve.request import Output, Request
from serve.server.replicas.fair_queue import FairQueue
from serve.server.replicas.stream import Busy, Stream, Unavailable
from serve.server.replicas.supervisor import Totals
from serve.wire import Message

ENGINE_FAILED = "the engine failed; the server's log has the reason"
NO_REPLICA = "no replica can be started; the server's log has the reason"
LOADING = "the model is being loaded: try again in a moment"


class Dispatcher(ABC):
    """All requests of a server, and all replicas. A subclass decides where requests go.

    Args:
        max_waiting: Limit of requests that wait.
    """

    num_restarts: int
    """Replicas that ended and were replaced."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: FairQueue[Stream] = FairQueue()
        self._numbers = itertools.count()
        self.num_resumed = 0
        """Requests that continued in another replica."""
        self.step_observers: list[Callable[[Message], None]] = []
        """Functions to call with each report of an engine."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of replicas that are wanted."""

    @property
    @abstractmethod
    def is_loading(self) -> bool:
        """Whether no replica has been ready yet."""

    @property
    @abstractmethod
    def num_loading(self) -> int:
        """Number of replicas that load their model, without those whose last start failed."""

    @property
    @abstractmethod
    def is_healthy(self) -> bool:
        """Whether a replica takes requests and responds."""

    @property
    @abstractmethod
    def stats(self) -> list[Stats]:
        """Statistics of every replica that takes requests."""

    @abstractmethod
    async def start(self) -> None:
        """Start every replica."""

    @abstractmethod
    async def ready(self, is_wanted: Callable[[], bool]) -> None:
        """Wait until a replica takes requests or `is_wanted` returns False.

        Raises OSError if no replica can be started.
        """

    @abstractmethod
    async def stop(self) -> None:
        """End every replica, and wait for it."""

    @abstractmethod
    def kill(self) -> None:
        """End every replica at once."""

    @abstractmethod
    def totals(self) -> Totals:
        """Return the counts of all replicas, with those that ended."""

    @abstractmethod
    def abort(self, stream: Stream) -> None:
        """End a request now; its pages are free within a step."""

    @property
    def num_waiting(self) -> int:
        """Number of requests whose prefill has not begun."""
        return len(self._all_waiting())

    def submit(
        self,
        requests: Sequence[Request],
        client: str = "",
        is_background: bool = False,
        num_moves: int = 0,
    ) -> list[Stream]:
        """Queue requests of a client, and return their streams.

        Args:
            requests: Requests to queue.
            client: Name of the client.
            is_background: Whether they take no places of others in the queue, and have no limit.
            num_moves: `num_moves` of their streams, elsewhere, so far.

        Raises:
            Busy: Too many requests wait.
            Unavailable: There is no replica.
        """
        self._require_available()
        if not is_background:
            self._require_room(len(requests), client)
        streams = [
            Stream(
                next(self._numbers),
                request,
                client,
                is_background,
                list(request.new_token_ids),
                num_moves=num_moves,
            )
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

    def give_up(self) -> None:
        """End every request with Unavailable, as the server stops."""
        for stream in [*self._waiting, *self._held()]:
            stream.outputs.put_nowait(Unavailable("the server is stopping: try another one"))

    @property
    def is_idle(self) -> bool:
        """Whether there are no requests."""
        return not len(self._waiting) and not any(True for _ in self._held())

    @abstractmethod
    def _require_available(self) -> None:
        """Raise Unavailable if no replica can take requests, even later."""

    @abstractmethod
    def _place_waiting(self) -> None:
        """Send waiting requests to replicas that have room."""

    @abstractmethod
    def _held(self) -> Iterable[Stream]:
        """Return the requests that replicas have."""

    def _all_waiting(self) -> list[Stream]:
        return [*self._waiting, *(held for held in self._held() if held.scheduled is None)]

    def _require_room(self, count: int, client: str) -> None:
        """Raise Busy if `count` more requests of a client may not wait.

        A client alone may fill the queue. A full queue still has room for other clients, up to an
        equal share for each that waits.
        """
        most = self._max_waiting
        waiting = Counter(
            stream.client for stream in self._all_waiting() if not stream.is_background
        )
        if waiting.total() + count <= most:
            return
        share = most // len(waiting.keys() | {client})
        if waiting[client] + count > share:
            raise Busy(f"{waiting.total()} requests wait, of at most {most}: try again later")
