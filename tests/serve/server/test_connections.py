"""Deadlines and limits of connections, in this process, with applications of a few lines."""

import asyncio
import json
import logging
import re
import resource
import socket
import ssl
import time
from contextlib import asynccontextmanager
from unittest.mock import AsyncMock, Mock

import anyio
import pytest
import uvicorn
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from serve.openai.errors import error_body
from serve.server import connection as connection_module
from serve.server import connections as connections_module
from serve.server.access.keys import Keys
from serve.server.connection import FED_BYTES, Connection, Deadlines
from serve.server.connections import SPARE, Connections, connection_limit
from serve.server.exchange import Exchanges
from serve.server.guard import Guard
from serve.server.http_server import trusted_proxies
from serve.server.operating.logs import MOST_EQUAL, MOST_KINDS, PERIOD_SECONDS, Repeats
from stu.common.errors import UserError
from tests.serve.server_process import SECONDS

pytestmark = pytest.mark.anyio

NEVER = 1000.0
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"
CHUNKED = POST.replace(b"content-length: 10", b"transfer-encoding: chunked")
NO_DEADLINES = Deadlines(NEVER, NEVER, NEVER)
HEADER_DEADLINE = Deadlines(0.1, NEVER, NEVER)
BODY_DEADLINE = Deadlines(NEVER, 0.1, NEVER)
START = {"type": "http.response.start", "status": 200, "headers": []}
LARGE_BYTES = 2**25


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch):
    monkeypatch.setattr(connections_module, "SWEEP_SECONDS", 0.01)


async def hello(scope, receive, send):
    await send(START)
    await send({"type": "http.response.body", "body": b"hello"})


async def hello_after_body(scope, receive, send):
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
    while True:
        await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
        await asyncio.sleep(0)


def large(**headers):
    """An application whose answer is larger than what a socket holds."""

    async def app(scope, receive, send):
        fields = [(name.encode(), value) for name, value in headers.items()]
        await send({**START, "headers": [*fields, (b"content-length", b"%d" % LARGE_BYTES)]})
        await send({"type": "http.response.body", "body": b"x" * LARGE_BYTES})

    return app


def connection_maker(app, connections, state, **settings):
    config = uvicorn.Config(
        app,
        http="h11",
        log_config=None,
        h11_max_incomplete_event_size=4096,
        timeout_keep_alive=NEVER,
        **settings,
    )
    config.load()
    return lambda: Connection(connections, config=config, server_state=state, app_state={})


@asynccontextmanager
async def listening(app, deadlines=NO_DEADLINES, most=100, context=None, count=lambda status: None):
    """Connections, and a function that opens one, which is closed at the end."""
    connections = Connections(most, deadlines, count, context)
    state, writers = ServerState(), []
    with anyio.fail_after(SECONDS), socket.create_server(("127.0.0.1", 0)) as listener:
        connections.listen([listener], connection_maker(app, connections, state))

        async def connect():
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writers.append(writer)
            return reader, writer

        try:
            yield connections, connect
        finally:
            await connections.stop_accepting()
            tasks = [connections._tasks[-1], *state.tasks]
            for task in tasks:
                task.cancel()
            for writer in writers:
                writer.close()
            await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds):
    while not holds():
        await asyncio.sleep(0.01)


async def read(reader):
    """Everything up to the connection's end; None for one that is reset."""
    try:
        return await reader.read()
    except ConnectionError:
        return None


async def answer_to(sent, app, *settings, **more):
    """Send all bytes on a new connection, and return everything that comes back."""
    async with listening(app, *settings, **more) as (connections, connect):
        reader, writer = await connect()
        writer.write(sent)
        await writer.drain()
        answer = await read(reader)
        writer.close()
        await until(lambda: not len(connections))
        return answer


def statuses(answer):
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", answer or b"")]


@pytest.mark.parametrize(
    ("sent", "app", "deadlines", "expected"),
    [
        (b"", hello, HEADER_DEADLINE, []),
        (GET + b"GET", hello, HEADER_DEADLINE, [200, 408]),
        (POST + b"12345", hello, BODY_DEADLINE, [200]),  # which does not read the body
    ],
)
async def test_late_connection_ends(sent, app, deadlines, expected):
    assert statuses(await answer_to(sent, app, deadlines)) == expected


@pytest.mark.parametrize(
    ("sent", "deadlines", "status"),
    [
        (b"GET / HT", HEADER_DEADLINE, 408),
        (POST, BODY_DEADLINE, 408),
        (POST + b"12345", BODY_DEADLINE, 408),
        (POST.replace(b"POST", b"HEAD"), BODY_DEADLINE, 408),
        (CHUNKED + b"no size\r\n", NO_DEADLINES, 400),
        (CHUNKED.replace(b"POST", b"HEAD") + b"no size\r\n", NO_DEADLINES, 400),
        (b"\x16\x03\x01", NO_DEADLINES, 400),
        (b"no http\r\n\r\n", NO_DEADLINES, 400),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 9999, NO_DEADLINES, 431),
        (GET, NO_DEADLINES, 503),
    ],
)
async def test_refusal_below_the_application(sent, deadlines, status, caplog):
    """It says why, except to HEAD, and is counted and logged once, with the request's ID."""
    counted = []
    app = Exchanges(
        Guard(hello_after_body, Keys(), 1024, 1024), log_texts=False, count=counted.append
    )
    sent = sent.replace(b"host: x", b"host: x\r\nx-request-id: mine")
    most = 0 if status == 503 else 9
    caplog.set_level(logging.INFO)
    answer = await answer_to(sent, app, deadlines, most, count=counted.append)
    assert counted == statuses(answer) == [status]
    (line,) = [line.fields for line in caplog.records if "refused with" in line.message]
    assert "a connection was cut off" not in caplog.text
    headers, body = answer.split(b"\r\n\r\n")
    assert line["status"] == status
    assert f"x-request-id: {line['request_id']}".encode() in headers.split(b"\r\n")
    assert line["request_id"] == "mine" or b"mine" not in sent
    if sent.startswith(b"HEAD"):
        assert body == b""
    else:
        message = json.loads(body)["error"]["message"]
        assert message if status != 408 else "took longer than 0.1 seconds" in message


@pytest.mark.parametrize("head", [b"", POST.replace(b"10", b"10000")])
async def test_bytes_that_trickle_move_no_deadline(head):
    async with listening(hello_after_body, Deadlines(0.3, 0.3, NEVER)) as (_, connect):
        reader, writer = await connect()
        writer.write(head)
        answer = asyncio.create_task(read(reader))
        while not answer.done():
            writer.write(b"x")
            await asyncio.sleep(0.02)
    assert statuses(answer.result()) == [408]


@pytest.mark.parametrize(
    ("app", "logged"), [(endless, "its client took none of"), (large(connection=b"close"), "")]
)
async def test_client_that_reads_nothing_is_cut_off(monkeypatch, caplog, app, logged):
    monkeypatch.setattr(connection_module, "STALL_SECONDS", 0.3)
    async with listening(app) as (connections, connect):
        _, writer = await connect()
        writer.write(GET)
        await until(lambda: connections._busy)
        await until(lambda: not len(connections))
    assert logged in caplog.text


async def test_answer_ends_with_its_time_limit(monkeypatch, caplog):
    monkeypatch.setattr(connection_module, "ANSWER_GRACE_SECONDS", 0.1)
    await answer_to(GET, never, Deadlines(NEVER, NEVER, 0.1))
    assert "did not take an answer within the time limit" in caplog.text


@pytest.mark.parametrize(("path", "is_cut_off"), [(b"/v1/models", True), (b"/admin/reload", False)])
async def test_only_a_reload_may_take_longer_than_a_request(path, is_cut_off):
    transport = Mock(**{"is_closing.return_value": False, "get_extra_info.return_value": None})
    transport.get_write_buffer_size.return_value = 0
    state = ServerState()
    connection = connection_maker(never, Connections(9, NO_DEADLINES), state)()
    connection.connection_made(transport)
    connection.data_received(GET.replace(b"/ ", path + b" "))
    for task in state.tasks:
        task.cancel()
    connection.check(time.monotonic() + 2 * NEVER)
    assert transport.abort.called == is_cut_off


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
async def test_only_clients_that_take_nothing_are_cut_off(
    unsent_after, is_paused, is_closing, seconds
):
    transport = Mock(**{"is_closing.return_value": False, "get_extra_info.return_value": None})
    transport.get_write_buffer_size.return_value = 0
    state = ServerState()
    connection = connection_maker(never, Connections(9, NO_DEADLINES), state)()
    connection.connection_made(transport)
    connection.data_received(GET)
    for task in state.tasks:
        task.cancel()  # the answer goes on without it
    transport.is_closing.return_value = is_closing
    if is_paused:
        connection.pause_writing()
    began, aborted_after = connection._taken_at, None
    for second in range(300):
        transport.get_write_buffer_size.return_value = unsent_after(second)
        connection.check(began + second + 0.5)
        if transport.abort.called:
            aborted_after = second
            break
    assert aborted_after == seconds


@pytest.mark.parametrize(
    ("trusted", "forwarded", "client"),
    [
        (None, None, "local"),
        (None, "1.1.1.1", "1.1.1.1"),
        (None, "1.1.1.1, 2.2.2.2", "2.2.2.2"),  # who could write the first one itself
        ("2.2.2.2", "1.1.1.1, 2.2.2.2", "1.1.1.1"),
        ("*", "1.1.1.1, 2.2.2.2", "1.1.1.1"),
    ],
)
async def test_the_last_proxy_names_the_client_at_a_unix_socket(
    monkeypatch, tmp_path, trusted, forwarded, client
):
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if trusted is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
    found = []

    async def app(scope, receive, send):
        found.append(scope["client"][0])
        await hello(scope, receive, send)

    connections = Connections(100, NO_DEADLINES)
    proxies = {"forwarded_allow_ips": trusted_proxies()}
    path = tmp_path / "socket"
    with anyio.fail_after(SECONDS), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        connections.listen([listener], connection_maker(app, connections, ServerState(), **proxies))
        reader, writer = await asyncio.open_unix_connection(path)
        header = b"" if forwarded is None else b"x-forwarded-for: " + forwarded.encode() + b"\r\n"
        writer.write(GET[:-2] + header + b"\r\n")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.close()
        await connections.stop_accepting()
        connections._tasks[-1].cancel()
    assert found == [client]


@pytest.mark.parametrize("proxy", ["127.0.0.1", "::1", "10.0.0.5"])
async def test_more_proxies_are_trusted_beside_those_of_this_machine(monkeypatch, proxy):
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.5")
    scope = {"type": "http", "client": (proxy, 1), "headers": []}
    scope["headers"] += [(b"x-forwarded-for", b"203.0.113.9, 10.0.0.5")]
    app = AsyncMock()
    await ProxyHeadersMiddleware(app, trusted_proxies())(scope, None, None)
    assert app.call_args.args[0]["client"][0] == "203.0.113.9"


def test_closed_socket_has_nothing_unacknowledged():
    """TLS closes the socket before the connection is told."""
    with socket.socket() as closed:
        pass
    transport = Mock(**{"get_extra_info.return_value": closed})
    assert connection_module._unacknowledged(transport) == 0


async def test_answer_that_is_still_being_read_makes_no_room():
    async with listening(large(), most=1) as (connections, connect):
        reader, writer = await connect()
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        (connection,) = connections._busy
        await until(lambda: connection.cycle.response_complete)
        other_reader, other_writer = await connect()
        other_writer.write(GET)
        assert statuses(await read(other_reader)) == [503]
        assert len(await reader.readexactly(LARGE_BYTES)) == LARGE_BYTES
        await until(lambda: connections._idle)


async def test_connection_that_fails_leaves_the_others_their_deadlines(monkeypatch, caplog):
    check, failing = Connection.check, []

    def check_or_fail(connection, now):
        if connection in failing:
            raise RuntimeError("of this connection")
        check(connection, now)

    monkeypatch.setattr(Connection, "check", check_or_fail)
    async with listening(never, Deadlines(0.3, NEVER, NEVER)) as (connections, connect):
        _, writer = await connect()
        writer.write(GET)
        await until(lambda: connections._busy)
        failing.extend(connections._busy)
        reader, _ = await connect()
        assert await read(reader) == b""
        await until(lambda: not len(connections))
    assert "of this connection" in caplog.text


async def test_longest_idle_connection_makes_room():
    async with listening(hello, most=3) as (connections, connect):
        readers = []
        for number in range(4):
            reader, writer = await connect()
            readers.append(reader)
            if number in (0, 3):  # the first is idle once it is answered
                writer.write(GET)
                assert statuses(await reader.readline()) == [200]
            await until(lambda number=number: len(connections) == min(number + 1, 3))
        await read(readers[0])
        assert not any(reader.at_eof() for reader in readers[1:])


async def test_only_health_is_answered_when_no_connection_is_idle(caplog):
    async def app(scope, receive, send):
        await (hello if scope["path"] == "/health" else never)(scope, receive, send)

    async with listening(app, most=2) as (connections, connect):
        for count in (1, 2):
            _, writer = await connect()
            writer.write(GET)
            await until(lambda count=count: len(connections._busy) == count)
        for path, status in ((b"/health", 200), (b"/other", 503)):
            reader, writer = await connect()
            writer.write(b"GET %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path)
            assert statuses(await read(reader)) == [status]
        connections._busy |= {object(): None for _ in range(SPARE)}
        reader, _ = await connect()
        assert await read(reader) in (b"", None)
        connections._busy.clear()
    assert "a connection was refused: 2 others are busy" in caplog.text


@pytest.mark.parametrize(("seconds", "num_connections"), [(0.2, 2), (NEVER, 9)])
async def test_handshakes_have_a_deadline_and_make_room(
    monkeypatch, certificate, seconds, num_connections
):
    monkeypatch.setattr(connections_module, "HANDSHAKE_SECONDS", seconds)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    async with listening(hello, most=3, context=context) as (connections, connect):
        opened = [await connect() for _ in range(num_connections)]
        for reader, _ in opened[:2]:
            assert await read(reader) in (b"", None)
        for _, writer in opened:
            writer.close()
        await until(lambda: not len(connections))


async def test_pause_when_no_file_descriptor_is_left(monkeypatch, caplog):
    monkeypatch.setattr(connections_module, "ACCEPT_PAUSE_SECONDS", 0.05)
    loop, num_failures = asyncio.get_running_loop(), 3
    accept = loop.sock_accept

    async def failing(listener):
        nonlocal num_failures
        if num_failures:
            num_failures -= 1
            raise OSError(24, "Too many open files")
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", failing)
    async with listening(hello) as (_, connect):
        reader, writer = await connect()
        writer.write(GET)
        assert statuses(await reader.readline()) == [200]
    assert caplog.text.count("no connection can be accepted: Too many open files") == 3


async def test_body_in_chunks_of_a_byte_is_parsed_in_parts(monkeypatch):
    """So that others have their turn meanwhile."""
    sent = CHUNKED + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n" + GET
    sizes, receive_data = [], H11Protocol.data_received

    def data_received(protocol, data):
        sizes.append(len(data))
        receive_data(protocol, data)

    monkeypatch.setattr(H11Protocol, "data_received", data_received)
    async with listening(hello_after_body) as (_, connect):
        reader, writer = await connect()
        writer.write(sent)
        await reader.readuntil(b"hello\r\n0\r\n\r\nHTTP/1.1 200")
    assert sum(sizes) == len(sent)
    assert max(sizes) <= FED_BYTES


@pytest.mark.parametrize("size", [2**20, 2**24])
@pytest.mark.parametrize("status", [413, 401, 503, 404])
async def test_client_that_writes_all_before_it_reads_sees_why_it_is_refused(
    monkeypatch, size, status
):
    """Sockets that are closed with unread bytes reset the connection."""
    limit = 1024 if status == 413 else 2 * size
    if status == 401:
        monkeypatch.setenv("STU_API_KEYS", "key")
    app = Exchanges(Guard(not_found, Keys(), limit, limit), False)
    head = "POST /v1/x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head = f"{head}content-length: {size}\r\n\r\n".encode()
    answer = await answer_to(head + b"x" * size, app, most=0 if status == 503 else 100)
    assert statuses(answer) == [status]
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
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1024))
    assert connection_limit(1, 64) == connection_limit(1) - 64
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
