"""Engines in processes of their own, and the requests that are on them.

A request goes to the engine that has the least to do. An engine that ends, or gives no sign of
life, is replaced, and its requests go on in another from the tokens they have: what their readers
get has no gap and no repeat, as a token depends on nothing but the request, its seed and its
position.
"""

import asyncio
import itertools
import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any

from serve.engine.engine import Stats
from serve.request import Output, Request
from serve.server.config import ServerConfig
from serve.server.replicas.fair_queue import FairQueue
from serve.server.replicas.wire import Message, Unpacker, output_from_wire, pack, request_to_wire
from serve.server.slices import Pauses
from stu.common.processes import child_command, hangups_blocked, last_output

logger = logging.getLogger(__name__)

RECEIVE_BYTES = 2**20
WATCH_SECONDS = 0.2
MOST_MOVES = 5
"""Engines that may end under a request before its next token: it may be what ends them."""
SUSPECT_MOVES = 2
"""From which on it has an engine for itself until that token, so that it ends no other request."""
AHEAD = 1.25
"""Requests that an engine has, over those that it decodes together, but for the first of each
client; others wait here, to go to whichever engine has room first."""
MOST_FAILED_STARTS = 3
"""In a row, of every engine, until requests that wait for one are refused."""
LONGEST_PAUSE_SECONDS = 30.0
"""Between two starts of an engine that ends again and again."""
START_SECONDS = 600.0
"""That an engine may take to load its model."""
LAST_WORDS_SECONDS = 5.0
"""That an engine which is no longer heard of has to end by itself."""


NO_ENGINE = "no engine can be started; the server's log says why"


class Busy(Exception):
    """Too many requests wait."""


class Refused(Exception):
    """An engine does not take a request."""


class Unavailable(Exception):
    """No engine can be had, or a request ended several of them."""


@dataclass(eq=False)
class Stream:
    """A request under way, and what has come of it."""

    number: int
    request: Request
    client: str = ""
    """Who asks: clients take turns."""
    tokens: list[int] = field(default_factory=list)
    outputs: asyncio.Queue[Output | Exception] = field(default_factory=asyncio.Queue)
    num_moves: int = 0
    scheduled: float | None = None
    """When an engine first began its prefill, by the monotonic clock."""

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what ended engines."""
        return self.num_moves >= SUSPECT_MOVES

    @property
    def cost(self) -> int:
        """Tokens that an engine has yet to take in or to find."""
        its = self.request
        return len(its.prompt_token_ids) + its.sampling.max_new_tokens - len(self.tokens)

    def rest(self) -> Request:
        """What an engine is to be asked."""
        return replace(self.request, new_token_ids=tuple(self.tokens), client=self.client)


@dataclass
class Totals:
    """Counts of engines that never fall, as a counter of Prometheus must not."""

    preemptions: int = 0
    flushes: dict[int, tuple[int, float]] = field(default_factory=dict)
    """As in `Stats`."""

    def add(self, stats: Stats) -> None:
        """Count another engine."""
        self.preemptions += stats.preemptions
        for positions, (count, seconds) in stats.flushes.items():
            before = self.flushes.get(positions, (0, 0.0))
            self.flushes[positions] = before[0] + count, before[1] + seconds


class Replica:
    """A process with an engine; `serve.server.replicas.process` is the other side."""

    def __init__(self, settings: dict[str, Any], num_threads: int) -> None:
        self.settings = settings
        self.streams: dict[int, Stream] = {}
        self.stats: Stats | None = None
        """None until it is ready."""
        self.last_heard = time.monotonic()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = socket.socketpair()
        self._socket = ours
        with theirs, hangups_blocked():
            self.process = subprocess.Popen(
                child_command("serve.server.replicas.process", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                env={"OMP_NUM_THREADS": str(num_threads), **os.environ},
                # Ctrl-C and the like are for the server, which ends the others.
                start_new_session=True,
            )
        self._writer: asyncio.StreamWriter | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.stats is not None

    @property
    def said(self) -> str:
        """What it wrote last, to stderr or stdout."""
        return last_output(self._errors)

    def has_room(self, stream: Stream) -> bool:
        """Return whether a request would soon run, with none beside it that may end the engine.

        One of a client that has no other here would, however many those of others are: the engine
        gives clients rows in turn.
        """
        if any(other.is_suspect for other in self.streams.values()):
            return False
        if stream.is_suspect:
            return not self.streams
        if len(self.streams) < AHEAD * int(self.settings["engine"]["max_running"]):
            return True
        return all(other.client != stream.client for other in self.streams.values())

    @property
    def cost(self) -> int:
        """Of all its requests."""
        return sum(stream.cost for stream in self.streams.values())

    def send(self, message: Message) -> None:
        """Tell it something; what is said to one that has ended is lost."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(pack(message))

    async def messages(self) -> AsyncIterator[Message]:
        """All that it says until it ends."""
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        self.send(self.settings)
        unpacker = Unpacker()
        try:
            while data := await reader.read(RECEIVE_BYTES):
                self.last_heard = time.monotonic()
                for message in unpacker.feed(data):
                    yield message
        except ConnectionError:
            pass  # it ended
        finally:
            self._writer.close()

    def kill(self) -> None:
        """End it at once, even if it is stopped."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)

    async def ended(self) -> str:
        """Wait for it, and tell how it ended and what it said last."""
        with suppress(subprocess.TimeoutExpired):
            # Its socket closes before it has said what was wrong.
            await asyncio.to_thread(self.process.wait, LAST_WORDS_SECONDS)
        self.kill()
        code = await asyncio.to_thread(self.process.wait)
        tail = self.said
        self._errors.close()
        how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with code {code}"
        return f"ended {how}; what it said last: {tail or 'nothing'}"


class Replicas:
    """An engine on each of `devices`, kept running.

    threads: of each engine on a CPU.
    """

    def __init__(self, config: ServerConfig, devices: Sequence[str], num_threads: int) -> None:
        self._config, self._devices, self._num_threads = config, list(devices), num_threads
        self._replicas: list[Replica | None] = [None] * len(devices)
        self._waiting: FairQueue[Stream] = FairQueue()
        """For an engine that has room."""
        self._failed_starts = [0] * len(devices)
        self._last_error = ""
        """For the log; an engine's words may have paths, and no client gets them."""
        self._has_been_ready = False
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = Totals()
        """Counts of the engines that ended."""
        self.num_restarts = self.num_resumed = 0
        self.step_observers: list[Any] = []
        """Called with each report of an engine."""

    def __len__(self) -> int:
        return len(self._devices)

    async def start(self) -> None:
        """Start every engine. Raises OSError if the first of them cannot start."""
        self._tasks = [
            asyncio.create_task(self._keep_running(index)) for index in range(len(self._devices))
        ]
        self._tasks.append(asyncio.create_task(self._watch()))
        for task in self._tasks:
            task.add_done_callback(_log_failure)

    async def ready(self, is_wanted: Callable[[], bool]) -> None:
        """Wait until an engine takes requests, or is wanted no more. Raises OSError if none can be
        started."""
        while is_wanted() and not any(self.running):
            if self._cannot_start:
                raise OSError(f"no engine could be started: {self._last_error}")
            await asyncio.sleep(WATCH_SECONDS / 4)

    async def stop(self) -> None:
        """End every engine."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.kill()
        for replica in filter(None, self._replicas):
            await replica.ended()

    def kill(self) -> None:
        """End every engine at once."""
        for replica in filter(None, self._replicas):
            replica.kill()

    @property
    def running(self) -> list[Replica]:
        """Engines that take requests."""
        return [its for its in self._replicas if its is not None and its.is_ready]

    @property
    def is_loading(self) -> bool:
        """Whether no engine has been ready yet."""
        return not self._has_been_ready

    @property
    def is_healthy(self) -> bool:
        """Whether an engine has lately given a sign of life."""
        oldest = time.monotonic() - self._config.watchdog_seconds
        return any(replica.last_heard >= oldest for replica in self.running)

    @property
    def stats(self) -> list[Stats]:
        """Of every engine that takes requests."""
        return [replica.stats for replica in self.running if replica.stats is not None]

    def totals(self) -> "Totals":
        """Return what all engines together have counted, those that ended included."""
        totals = Totals(self._ended.preemptions, dict(self._ended.flushes))
        for stats in self.stats:
            totals.add(stats)
        return totals

    @property
    def num_waiting(self) -> int:
        """Requests whose prefill has not begun."""
        return self._waiting_by_client().total()

    def _waiting_by_client(self) -> Counter[str]:
        streams = [stream for replica in self.running for stream in replica.streams.values()]
        streams = [stream for stream in streams if stream.scheduled is None]
        return Counter(stream.client for stream in [*self._waiting, *streams])

    def submit(self, requests: Sequence[Request], client: str = "") -> list[Stream]:
        """Begin requests of a client. Raises Busy if too many wait, Unavailable if no engine can be
        had."""
        if self._cannot_start:
            raise Unavailable(NO_ENGINE)
        if not self._has_been_ready:
            raise Unavailable("the model is being loaded: try again in a moment")
        self._require_room(len(requests), client)
        streams = [Stream(next(self._numbers), request, client) for request in requests]
        self._waiting.add(streams)
        self._place_waiting()
        return streams

    def _require_room(self, count: int, client: str) -> None:
        """Raise Busy if so many more requests of a client may not wait.

        One client alone may fill the queue; a full one still has room for others, up to an equal
        share of each that waits.
        """
        waiting, most = self._waiting_by_client(), self._config.max_waiting
        if waiting.total() + count <= most:
            return
        share = most // len(waiting.keys() | {client})
        if waiting[client] + count > share:
            raise Busy(f"{waiting.total()} requests wait, and {most} may: try again later")

    async def outputs(self, stream: Stream) -> AsyncIterator[Output]:
        """What comes of a request, until its last output. A reader that stops early ends it.

        Raises Refused if the engine does not take it, Unavailable if none can be had any more.
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
        """End a request now, and free its pages within a step."""
        self._waiting.remove(stream)
        for replica in filter(None, self._replicas):
            if replica.streams.pop(stream.number, None) is not None:
                replica.send({"abort": stream.number})
        self._place_waiting()

    def give_up(self) -> None:
        """End every request with Unavailable: the server has waited for them long enough."""
        replicas = list(filter(None, self._replicas))
        streams = list(self._waiting)
        for replica in replicas:
            streams += replica.streams.values()
        for stream in streams:
            stream.outputs.put_nowait(Unavailable("the server stops: try another"))

    @property
    def _cannot_start(self) -> bool:
        is_failing = all(count >= MOST_FAILED_STARTS for count in self._failed_starts)
        return is_failing and not self.running

    def _place_waiting(self) -> None:
        """Give requests that wait to engines that have room, those with the least to do first."""
        while (placement := self._placement()) is not None:
            stream, replica = placement
            self._waiting.take(stream)
            replica.streams[stream.number] = stream
            replica.send({"add": stream.number, "request": request_to_wire(stream.rest())})

    def _placement(self) -> tuple[Stream, Replica] | None:
        """Return the request whose turn it is, of those that an engine has room for."""
        for stream in self._waiting.heads():
            free = [replica for replica in self.running if replica.has_room(stream)]
            if free:
                return stream, min(free, key=lambda replica: replica.cost)
            if stream.is_suspect:
                return None  # engines come to an end with what they have, or it would never run
        return None

    async def _keep_running(self, index: int) -> None:
        while True:
            settings = self._config.replica_json(self._devices[index])
            try:
                replica = self._replicas[index] = Replica(settings, self._num_threads)
            except OSError as error:  # no file, process or memory is left for it
                self._replicas[index] = None
                await self._failed_to_start(index, str(error))
                continue
            try:
                async for message in replica.messages():
                    await self._hear(index, replica, message)
            except Exception:
                # Its requests go on in another: without this they would wait for ever.
                logger.exception("engine %d on %s cannot be heard", index, self._devices[index])
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
                self._tell(index, how)
            else:
                await self._failed_to_start(index, how)

    def _tell(self, index: int, how: str) -> None:
        self._last_error = f"engine {index} on {self._devices[index]} {how}"
        logger.error(self._last_error)

    async def _failed_to_start(self, index: int, how: str) -> None:
        """Wait before the next try, longer each time; requests do not, once none can be had."""
        self._tell(index, how)
        self._failed_starts[index] += 1
        if self._cannot_start:
            for stream in self._waiting.clear():
                stream.outputs.put_nowait(Unavailable(NO_ENGINE))
        await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, 2.0 ** self._failed_starts[index] - 1))

    async def _hear(self, index: int, replica: Replica, message: Message) -> None:
        if "ready" in message:
            replica.stats = Stats.from_json(message["ready"])
            self._has_been_ready = True
            self._failed_starts[index] = 0
            if replica.said:
                logger.warning("engine %d on %s: %s", index, self._devices[index], replica.said)
            self._place_waiting()
        elif "refused" in message:
            refused = replica.streams.pop(message["refused"], None)
            if refused is not None:
                refused.outputs.put_nowait(Refused(message["error"]))
        else:
            replica.stats = Stats.from_json(message["stats"])
            for number, when in message["scheduled"]:
                if (stream := replica.streams.get(number)) is not None:
                    stream.scheduled = stream.scheduled or when
            pauses = Pauses()
            for values in message["outputs"]:
                self._take(replica, output_from_wire(values))
                await pauses.pause_if_due()
            self._place_waiting()
            for observe in self.step_observers:
                observe(message)

    def _take(self, replica: Replica, output: Output) -> None:
        stream = replica.streams.get(output.request_id)
        if stream is None:
            return  # its reader went away
        stream.num_moves = 0
        stream.tokens += output.new_token_ids
        if output.finish_reason is not None:
            del replica.streams[output.request_id]
        stream.outputs.put_nowait(output)

    def _move(self, replica: Replica) -> None:
        """The requests of an engine that ended to others."""
        streams, replica.streams = replica.streams, {}
        for stream in list(streams.values()):
            stream.num_moves += 1
            if stream.num_moves > MOST_MOVES:
                error = Unavailable(
                    f"{stream.num_moves} engines ended while they had this request: it may be what "
                    "ends them"
                )
                del streams[stream.number]
                stream.outputs.put_nowait(error)
        self.num_resumed += len(streams)
        self._waiting.put_back(streams.values())
        self._place_waiting()

    async def _watch(self) -> None:
        """Kill engines that give no sign of life."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            for replica in filter(None, self._replicas):
                most = self._config.watchdog_seconds if replica.is_ready else START_SECONDS
                if replica.last_heard < now - most:
                    logger.error("process %d gave no sign of life", replica.process.pid)
                    replica.kill()
                    replica.last_heard = now  # said once, however long its end takes


def _log_failure(task: "asyncio.Task[None]") -> None:
    """Of a task that should never end; /health then tells that no engine is heard of."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("a task of the server failed", exc_info=error)
