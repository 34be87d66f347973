"""Requests that wait for a replica, by priority, and in turn from the clients that sent them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """A request that can wait."""

    number: int
    client: str

    @property
    def priority(self) -> int:
        """Requests with a lower number go first."""


AnyWaiting = TypeVar("AnyWaiting", bound=Waiting)


class FairQueue(Generic[AnyWaiting]):
    """A queue for each priority and client. Lower priorities go first; of one priority, clients
    take turns, and requests of one client keep their order.

    Requests that a replica had before go before all others of their priority, in the order in which
    they came.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level[AnyWaiting]] = {}
        """Requests by their priority; none of the levels is empty."""

    def __len__(self) -> int:
        return sum(map(len, self._queues()))

    def __iter__(self) -> Iterator[AnyWaiting]:
        for queue in self._queues():
            yield from queue.values()

    def add(self, requests: Iterable[AnyWaiting]) -> None:
        """Queue new requests."""
        for request in requests:
            level = self._levels.setdefault(request.priority, _Level())
            level.clients.setdefault(request.client, {})[request.number] = request

    def put_back(self, requests: Iterable[AnyWaiting]) -> None:
        """Queue requests of a replica that ended."""
        returned: dict[int, dict[int, AnyWaiting]] = {}
        for request in requests:
            returned.setdefault(request.priority, {})[request.number] = request
        for priority, queue in returned.items():
            level = self._levels.setdefault(priority, _Level())
            level.returned = queue | level.returned

    def heads(self) -> list[AnyWaiting]:
        """Return the requests that may be taken next: the first of each queue, by priority and
        turns."""
        return [next(iter(queue.values())) for queue in self._queues()]

    def take(self, request: AnyWaiting) -> None:
        """Remove one of the `heads`; the next turn of its client in this priority comes after all
        others."""
        level = self._levels[request.priority]
        is_returned = request.number in level.returned
        self.remove(request)
        if not is_returned and request.client in level.clients:
            level.clients[request.client] = level.clients.pop(request.client)

    def remove(self, request: AnyWaiting) -> None:
        """Remove a request if it waits; no turn changes."""
        level = self._levels.get(request.priority, _Level())
        if level.returned.pop(request.number, None) is None:
            queue = level.clients.get(request.client, {})
            if queue.pop(request.number, None) is not None and not queue:
                del level.clients[request.client]
        if not level.queues:
            self._levels.pop(request.priority, None)

    def clear(self) -> list[AnyWaiting]:
        """Remove all requests and return them."""
        removed = list(self)
        self._levels = {}
        return removed

    def _queues(self) -> list[dict[int, AnyWaiting]]:
        return [queue for _, level in sorted(self._levels.items()) for queue in level.queues]


@dataclass
class _Level(Generic[AnyWaiting]):
    """Requests of one priority."""

    returned: dict[int, AnyWaiting] = field(default_factory=dict)
    clients: dict[str, dict[int, AnyWaiting]] = field(default_factory=dict)
    """Queues that are not empty, by client, in the order of turns."""

    @property
    def queues(self) -> list[dict[int, AnyWaiting]]:
        """Queues that are not empty, the first to be served first."""
        return [queue for queue in (self.returned, *self.clients.values()) if queue]
