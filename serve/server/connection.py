"""A client's connection with a deadline in each phase.

uvicorn has a deadline only for idle connections. Here there is one

- for headers, from their first byte or from the start of the connection,
- for the body, from the end of the headers,
- for the answer, from the end of the body: the time limit of a request and a little more,
- and for a client that takes nothing of its answer.
"""

import asyncio
import fcntl
import json
import logging
import struct
import termios
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.openai.errors import error_body
from serve.server.exchange import LOCAL, has_file, request_id

logger = logging.getLogger(__name__)

STALL_SECONDS = 60.0
"""Time for which a client may take no byte of its answer."""
ANSWER_GRACE_SECONDS = 10.0
"""Time to take the end of an answer, after the time limit of its request."""
LINGER_SECONDS, LINGER_BYTES = 5.0, 2**24
"""Limits of what is still read of a refused request: a socket that is closed with unread bytes
resets the connection, and its client sees no answer."""
FED_BYTES = 2**14
"""Bytes that are parsed before other connections have their turn."""
UNTIMED_PATHS = ("/admin/reload",)
"""Paths whose answers may take any time: a reload waits for all requests of one replica after the
other."""
CLOSE_SECONDS = 5.0
"""Time that a connection may take to close once its client has the whole answer."""
REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}

Phase = Literal["headers", "idle", "body", "answer", "refused"]


class Registry(Protocol):
    """All connections, as one of them sees it."""

    deadlines: "Deadlines"

    def note(self, connection: "Connection") -> None:
        """Note that a connection has entered another phase."""

    def forget(self, connection: "Connection") -> None:
        """Forget a connection that has ended."""

    def count_refused(self, status: int) -> None:
        """Count a request that was refused with a status."""


@dataclass(frozen=True)
class Deadlines:
    """Times in seconds that a client may take."""

    headers: float
    body: float
    request: float
    """Time from the end of the body to the end of the answer."""
    file_factor: float = 1.0
    """Factor of these times for requests with a file."""


class Connection(H11Protocol):
    """uvicorn's connection with deadlines."""

    def __init__(self, registry: Registry, **settings: Any) -> None:
        super().__init__(**settings)
        self.app_state = {**self.app_state, "cut_off_if_stalled": self.cut_off_if_stalled}
        self._registry = registry
        self.opener = asyncio.current_task()
        """Task that ends once the connection is made, with TLS after its handshake."""
        self.phase: Phase = "headers"
        self._deadline = float("inf")
        self._phase_cycle: Any = None
        self._unsent, self._taken_at = 0, time.monotonic()
        self._closing_at: float | None = None
        self._num_discarded = 0
        self._pending = bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, as `asyncio.Protocol`."""
        super().connection_made(transport)
        self.client = self.client or (LOCAL, 0)
        self._begin("headers")

    def data_received(self, data: bytes) -> None:
        """Handle bytes of the client, as `asyncio.Protocol`."""
        if self.phase == "refused":
            self._num_discarded += len(data)
            if self._num_discarded > LINGER_BYTES:
                self.transport.abort()
            return
        self._pending += data
        if len(self._pending) == len(data):
            self._feed()

    def on_response_complete(self) -> None:
        """Handle the end of an answer, as `H11Protocol`."""
        super().on_response_complete()
        self._update()

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the connection, as `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._registry.forget(self)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, as `H11Protocol`."""
        limit = self.config.h11_max_incomplete_event_size or 0
        if len(self.conn.trailing_data[0]) > limit:
            self._refuse(431, f"the headers have more than {limit} bytes: send less")
        else:
            self._refuse(400, msg)

    def check(self, now: float) -> None:
        """End the connection if a deadline is over."""
        transport = self.transport
        unsent = transport.get_write_buffer_size() + _unacknowledged(transport)
        # A client may take bytes and still have more unsent, until writing waits for it.
        is_growing = unsent > self._unsent and not self.flow.write_paused
        if unsent == 0 or unsent < self._unsent or is_growing:
            self._taken_at = now
        self._unsent = unsent
        self._update()
        if transport.is_closing():
            self._closing_at = self._closing_at or now
            is_over = (
                now - self._taken_at > STALL_SECONDS or now > self._deadline
                if unsent
                else now - self._closing_at > CLOSE_SECONDS
            )
            if is_over:
                transport.abort()
        elif unsent and now - self._taken_at > STALL_SECONDS:
            self.cut_off(f"its client took none of {unsent} bytes for {STALL_SECONDS:g} seconds")
        elif now > self._deadline:
            self._expire()

    def cut_off(self, reason: str) -> None:
        """End the connection at once, without sending the rest."""
        logger.warning("a connection was cut off: %s", reason)
        self.transport.abort()

    def cut_off_if_stalled(self, reason: str) -> bool:
        """End the connection at once if writing waits for its client; return whether it does. A
        client is not to blame for what this process has yet to write."""
        is_stalled = self.flow.write_paused
        if is_stalled:
            self.cut_off(reason)
        return is_stalled

    def _feed(self) -> None:
        """Parse what has come, a part at a time, as a body in chunks of a byte takes long."""
        if self.transport.is_closing():
            return
        part = bytes(self._pending[:FED_BYTES])
        del self._pending[:FED_BYTES]
        super().data_received(part)
        self._update()
        if self.phase == "refused" or self.transport.is_closing():
            self._pending.clear()
        elif self._pending:
            self.transport.pause_reading()
            self.loop.call_soon(self._feed)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    @property
    def _is_written(self) -> bool:
        """Whether the operating system has the whole answer."""
        return not self.transport.get_write_buffer_size()

    def _update(self) -> None:
        """Determine the phase."""
        if self.phase == "refused" or self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:
            phase: Phase = "body"
        elif self.cycle is not None and not (self.cycle.response_complete and self._is_written):
            phase = "answer"
        elif self.cycle is None or self.conn.trailing_data[0]:
            phase = "headers"
        else:
            phase = "idle"
        if (phase, self.cycle) != (self.phase, self._phase_cycle):
            self._begin(phase)

    def _begin(self, phase: Phase) -> None:
        deadlines = self._registry.deadlines
        self.phase, self._phase_cycle = phase, self.cycle
        is_file = phase in ("body", "answer") and has_file(self.scope)
        factor = deadlines.file_factor if is_file else 1.0
        seconds = {
            "headers": deadlines.headers,
            # Later than uvicorn's own, which a stray byte cancels.
            "idle": self.timeout_keep_alive + CLOSE_SECONDS,
            "body": deadlines.body * factor,
            "answer": deadlines.request * factor + ANSWER_GRACE_SECONDS,
            "refused": LINGER_SECONDS,
        }
        self._deadline = time.monotonic() + seconds[phase]
        if phase == "answer" and self.scope["path"] in UNTIMED_PATHS:
            self._deadline = float("inf")
        self._registry.note(self)

    def _expire(self) -> None:
        limit = self._registry.deadlines
        if self.phase == "headers" and self.conn.trailing_data[0]:
            self._refuse(408, f"the headers took longer than {limit.headers:g} seconds")
        elif self.phase == "body" and not self.cycle.response_started:
            self._refuse(408, f"the body took longer than {limit.body:g} seconds")
        elif self.phase == "answer":
            self.cut_off("its client did not take an answer within the time limit of a request")
        else:
            self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer instead of the application, and read for a while what is still sent."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # its answer has begun
            return
        has_headers = self.conn.our_state is h11.SEND_RESPONSE
        if has_headers:
            self.scope["state"]["is_refused"] = True
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._registry.count_refused(status)
        own_id = request_id(self.headers if has_headers else ())
        fields = {"request_id": own_id, "status": status}
        logger.info("refused with %d: %s", status, message, extra={"fields": fields})
        body = json.dumps(error_body(message, "invalid_request_error")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"x-request-id", own_id.encode()),
        ]
        is_head = has_headers and self.scope["method"] == "HEAD"
        for event in (
            h11.Response(status_code=status, headers=headers, reason=REASONS[status]),
            h11.Data(data=b"" if is_head else body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self._unset_keepalive_if_required()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._begin("refused")


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Return the bytes that the system holds for the client, 0 if it cannot tell."""
    try:
        descriptor = transport.get_extra_info("socket").fileno()
        return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0" * 4))[0])
    except (OSError, ValueError, AttributeError):  # ValueError: TLS closes it before it says so
        return 0
