"""Errors of the server itself: 500 with an id for the client, and a traceback in the log."""

import asyncio
import builtins
import json
import logging
from types import SimpleNamespace

import httpx
import pytest

from serve.config import EngineConfig
from serve.server.app import make_app
from serve.server.completion_routes import with_last_events
from serve.server.config import ServerConfig
from serve.server.exchange import FAULT, Exchange, Exchanges
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.dispatcher import ENGINE_FAILED
from serve.server.replicas.stream import Abandoned, EngineError, Stream, Unavailable
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.service import make_service
from serve.server.streams import TimedOut, event
from stu.common.errors import UserError
from tests.serve.requests import make_request


def shorter(*_, strict):
    """A zip of iterables whose lengths differ."""
    return builtins.zip((1, 2), (1,), strict=strict)


def failing(*_):
    raise ValueError("/a/secret/path")


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


EXCHANGE_LOG = "serve.server.exchange"
CONSTRAINED = {"messages": [{"role": "user", "content": "x"}]}
CONSTRAINED |= {"response_format": {"type": "regex", "regex": "x"}}


@pytest.mark.parametrize(
    ("name", "fault", "asked"),
    [
        ("serve.server.operating.replica_metrics.zip", shorter, ("GET", "/metrics", None)),
        ("serve.prompts.derived_seed", failing, ("POST", "/v1/completions", {"prompt": "x"})),
        (
            "serve.server.model_version.Grammars.check",
            failing,
            ("POST", "/v1/chat/completions", CONSTRAINED),
        ),
    ],
)
def test_a_fault_is_500_with_an_id_and_a_logged_traceback(
    ask, monkeypatch, caplog, name, fault, asked
):
    monkeypatch.setattr(name, fault, raising=False)
    with caplog.at_level(logging.INFO):
        answer = ask(*asked)
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "own")
    error = {"message": FAULT, "type": "server_error", "param": None, "code": None}
    assert answer.json() == {"error": error}
    failed, refused = [record for record in caplog.records if record.name == EXCHANGE_LOG]
    assert failed.exc_info[1].__traceback__ is not None
    assert failed.fields["request_id"] == refused.fields["request_id"] == "own"
    assert refused.fields["status"] == 500


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (Unavailable("loading"), {"retry-after": "1"}),
        (Abandoned("6 replicas ended"), {"x-should-retry": "false"}),
    ],
)
def test_clients_send_nothing_again_that_ends_replicas(ask, monkeypatch, error, headers):
    def fail(*_):
        raise error

    monkeypatch.setattr("serve.prompts.derived_seed", fail)
    answer = ask("POST", "/v1/completions", {"prompt": "x"})
    assert answer.status_code == 503
    names = "retry-after", "x-should-retry"
    assert {name: answer.headers[name] for name in names if name in answer.headers} == headers


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
        last = with_last_events(answer, outputs, events(), lambda error: [event(error)])
        return [text async for text in last]

    first, last = asyncio.run(read())
    assert first == "data: {}\n\n"
    body = json.loads(last.removeprefix("data: "))["error"]
    assert body["type"] == kind
    assert body["message"].startswith(message)
    faults = [record.fields for record in caplog.records if record.exc_info]
    assert faults == ([{"request_id": "own"}] if message == FAULT else [])


def test_errors_of_a_replica_reach_the_reader(tmp_path, caplog):
    replicas = Replicas(ReplicasConfig(tmp_path))
    replica = SimpleNamespace(streams={n: Stream(n, make_request([1], 5)) for n in (1, 2)})
    streams = dict(replica.streams)
    error = {"field": "max_new_tokens", "message": "it needs 9 pages", "code": None}

    async def outputs():
        await replicas._hear(0, replica, {"refused": 1, "error": error})
        await replicas._hear(0, replica, {"failed": 2, "trace": "Traceback: /a/secret/path"})
        return [streams[number].outputs.get_nowait() for number in (1, 2)]

    refused, failed = asyncio.run(outputs())
    assert isinstance(refused, UserError)
    assert (refused.field, str(refused)) == ("max_new_tokens", "it needs 9 pages")
    assert (type(failed), str(failed)) == (EngineError, ENGINE_FAILED)
    assert "Traceback: /a/secret/path" in caplog.text
    assert replica.streams == {}
