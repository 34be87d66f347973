"""Errors of the server itself: 500 with an id for the client, and a traceback in the log."""

import asyncio
import builtins
import json
import logging
import socket
import threading
from contextlib import suppress
from dataclasses import asdict
from types import SimpleNamespace

import httpx
import pytest

from serve.config import EngineConfig
from serve.server.app import make_app
from serve.server.completion_routes import _with_error_event
from serve.server.config import ServerConfig
from serve.server.exchange import FAULT, Exchange, Exchanges
from serve.server.replicas.dispatch import ENGINE_FAILED, Replicas
from serve.server.replicas.process import Replica
from serve.server.replicas.stream import EngineError, Stream, Unavailable
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.replicas.wire import Unpacker, pack, request_to_wire
from serve.server.service import make_service
from serve.server.streams import TimedOut
from stu.common.errors import UserError
from tests.serve.requests import make_request
from tests.serve.server_process import SECONDS


def shorter(*_, strict):
    """A zip of iterables whose lengths differ."""
    return builtins.zip((1, 2), (1,), strict=strict)


def raising(error):
    def call(*_):
        raise error

    return call


@pytest.fixture
def ask(model_directory):
    """Call with a method, a path and a body: the answer of a server without replicas."""
    engine = EngineConfig(cache_gib=0.01)
    service = make_service(ServerConfig(model_directory, engine=engine))
    app = Exchanges(make_app(service), log_texts=False)

    async def answer(method, path, body):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://stu") as http:
            return await http.request(method, path, json=body, headers={"x-request-id": "own"})

    return lambda *request: asyncio.run(answer(*request))


@pytest.mark.parametrize(
    ("name", "fault", "request_"),
    [
        ("serve.server.metrics.zip", shorter, ("GET", "/metrics", None)),
        (
            "serve.prompts.derived_seed",
            raising(ValueError("/a/secret/path")),
            ("POST", "/v1/completions", {"prompt": "x"}),
        ),
        (
            "serve.server.service.Grammars.check",
            raising(RuntimeError("/a/secret/path")),
            (
                "POST",
                "/v1/chat/completions",
                {
                    "messages": [{"role": "user", "content": "x"}],
                    "response_format": {"type": "regex", "regex": "x"},
                },
            ),
        ),
    ],
)
def test_a_fault_is_500_with_an_id_and_its_traceback_is_logged(
    ask, monkeypatch, caplog, name, fault, request_
):
    monkeypatch.setattr(name, fault, raising=False)
    with caplog.at_level(logging.INFO):
        answer = ask(*request_)
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "own")
    error = {"message": FAULT, "type": "server_error", "param": None, "code": None}
    assert answer.json() == {"error": error}
    failed, refused = [its for its in caplog.records if its.name == "serve.server.exchange"]
    assert failed.exc_info[1].__traceback__ is not None
    assert failed.fields["request_id"] == refused.fields["request_id"] == "own"
    assert refused.fields["status"] == 500


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("n", 0, "positive"), "invalid_request_error", "n=0 is not allowed"),
        (Unavailable("stopping"), "server_error", "stopping"),
        (TimedOut("too late"), "server_error", "too late"),
        (EngineError("failed"), "server_error", "failed"),
        (ValueError("zip() argument 2 is shorter"), "server_error", FAULT),
    ],
)
def test_an_error_in_mid_stream_is_the_last_event(caplog, error, kind, message):
    async def events():
        yield "data: {}\n\n"
        raise error

    async def read():
        answer, outputs = SimpleNamespace(exchange=Exchange("own")), events()
        return [text async for text in _with_error_event(answer, outputs, events())]

    first, last = asyncio.run(read())
    assert first == "data: {}\n\n"
    body = json.loads(last.removeprefix("data: "))["error"]
    assert body["type"] == kind
    assert body["message"].startswith(message)
    faults = [record.fields for record in caplog.records if record.exc_info]
    assert faults == ([{"request_id": "own"}] if message == FAULT else [])


def test_a_faulty_request_does_not_end_its_replica(model_directory):
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    unpacker = Unpacker()

    def reports():
        while True:
            yield from unpacker.feed(ours.recv(2**16))

    def run():
        with suppress(SystemExit, ConnectionError), theirs:
            Replica(theirs).run()

    thread = threading.Thread(target=run)
    thread.start()
    good = request_to_wire(make_request([1, 100], 2))
    too_long = request_to_wire(make_request([1, 100], 2000))
    with ours:
        settings = {"model": str(model_directory), "device": "cpu", "dtype": "float32"}
        ours.sendall(pack({**settings, "engine": asdict(EngineConfig(cache_gib=0.01))}))
        messages = reports()
        assert "ready" in next(messages)
        ours.sendall(pack({"add": 7, "request": {"of": "another version"}}))
        failed = next(report for report in messages if "failed" in report)
        assert failed["failed"] == 7
        assert "Traceback" in failed["trace"]
        ours.sendall(pack({"add": 8, "request": too_long}))
        refused = next(report for report in messages if "refused" in report)
        assert refused["error"]["code"] == "context_length_exceeded"
        ours.sendall(pack({"add": 9, "request": good}))
        outputs = (output for report in messages for output in report["outputs"])
        assert next(outputs)["request_id"] == 9
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_what_a_replica_refuses_or_fails_at_reaches_the_reader(tmp_path, caplog):
    replicas = Replicas(ReplicasConfig(tmp_path))
    replica = SimpleNamespace(streams={n: Stream(n, make_request([1], 5)) for n in (1, 2)})
    streams = dict(replica.streams)
    error = {"field": "max_new_tokens", "message": "it needs 9 pages", "code": None}

    async def outputs():
        await replicas._hear(0, replica, {"refused": 1, "error": error})
        await replicas._hear(0, replica, {"failed": 2, "trace": "Traceback: /a/secret/path"})
        return [streams[number].outputs.get_nowait() for number in (1, 2)]

    refused, failed = asyncio.run(outputs())
    assert (type(refused), refused.field, str(refused)) == (
        UserError,
        "max_new_tokens",
        "it needs 9 pages",
    )
    assert (type(failed), str(failed)) == (EngineError, ENGINE_FAILED)
    assert "Traceback: /a/secret/path" in caplog.text
    assert replica.streams == {}
