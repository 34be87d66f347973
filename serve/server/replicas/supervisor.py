"""Starts a replica on each device, and replaces those that end or no longer respond."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from serve.config import EngineConfig
from serve.engine.stats import Stats
from serve.server.replicas.replica import Replica
from serve.wire import Message

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.2
MOST_FAILED_STARTS = 3
"""Consecutive failed starts of every replica after which requests no longer wait for one."""
LONGEST_PAUSE_SECONDS = 30.0
"""Longest pause before a replica that keeps failing is started again."""
START_SECONDS = 600.0
"""Time that a replica may take to load its model."""


@dataclass(frozen=True)
class ReplicasConfig:
    """Settings of all replicas."""

    model: Path
    """Model directory."""
    devices: tuple[str, ...] = ("cpu",)
    """Device of each replica, or devices with commas between them, which divide the model."""
    num_threads: int = 1
    """Threads that a replica computes with on a CPU."""
    dtype: str = "float32"
    """Number format of the weights."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    watchdog_seconds: float = 30.0
    """Time without a message after which a replica is killed."""
    max_waiting: int = 256
    """Limit of requests that wait."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Folders of adapters by name."""
    name: str = ""
    """Name of the model, for the log."""


@dataclass
class Totals:
    """Counts of all engines since the server started, which never decrease."""

    preemptions: int = 0
    prefix_tokens_asked: int = 0
    prefix_tokens_found: int = 0
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    flushes: dict[int, tuple[int, float]] = field(default_factory=dict)
    """As in `Stats`."""

    def add(self, stats: "Stats | Totals") -> None:
        """Count another engine, or others."""
        for name in (own.name for own in fields(self) if own.name != "flushes"):
            setattr(self, name, getattr(self, name) + getattr(stats, name))
        for positions, (count, seconds) in stats.flushes.items():
            before = self.flushes.get(positions, (0, 0.0))
            self.flushes[positions] = before[0] + count, before[1] + seconds


class Supervisor(ABC):
    """Keeps replicas running. A subclass decides about their requests."""

    def __init__(self, config: ReplicasConfig) -> None:
        self._config = config
        self._replicas: list[Replica | None] = [None] * len(config.devices)
        self._failed_starts = [0] * len(config.devices)
        self._last_error = ""
        """Only for the log: the output of a process may have paths, which clients must not see."""
        self._has_been_ready = False
        self._keeping: dict[int, asyncio.Task[None]] = {}
        """Tasks that keep a replica running, by its index."""
        self._watching: asyncio.Task[None] | None = None
        self._ended = Totals()
        """Counts of the replicas that ended."""
        self.num_restarts = 0

    def __len__(self) -> int:
        return len(self._config.devices)

    @abstractmethod
    async def _hear(self, index: int, replica: Replica, message: Message) -> None:
        """Handle a message of a replica."""

    @abstractmethod
    def _move(self, replica: Replica) -> None:
        """Move the requests of a replica that ended to others."""

    @abstractmethod
    def _refuse_waiting(self) -> None:
        """End the requests that wait, as no replica can be started."""

    async def start(self) -> None:
        """Start every replica."""
        for index in range(len(self)):
            self.start_replica(index)

    def start_replica(self, index: int) -> None:
        """Start a replica, and keep it running."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
            self._watching.add_done_callback(log_failure)
        self._failed_starts[index] = 0
        self._keeping[index] = asyncio.create_task(self._keep_running(index))
        self._keeping[index].add_done_callback(log_failure)

    async def replica_ready(self, index: int) -> None:
        """Wait until a replica that was just started takes requests. Raises OSError if it fails."""
        while (replica := self._replicas[index]) is None or not replica.is_ready:
            if self._failed_starts[index]:
                raise OSError(f"no replica could be started: {self._last_error}")
            await asyncio.sleep(WATCH_SECONDS / 4)

    async def retire(self, index: int) -> None:
        """Wait until a replica has no requests. It takes no new ones from now on."""
        while (replica := self._replicas[index]) is not None:
            replica.is_retiring = True
            if not replica.streams:
                return
            await asyncio.sleep(WATCH_SECONDS / 4)

    async def stop_replica(self, index: int) -> None:
        """End a replica that has no requests, and wait for it."""
        task = self._keeping.pop(index)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        replica, self._replicas[index] = self._replicas[index], None
        if replica is not None:
            if replica.stats is not None:
                self._ended.add(replica.stats)
            replica.kill()
            await replica.ended()

    async def ready(self, is_wanted: Callable[[], bool]) -> None:
        """Wait until a replica takes requests or `is_wanted` returns False.

        Raises OSError if no replica can be started.
        """
        while is_wanted() and not any(self.running):
            if self._cannot_start:
                raise OSError(f"no replica could be started: {self._last_error}")
            await asyncio.sleep(WATCH_SECONDS / 4)

    async def stop(self) -> None:
        """End every replica, and wait for it."""
        tasks = [*self._keeping.values(), *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.kill()
        ends = [replica.ended() for replica in self._started]
        for result in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def kill(self) -> None:
        """End every replica at once."""
        for replica in self._started:
            replica.kill()

    @property
    def running(self) -> list[Replica]:
        """Replicas that take requests."""
        return [replica for replica in self._started if replica.is_ready]

    @property
    def is_loading(self) -> bool:
        """Whether no replica has been ready yet."""
        return not self._has_been_ready

    @property
    def num_loading(self) -> int:
        """Number of replicas that load their model, without those whose last start failed."""
        found = zip(self._replicas, self._failed_starts, strict=True)
        return sum(not failures and not (own and own.is_ready) for own, failures in found)

    @property
    def is_healthy(self) -> bool:
        """Whether a replica takes requests and responds."""
        oldest = time.monotonic() - self._config.watchdog_seconds
        return any(replica.last_heard >= oldest for replica in self.running)

    @property
    def stats(self) -> list[Stats]:
        """Statistics of every replica that takes requests."""
        return [replica.stats for replica in self.running if replica.stats is not None]

    def totals(self) -> Totals:
        """Return the counts of all replicas, with those that ended."""
        totals = replace(self._ended, flushes=dict(self._ended.flushes))
        for stats in self.stats:
            totals.add(stats)
        return totals

    @property
    def config(self) -> ReplicasConfig:
        """Settings of all replicas."""
        return self._config

    def devices_of_running(self) -> list[tuple[str, Replica]]:
        """Replicas that take requests, with their devices."""
        found = zip(self._config.devices, self._replicas, strict=True)
        return [(device, own) for device, own in found if own is not None and own.is_ready]

    @property
    def _started(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica is not None]

    @property
    def _cannot_start(self) -> bool:
        is_failing = all(count >= MOST_FAILED_STARTS for count in self._failed_starts)
        return is_failing and not self.running

    def _has_started(self, index: int) -> None:
        self._has_been_ready = True
        self._failed_starts[index] = 0
        if replica := self._replicas[index]:
            logger.info("%s takes requests: process %d", self._name(index), replica.process.pid)

    def _name(self, index: int) -> str:
        of_model = f" of {self._config.name}" if self._config.name else ""
        return f"replica {index}{of_model} on {self._config.devices[index]}"

    async def _keep_running(self, index: int) -> None:
        config = self._config
        settings = {
            "model": str(config.model),
            "device": config.devices[index],
            "dtype": config.dtype,
            "engine": asdict(config.engine),
            "adapters": {name: str(path) for name, path in config.adapters.items()},
        }
        while True:
            try:
                replica = self._replicas[index] = Replica(settings, config.num_threads)
            except OSError as error:  # no file, process or memory is left for it
                self._replicas[index] = None
                await self._failed_to_start(index, str(error))
                continue
            try:
                async for message in replica.messages():
                    await self._hear(index, replica, message)
            except Exception:
                # Its requests move to another replica; without this they would wait forever.
                logger.exception("a message of %s failed", self._name(index))
                replica.kill()
            was_ready = replica.stats is not None
            if replica.stats is not None:
                self._ended.add(replica.stats)
            replica.stats = None
            how = await replica.ended()
            self._replicas[index] = None
            self.num_restarts += 1
            self._move(replica)
            if was_ready:
                self._log_end(index, how)
            else:
                await self._failed_to_start(index, how)

    def _log_end(self, index: int, how: str) -> None:
        self._last_error = f"{self._name(index)} {how}"
        logger.error(self._last_error)

    async def _failed_to_start(self, index: int, how: str) -> None:
        """Wait before the next start, longer each time."""
        self._log_end(index, how)
        self._failed_starts[index] += 1
        if self._cannot_start:
            self._refuse_waiting()
        await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, 2.0 ** self._failed_starts[index] - 1))

    async def _watch(self) -> None:
        """Kill replicas that no longer respond."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            for replica in self._started:
                most = self._config.watchdog_seconds if replica.is_ready else START_SECONDS
                if replica.last_heard < now - most:
                    logger.error("process %d does not respond: killing it", replica.process.pid)
                    replica.kill()
                    replica.last_heard = now  # log it once, however long the process takes to end


def log_failure(task: "asyncio.Task[None]") -> None:
    """Log the failure of a task that never ends; /health then reports that no replica responds."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("a task of the server failed", exc_info=error)
