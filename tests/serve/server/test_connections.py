"""Deadlines of connections and their number, in this process, with applications of a few lines."""

import asyncio
import json
import logging
import resource
import socket
import ssl
import subprocess
from contextlib import asynccontextmanager

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from serve.openai.errors import error_body
from serve.server import connection as connection_module
from serve.server import connections as connections_module
from serve.server.connection import FED_BYTES, Connection, Deadlines
from serve.server.connections import SPARE, Connections, connection_limit
from serve.server.exchange import Exchanges
from serve.server.guard import Guard
from serve.server.logs import MOST_EQUAL, MOST_KINDS, PERIOD_SECONDS, Repeats
from stu.common.errors import UserError

NEVER = 1000.0
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"
CHUNKED = POST.replace(b"content-length: 10", b"transfer-encoding: chunked")
ALL_THE_TIME = Deadlines(NEVER, NEVER, NEVER)
START = {"type": "http.response.start", "status": 200, "headers": []}


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch):
    monkeypatch.setattr(connections_module, "SWEEP_SECONDS", 0.01)


async def hello(scope, receive, send):
    await send(START)
    await send({"type": "http.response.body", "body": b"hello"})


async def after_the_body(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await hello(scope, receive, send)


async def not_found(scope, receive, send):
    content = json.dumps(error_body("no such path", "")).encode()
    headers = [(b"content-length", str(len(content)).encode())]
    await send({**START, "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def never(scope, receive, send):
    await send(START)
    await asyncio.Event().wait()


async def endless(scope, receive, send):
    await send(START)
    while (await asyncio.sleep(0)) is None and not endless.is_over:
        await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})


@asynccontextmanager
async def listening(app, deadlines=None, most=100, context=None, count=lambda status: None):
    """Connections, and a function that opens one."""
    config = uvicorn.Config(app, http="h11", log_config=None, h11_max_incomplete_event_size=4096)
    config.load()
    state = ServerState()
    connections = Connections(most, deadlines or ALL_THE_TIME, count)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections.listen(
            [listener],
            lambda: Connection(connections, config=config, server_state=state, app_state={}),
            context,
        )
        try:
            yield connections, lambda: asyncio.open_connection(*listener.getsockname())
        finally:
            await connections.stop_accepting()
            connections._tasks[-1].cancel()
            for task in state.tasks:
                task.cancel()
            await asyncio.gather(*connections._tasks, *state.tasks, return_exceptions=True)


def status_of(answer):
    return int(answer.split(b" ", 2)[1]) if answer else None


async def read(reader):
    """Everything up to the connection's end; None for one that is reset."""
    try:
        return await asyncio.wait_for(reader.read(), 60)
    except ConnectionError:
        return None


@pytest.mark.parametrize(
    ("sent", "app", "deadlines", "status"),
    [
        (b"", hello, (0.1, NEVER, NEVER), None),
        (b"GET / HT", hello, (0.1, NEVER, NEVER), 408),
        (GET + b"GET", hello, (0.1, NEVER, NEVER), 200),
        (POST, after_the_body, (NEVER, 0.1, NEVER), 408),
        (POST + b"12345", after_the_body, (NEVER, 0.1, NEVER), 408),
        (POST + b"12345", hello, (NEVER, 0.1, NEVER), 200),  # which does not read the body
    ],
)
def test_what_does_not_come_in_time(sent, app, deadlines, status):
    async def run():
        async with listening(app, Deadlines(*deadlines)) as (connections, connect):
            reader, writer = await connect()
            writer.write(sent)
            answer = await read(reader)
            writer.close()
            while len(connections):
                await asyncio.sleep(0.01)
            return answer

    answer = asyncio.run(run())
    assert status_of(answer) == status
    if status == 408:
        assert (
            "took longer than 0.1 seconds"
            in json.loads(answer.split(b"\r\n\r\n")[1])["error"]["message"]
        )
    if sent.startswith(GET):
        assert answer.count(b"HTTP/1.1") == 2, "the second request has its own deadline"


@pytest.mark.parametrize("head", [b"", POST.replace(b"10", b"10000")])
def test_bytes_that_trickle_move_no_deadline(head):
    """Neither those of headers nor those of a body."""

    async def run():
        app = after_the_body
        async with listening(app, Deadlines(0.3, 0.3, NEVER)) as (_, connect):
            reader, writer = await connect()
            writer.write(head)
            answer = asyncio.create_task(read(reader))
            while not answer.done():
                writer.write(b"x")
                await asyncio.sleep(0.02)
            return await answer

    assert status_of(asyncio.run(run())) == 408


def test_a_reader_that_reads_nothing_is_cut_off(monkeypatch, caplog):
    monkeypatch.setattr(connection_module, "STALL_SECONDS", 0.3)
    endless.is_over = False

    async def run():
        async with listening(endless) as (connections, connect):
            _, writer = await connect()
            writer.write(GET)
            while not connections._busy:
                await asyncio.sleep(0.01)
            while len(connections):
                await asyncio.sleep(0.01)
            endless.is_over = True
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert "its client took none of" in caplog.text


def test_an_answer_ends_with_its_time_limit(monkeypatch, caplog):
    monkeypatch.setattr(connection_module, "ANSWER_GRACE_SECONDS", 0.1)

    async def run():
        async with listening(never, Deadlines(NEVER, NEVER, 0.1)) as (_, connect):
            reader, writer = await connect()
            writer.write(GET)
            await read(reader)
            writer.close()

    asyncio.run(run())
    assert "did not take an answer within the time limit" in caplog.text


def test_a_closing_connection_ends_though_its_client_reads_nothing(monkeypatch):
    monkeypatch.setattr(connection_module, "STALL_SECONDS", 0.1)

    async def large(scope, receive, send):
        await send({**START, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"x" * 2**25})

    async def run():
        async with listening(large) as (connections, connect):
            _, writer = await connect()
            writer.write(GET)
            while not connections._busy:
                await asyncio.sleep(0.01)
            while len(connections):
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))


class StubTransport(asyncio.Transport):
    """One of which a test says what is unsent."""

    unsent, is_aborted, closing = 0, False, False

    def get_write_buffer_size(self):
        return self.unsent

    def is_closing(self):
        return self.closing

    def abort(self):
        self.is_aborted = self.closing = True

    def get_extra_info(self, name, default=None):
        return default


@asynccontextmanager
async def answering():
    """A connection whose answer goes on, and its transport."""
    config = uvicorn.Config(never, http="h11", log_config=None)
    config.load()
    registry, transport, state = Connections(9, ALL_THE_TIME), StubTransport(), ServerState()
    made = Connection(registry, config=config, server_state=state, app_state={})
    transport.write = transport.resume_reading = transport.pause_reading = lambda *_: None
    made.connection_made(transport)
    made.data_received(GET)
    try:
        yield made, transport
    finally:
        for task in state.tasks:
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)


def seconds_until_aborted(made, transport, unsent_after):
    """What a client takes is what `unsent_after` a number of seconds is less."""
    began = made._taken_at
    for second in range(300):
        transport.unsent = unsent_after(second)
        made.check(began + second + 0.5)
        if transport.is_aborted:
            return second
    return None


@pytest.mark.parametrize(
    ("unsent_after", "is_paused", "is_closing", "seconds"),
    [
        (lambda second: 1000 * second, False, False, None),  # it takes less than is written
        (lambda second: 10**6, True, False, 60),
        (lambda second: 10**6 + second % 3, True, False, None),
        (lambda second: 10**6 - second, False, True, None),
        (lambda second: 10**6, False, True, 61),
        (lambda second: 0, False, True, 6),
    ],
)
def test_only_readers_that_take_nothing_are_cut_off(unsent_after, is_paused, is_closing, seconds):
    """A slow one that takes less than is written was as well, and one of an answer after which its
    connection is closed lost the end."""

    async def run():
        async with answering() as (made, transport):
            transport.closing = is_closing
            if is_paused:
                made.pause_writing()
            return seconds_until_aborted(made, transport, unsent_after)

    assert asyncio.run(run()) == seconds


def test_an_answer_that_is_still_taken_makes_no_room():
    size = 2**25

    async def large(scope, receive, send):
        await send({**START, "headers": [(b"content-length", str(size).encode())]})
        await send({"type": "http.response.body", "body": b"x" * size})

    async def run():
        async with listening(large, most=1) as (connections, connect):
            reader, writer = await connect()
            writer.write(GET)
            await reader.readuntil(b"\r\n\r\n")
            (made,) = connections._busy
            while not made.cycle.response_complete:
                await asyncio.sleep(0.01)
            other, other_writer = await connect()
            other_writer.write(GET)
            assert status_of(await read(other)) == 503
            other_writer.close()
            assert len(await reader.readexactly(size)) == size
            while not connections._idle:
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (POST.replace(b"POST", b"HEAD"), 408),
        (CHUNKED.replace(b"POST", b"HEAD") + b"no size\r\n", 400),
    ],
)
def test_a_refusal_of_head_has_no_body(sent, status):
    """One that had was a fault, which ended the deadlines of all."""

    async def run():
        async with listening(after_the_body, Deadlines(NEVER, 0.1, NEVER)) as (_, connect):
            reader, writer = await connect()
            writer.write(sent)
            answer = await read(reader)
            writer.close()
            return answer

    answer = asyncio.run(run())
    assert status_of(answer) == status
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("sent", "most", "status"),
    [
        (b"GET / HT", 9, 408),
        (POST, 9, 408),
        (CHUNKED + b"no size\r\n", 9, 400),
        (b"\x16\x03\x01", 9, 400),
        (GET, 0, 503),
    ],
)
def test_what_is_refused_below_the_application_is_counted_and_logged_once(
    sent, most, status, caplog
):
    """A body that was late counted as one whose client went away."""
    counted = []
    guarded = Guard(after_the_body, [], 1024)
    app = Exchanges(guarded, log_texts=False, count=counted.append)
    sent = sent.replace(b"host: x", b"host: x\r\nx-request-id: mine")

    async def run():
        deadlines = Deadlines(0.1, 0.1, NEVER)
        async with listening(app, deadlines, most, count=counted.append) as (_, connect):
            reader, writer = await connect()
            writer.write(sent)
            answer = await read(reader)
            writer.close()
            return answer

    with caplog.at_level(logging.INFO):
        answer = asyncio.run(run())
    assert counted == [status_of(answer)] == [status]
    refused = [line.fields for line in caplog.records if "refused with" in line.message]
    assert [its["status"] for its in refused] == [status]
    if b"mine" in sent:
        assert refused[0]["request_id"] == "mine"


def test_a_connection_that_fails_leaves_the_others_their_deadlines(monkeypatch, caplog):
    check, failing = Connection.check, []

    def check_or_fail(made, now):
        if made in failing:
            raise RuntimeError("of this one")
        check(made, now)

    monkeypatch.setattr(Connection, "check", check_or_fail)

    async def run():
        async with listening(never, Deadlines(0.3, NEVER, NEVER)) as (connections, connect):
            _, broken = await connect()
            broken.write(GET)
            while not connections._busy:
                await asyncio.sleep(0.01)
            failing.extend(connections._busy)
            reader, writer = await connect()
            assert await read(reader) == b""
            while len(connections):
                await asyncio.sleep(0.01)
            broken.close()
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert "of this one" in caplog.text


def test_a_socket_that_is_closed_holds_nothing():
    """TLS closes it before its connection hears of that."""

    class Closed(StubTransport):
        def get_extra_info(self, name, default=None):
            with socket.socket() as closed:
                pass
            return closed

    assert connection_module._unacknowledged(Closed()) == 0


def test_the_longest_idle_makes_room():
    async def run():
        async with listening(hello, most=3) as (connections, connect):
            opened = [await connect()]
            opened[0][1].write(GET)
            assert status_of(await opened[0][0].readline()) == 200
            for count in (2, 3):
                opened.append(await connect())
                while len(connections) < count:
                    await asyncio.sleep(0.01)
            reader, writer = await connect()
            writer.write(GET)
            assert status_of(await reader.readline()) == 200
            assert len(connections) <= 3
            await read(opened[0][0])  # the first, which was answered and then idle
            for other in opened[1:]:
                assert not other[0].at_eof()
            for _, other in [*opened, (reader, writer)]:
                other.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_where_none_is_idle_health_is_answered_and_nothing_else(caplog):
    async def app(scope, receive, send):
        await (hello if scope["path"] == "/health" else never)(scope, receive, send)

    async def run():
        async with listening(app, most=2) as (connections, connect):
            opened = []
            for count in (1, 2):
                opened.append(await connect())
                opened[-1][1].write(GET)
                while len(connections._busy) < count:
                    await asyncio.sleep(0.01)
            for path, status in ((b"/health", 200), (b"/other", 503)):
                reader, writer = await connect()
                writer.write(GET.replace(b"/ ", path + b" ").replace(b"\r\n\r\n", b"\r\n", 1)[:-2])
                writer.write(b"\r\nconnection: close\r\n\r\n")
                assert status_of(await read(reader)) == status
                writer.close()
            connections._busy |= {object(): None for _ in range(SPARE)}
            reader, _ = await connect()
            assert await read(reader) in (b"", None)
            connections._busy.clear()
            for _, writer in opened:
                writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert "a connection was refused: 2 others are busy" in caplog.text


def test_handshakes_have_a_deadline_and_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(connections_module, "HANDSHAKE_SECONDS", 0.2)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj"]
    command += ["/CN=localhost", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def run(seconds):
        monkeypatch.setattr(connections_module, "HANDSHAKE_SECONDS", seconds)
        async with listening(hello, most=3, context=context) as (connections, connect):
            opened = [await connect() for _ in range(9 if seconds == NEVER else 2)]
            for reader, writer in opened[:2]:
                assert await read(reader) in (b"", None)
                writer.close()
            for _, writer in opened[2:]:
                writer.close()
            while len(connections):
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(0.2), 60))
    asyncio.run(asyncio.wait_for(run(NEVER), 60))


def test_descriptors_that_are_used_up_make_a_pause(monkeypatch, caplog):
    monkeypatch.setattr(connections_module, "ACCEPT_PAUSE_SECONDS", 0.05)

    async def run():
        loop, left = asyncio.get_running_loop(), 3
        accept = loop.sock_accept

        async def failing(listener):
            nonlocal left
            if left:
                left -= 1
                raise OSError(24, "Too many open files")
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", failing)
        async with listening(hello) as (_, connect):
            reader, writer = await connect()
            writer.write(GET)
            assert status_of(await reader.readline()) == 200
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert caplog.text.count("no connection can be accepted: Too many open files") == 3


def test_chunks_of_a_byte_are_parsed_in_parts(monkeypatch):
    """A hundred thousand chunks in one packet stopped everything for a second."""
    sent = CHUNKED + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n" + GET
    sizes, receive_data = [], H11Protocol.data_received

    def data_received(protocol, data):
        sizes.append(len(data))
        receive_data(protocol, data)

    monkeypatch.setattr(H11Protocol, "data_received", data_received)

    async def run():
        async with listening(after_the_body) as (_, connect):
            reader, writer = await connect()
            writer.write(sent)
            await reader.readuntil(b"hello\r\n0\r\n\r\nHTTP/1.1 200")
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert sum(sizes) == len(sent)
    assert max(sizes) <= FED_BYTES


@pytest.mark.parametrize("size", [2**20, 2**24])
@pytest.mark.parametrize("status", [413, 401, 503, 404])
def test_a_client_that_writes_all_before_it_reads_sees_why_it_is_refused(size, status):
    """Sockets that are closed with unread bytes reset the connection."""
    limit = 1024 if status == 413 else 2 * size
    app = Exchanges(Guard(not_found, ["key"] if status == 401 else [], limit), False)
    most = 0 if status == 503 else 100
    head = "POST /v1/x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head = f"{head}content-length: {size}\r\n\r\n".encode()

    async def run():
        async with listening(app, most=most) as (_, connect):
            reader, writer = await connect()
            for data in (head, *[b"x" * 2**16] * (size // 2**16)):
                writer.write(data)
                await writer.drain()
            answer = await read(reader)
            writer.close()
            return answer

    answer = asyncio.run(run())
    assert status_of(answer) == status
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["message"]


@pytest.mark.parametrize(
    ("sent", "status"), [(b"no http\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nx: " + b"y" * 9999, 431)]
)
def test_what_is_no_http_is_refused_in_words(sent, status):
    async def run():
        async with listening(hello) as (_, connect):
            reader, writer = await connect()
            writer.write(sent)
            await writer.drain()
            answer = await read(reader)
            writer.close()
            return answer

    answer = asyncio.run(run())
    assert status_of(answer) == status
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["message"]


def test_connections_leave_files_to_engines(monkeypatch):
    limits = {}
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: limits.update({kind: values}))
    for (soft, hard), fewest, most in [
        ((256, 1024), 700, 1000),
        ((1024, 1024), 700, 1000),
        ((1024, resource.RLIM_INFINITY), 8192, 8192),
    ]:
        monkeypatch.setattr(resource, "getrlimit", lambda kind, values=(soft, hard): values)
        assert fewest <= connection_limit(1) <= most
        assert connection_limit(4) <= connection_limit(1)
    assert limits[resource.RLIMIT_NOFILE] == (2**16, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    with pytest.raises(UserError, match="limit of 64 open files leaves 0 connections"):
        connection_limit(1)


def test_equal_lines_are_counted(caplog):
    now = 0.0
    repeats = Repeats(lambda: now)
    logger = logging.getLogger("stu.test")
    caplog.handler.addFilter(repeats)
    caplog.set_level(logging.INFO)
    try:
        for number in range(1000):
            logger.info("accepted %d of %s", number, "many")
            logger.info("request ended")
        logger.info("another")
        repeats.report()
        assert len(caplog.messages) == MOST_EQUAL + 1000 + 1
        caplog.clear()
        now = PERIOD_SECONDS
        repeats.report()
        (line,) = caplog.messages
        assert line.startswith(f"{1000 - MOST_EQUAL} more lines in 10 s were like this one")
        caplog.clear()
        for number in range(1000):
            logger.info("%s", "x" * number)
        assert len(caplog.messages) <= MOST_KINDS + MOST_EQUAL
    finally:
        caplog.handler.removeFilter(repeats)
