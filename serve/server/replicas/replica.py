"""A replica as the server sees it: a process with an engine, and the requests that it has.

`serve.server.replicas.process` is the process's side.
"""

import asyncio
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import IO, Any

from serve.engine.stats import Stats
from serve.server.replicas.prefixes import SentPrefixes
from serve.server.replicas.stream import Stream
from serve.wire import Message, Unpacker, pack
from stu.common.processes import child_command, hangups_blocked, last_output

RECEIVE_BYTES = 2**20
AHEAD = 1.25
"""Requests that a replica has at most, as a multiple of those that it decodes together. Others wait
in the server, to go to whichever replica has room first."""
LAST_OUTPUT_SECONDS = 5.0
"""Time for a process whose socket has closed to write why, and to end."""


class Replica:
    """A process with an engine.

    Args:
        settings: First message to the process, see `serve.wire`.
        num_threads: Threads that the engine computes with on a CPU.

    Raises:
        OSError: The process cannot be started.
    """

    is_retiring = False
    """Whether it takes no new requests."""
    free_bytes = 0
    """Free memory of its GPU when it last reported that."""

    def __init__(self, settings: dict[str, Any], num_threads: int) -> None:
        self.settings = settings
        self.streams: dict[int, Stream] = {}
        """Requests that the engine has, by number."""
        self.stats: Stats | None = None
        """Last statistics of the engine, None until it is ready."""
        self.prefixes = SentPrefixes()
        """Prefixes of the prompts that it was sent."""
        self.last_heard = time.monotonic()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._end: str | None = None
        self._socket, theirs = socket.socketpair()
        with theirs, hangups_blocked():
            self.process = subprocess.Popen(
                child_command("serve.server.replicas.process", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                env={"OMP_NUM_THREADS": str(num_threads), **os.environ},
                # Ctrl-C is for the server alone, which ends the replicas.
                start_new_session=True,
            )
        self._writer: asyncio.StreamWriter | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.stats is not None

    @property
    def last_output(self) -> str:
        """Last lines that the process wrote to stderr or stdout."""
        return last_output(self._errors)

    def cost(self, stream: Stream) -> tuple[int, int]:
        """Return how many tokens its requests that a new one would wait for still need, and how
        many all of them need."""
        costs = [other.cost for other in self.streams.values()]
        return sum(other.cost for other in self._at_least(stream.priority)), sum(costs)

    def num_remembered(self, stream: Stream) -> int:
        """Return how many tokens of a prompt the engine probably remembers.

        An engine without a prefix cache never looks for any.
        """
        if self.stats is None or not self.stats.prefix_tokens_asked:
            return 0
        return self.prefixes.num_tokens(stream.prefix)

    def has_room(self, stream: Stream) -> bool:
        """Return whether a request would run soon, and not beside one that may end the process.

        Those of lower priority do not count, as the engine preempts them for it. A client's first
        request here always would, as the engine gives clients rows in turn.
        """
        if self.is_retiring:
            return False
        if any(other.is_suspect for other in self.streams.values()):
            return False
        if stream.is_suspect:
            return not self.streams
        before = self._at_least(stream.priority)
        if len(before) < AHEAD * int(self.settings["engine"]["max_running"]):
            return True
        return all(other.client != stream.client for other in before)

    def _at_least(self, priority: int) -> list[Stream]:
        """Return its requests that a request of this priority does not overtake."""
        return [stream for stream in self.streams.values() if stream.priority <= priority]

    def send(self, packed: bytes) -> None:
        """Send a message of `serve.wire.pack`, which is lost if the process has ended."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(packed)

    async def messages(self) -> AsyncIterator[Message]:
        """Yield the messages of the process until it ends."""
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        self.send(pack(self.settings))
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
        """End the process at once, even if it is stopped."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)

    async def ended(self) -> str:
        """Wait until the process has ended; return how, and its last output."""
        if self._end is not None:
            return self._end
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, LAST_OUTPUT_SECONDS)
        self.kill()
        code = await asyncio.to_thread(self.process.wait)
        words = self.last_output
        self._errors.close()
        how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with code {code}"
        self._end = f"ended {how}; its last output: {words or 'none'}"
        return self._end
