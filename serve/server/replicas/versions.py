"""Replicas of all versions of the model: of the current one, which takes new requests, and of
earlier ones, which finish theirs."""

import asyncio
from collections.abc import Callable

from serve.engine.stats import Stats
from serve.server.replicas.dispatcher import Dispatcher
from serve.server.replicas.supervisor import Totals
from serve.wire import Message


class Versions:
    """Replicas that run, by the version of the model that they have.

    Args:
        first: Dispatcher of the first version, which are not started yet.
    """

    def __init__(self, first: Dispatcher) -> None:
        self.step_observers: list[Callable[[Message], None]] = []
        """Functions to call with each report of an engine."""
        self.current = first
        """Replicas of the version that takes new requests."""
        self._all: list[Dispatcher] = []
        self._past = Totals()
        """Counts of the versions that have ended."""
        self._past_restarts = self._past_resumed = 0
        self.add(first)

    def __len__(self) -> int:
        return len(self.current)

    def add(self, replicas: Dispatcher) -> None:
        """Count the replicas of another version, which runs beside the current one."""
        replicas.step_observers = self.step_observers
        self._all.append(replicas)

    async def end(self, replicas: Dispatcher) -> None:
        """Stop the replicas of a version, and keep their counts."""
        totals = replicas.totals()
        await replicas.stop()
        self._all.remove(replicas)
        self._past.add(totals)
        self._past_restarts += replicas.num_restarts
        self._past_resumed += replicas.num_resumed

    async def start(self) -> None:
        """Start every replica of the current version."""
        await self.current.start()

    async def ready(self, is_wanted: Callable[[], bool]) -> None:
        """See `Dispatcher.ready`."""
        await self.current.ready(is_wanted)

    async def stop(self) -> None:
        """End every replica, and wait for it. An error is raised once all versions have ended."""
        ends = (replicas.stop() for replicas in self._all)
        for result in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def kill(self) -> None:
        """End every replica at once."""
        for replicas in self._all:
            replicas.kill()

    def give_up(self) -> None:
        """End every request, as the server stops."""
        for replicas in self._all:
            replicas.give_up()

    @property
    def is_loading(self) -> bool:
        """Whether no replica has been ready yet."""
        return self.current.is_loading

    @property
    def num_loading(self) -> int:
        """See `Dispatcher.num_loading`."""
        return self.current.num_loading

    @property
    def is_healthy(self) -> bool:
        """Whether a replica takes requests and responds."""
        return self.current.is_healthy

    @property
    def stats(self) -> list[Stats]:
        """Statistics of every replica that takes requests."""
        return [stats for replicas in self._all for stats in replicas.stats]

    @property
    def num_waiting(self) -> int:
        """Number of requests whose prefill has not begun."""
        return sum(replicas.num_waiting for replicas in self._all)

    @property
    def num_restarts(self) -> int:
        """Number of replicas that ended and were replaced."""
        return self._past_restarts + sum(replicas.num_restarts for replicas in self._all)

    @property
    def num_resumed(self) -> int:
        """Number of requests that continued in another replica."""
        return self._past_resumed + sum(replicas.num_resumed for replicas in self._all)

    def totals(self) -> Totals:
        """Return the counts of all replicas since the server started."""
        totals = Totals()
        totals.add(self._past)
        for replicas in self._all:
            totals.add(replicas.totals())
        return totals
