"""The other ranks of a group as the first one sees them: processes that do as it does.

`serve.parallel.follower` is a process's side. Messages are msgpack maps as in `serve.wire`. To a
follower: its settings, then `{"compile": {..}}` for a constraint, `{"check": true}`, and a turn for
each step: `{"turn": [..], "digest": number}`, with what comes before the step, in its order and
each packed by itself: `{"add": {..}}` for a request and `{"abort": id}`. The digest is of the
outputs of the step before, which must be the same on every rank. From a follower:
`{"at": "start"}` and `{"at": "end"}` of loading.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from serve.request import Output
from serve.wire import Message, Unpacker, pack
from stu.common.cli import FAULT
from stu.common.processes import child_command, hangups_blocked

RECEIVE_BYTES = 2**16
END_SECONDS = 5.0
"""Time for a process whose socket has closed to end."""
NOTICE_SECONDS = 5.0
"""Time in which the end of a rank becomes known after an exchange with it has failed."""


class Followers:
    """Processes of all ranks of a group but the first, which end with this process.

    Args:
        devices: Device of each rank, with that of this process first.
        settings: First message to each; its rank is added.
        ends_process: End this process with any of them, as it may wait for a device that never
            answers. Else `require_all` raises an error.
        release: Function that lets this process no longer wait for the others.
    """

    def __init__(
        self,
        devices: Sequence[str],
        settings: Message,
        ends_process: bool,
        release: Callable[[], None],
    ) -> None:
        self._devices, self._ends_process, self._release = devices, ends_process, release
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._arrived: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Places that followers have reached, and an empty text for each that has ended."""
        self._lost, self._sending = threading.Event(), threading.Lock()
        self._failure, self._is_closing = "", False
        try:
            for rank in range(1, len(devices)):
                self._start(rank, {**settings, "rank": rank, "device": devices[rank]})
        except BaseException:
            self.close()
            raise

    def send(self, message: Message) -> None:
        """Send a message to every follower. Raises RuntimeError if one has ended."""
        packed = pack(message)
        try:
            with self._sending:
                for own in self._sockets.values():
                    own.sendall(packed)
        except OSError as error:
            self.require_all(error)
            raise

    def wait(self) -> None:
        """Wait until every follower has come as far as this process. Raises RuntimeError if one has
        ended."""
        for _ in self._sockets:
            if not self._arrived.get():
                self.require_all()

    def require_all(self, cause: Exception | None = None) -> None:
        """Raise RuntimeError if a follower has ended. cause: A failure that this would explain."""
        if self._lost.wait(NOTICE_SECONDS if cause else 0):
            raise RuntimeError(self._failure) from cause

    def close(self) -> None:
        """End the processes."""
        self._is_closing = True
        for own in self._sockets.values():
            with suppress(OSError):  # the process has ended
                own.shutdown(socket.SHUT_RDWR)  # `close` alone would wait for the thread that reads
            own.close()
        for process in self._processes.values():
            _end(process)

    def _start(self, rank: int, settings: Message) -> None:
        ours, theirs = socket.socketpair()
        self._sockets[rank] = ours
        with theirs, hangups_blocked():
            self._processes[rank] = subprocess.Popen(
                child_command("serve.parallel.follower", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process alone
            )
        ours.sendall(pack(settings))
        threading.Thread(target=self._hear, args=[rank, ours], daemon=True).start()

    def _hear(self, rank: int, own: socket.socket) -> None:
        """Take the messages of a follower until it ends."""
        unpacker = Unpacker()
        try:
            while data := own.recv(RECEIVE_BYTES):
                for message in unpacker.feed(data):
                    self._arrived.put(message["at"])
        except OSError:
            pass  # it ended, or this process closed the socket
        if self._is_closing:
            return
        code = _end(self._processes[rank])
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        name = f"rank {rank} of {len(self._devices)} on {self._devices[rank]}"
        self._failure = f"{name} ended {how}"
        self._lost.set()
        self._arrived.put("")
        if self._ends_process:
            print(self._failure, file=sys.stderr, flush=True)
            os._exit(FAULT)
        self._release()


def digest_of(outputs: Sequence[Output]) -> int:
    """Return a number that tells outputs of a step apart by their tokens and their ends."""
    texts = [f"{own.request_id} {own.new_token_ids} {own.finish_reason}" for own in outputs]
    return zlib.crc32("\n".join(texts).encode())


def _end(process: "subprocess.Popen[bytes]") -> int:
    """Wait for a process that is to end, kill it if it does not, and return its exit code."""
    try:
        return process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _has_descriptor(stream: Any) -> bool:
    """Return whether a process can write to this stream; one of a notebook is no file."""
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
