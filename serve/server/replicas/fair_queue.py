"""Requests that wait for a replica, taken in turn from the clients that sent them."""

from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """A request that can wait."""

    number: int
    client: str


AnyWaiting = TypeVar("AnyWaiting", bound=Waiting)


class FairQueue(Generic[AnyWaiting]):
    """A queue for each client. Clients take turns; requests of one client keep their order.

    Requests that a replica had before go first, in the order in which they came.
    """

    def __init__(self) -> None:
        self._returned: dict[int, AnyWaiting] = {}
        self._clients: dict[str, dict[int, AnyWaiting]] = {}
        """Queues that are not empty, by client, in the order of turns."""

    def __len__(self) -> int:
        return len(self._returned) + sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[AnyWaiting]:
        yield from self._returned.values()
        for queue in self._clients.values():
            yield from queue.values()

    def add(self, requests: Iterable[AnyWaiting]) -> None:
        """Queue new requests."""
        for request in requests:
            self._clients.setdefault(request.client, {})[request.number] = request

    def put_back(self, requests: Iterable[AnyWaiting]) -> None:
        """Queue requests of a replica that ended."""
        self._returned = {request.number: request for request in requests} | self._returned

    def heads(self) -> list[AnyWaiting]:
        """Return the requests that may be taken next: the first of each queue, by turns."""
        queues = [self._returned, *self._clients.values()]
        return [next(iter(queue.values())) for queue in queues if queue]

    def take(self, request: AnyWaiting) -> None:
        """Remove one of the `heads`; its client's next turn comes after all others."""
        if self._returned.pop(request.number, None) is not None:
            return
        queue = self._clients.pop(request.client)
        del queue[request.number]
        if queue:
            self._clients[request.client] = queue

    def remove(self, request: AnyWaiting) -> None:
        """Remove a request if it waits; no turn changes."""
        self._returned.pop(request.number, None)
        queue = self._clients.get(request.client, {})
        if queue.pop(request.number, None) is not None and not queue:
            del self._clients[request.client]

    def clear(self) -> list[AnyWaiting]:
        """Remove all requests and return them."""
        removed = list(self)
        self._returned, self._clients = {}, {}
        return removed
