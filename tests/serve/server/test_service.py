"""The service of a server, without replicas."""

import asyncio
import threading
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest

from serve.config import EngineConfig
from serve.server.access.limits import UNLIMITED
from serve.server.app import make_app
from serve.server.completion_routes import _ended
from serve.server.config import ServerConfig
from serve.server.exchange import Exchange, Exchanges
from serve.server.replicas.stream import Busy, Stream, Unavailable
from serve.server.service import make_service
from stu.common.errors import UserError

ENGINE = EngineConfig(cache_gib=0.01)


def service_of(model_directory, **settings):
    return make_service(ServerConfig(model_directory, engine=ENGINE, **settings))


@pytest.mark.anyio
async def test_rows_of_batches_take_no_places_at_the_door(model_directory):
    (service,) = service_of(model_directory, max_waiting=2, max_choices=2).models
    service.is_open.clear()
    async with AsyncExitStack() as stack:

        async def enter(is_background):
            await stack.enter_async_context(service.entered(is_background))

        tasks = [asyncio.create_task(enter(is_background=True)) for _ in range(5)]
        tasks += [asyncio.create_task(enter(is_background=False)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="2 requests wait"):
            await enter(is_background=False)
        assert service.current.num_entering == 0
        service.is_open.set()
        await asyncio.gather(*tasks)
        assert service.current.num_entering == 7


@pytest.mark.parametrize("name", ["responses.sqlite3", "batches.sqlite3"])
def test_a_damaged_database_is_an_error_of_the_user(model_directory, tmp_path, name):
    (tmp_path / name).write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="file is not a database") as error:
        service_of(model_directory, batch_dir=tmp_path)
    assert error.value.field == "batch_dir"


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "x", "max_tokens": 9}, "max_tokens"),
        ("chat/completions", {"messages": [USER]}, "max_tokens"),
        (
            "chat/completions",
            {"messages": [USER], "max_completion_tokens": 9},
            "max_completion_tokens",
        ),
        ("responses", {"input": "x", "max_output_tokens": 30}, "max_output_tokens"),
        ("embeddings", {"input": "x" * 30}, "input"),
        ("score", {"text_1": "x" * 30, "text_2": "x"}, "text_1"),
    ],
)
def test_a_request_above_a_full_allowance_names_its_own_field(model_directory, path, body, param):
    app = Exchanges(make_app(service_of(model_directory, tokens_per_minute=2)), log_texts=False)

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://stu") as http:
            return await http.post(f"/v1/{path}", json=body)

    answer = asyncio.run(ask())
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (
        400,
        param,
        "rate_limit_exceeded",
    ), error


def test_requests_are_made_in_another_thread_and_go_to_a_replica_uncopied(
    model_directory, monkeypatch
):
    """As each copy of a long prompt takes time in which no stream goes on."""
    service = service_of(model_directory, max_choices=4)
    app, threads, streams = Exchanges(make_app(service), log_texts=False), [], []

    def copied(*values, **fields):
        threads.append(threading.current_thread())
        return replace(*values, **fields)

    def submit(requests, *values):
        streams.extend(Stream(number, own, *values) for number, own in enumerate(requests))
        raise Unavailable("no replica")

    monkeypatch.setattr("serve.server.completion_routes.replace", copied)
    monkeypatch.setattr(service.models[0].current.replicas, "submit", submit)

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://stu") as http:
            return await http.post("/v1/completions", json={"prompt": "x", "n": 4})

    assert asyncio.run(ask()).status_code == 503
    assert threading.current_thread() not in threads
    assert len(streams) == 4
    for stream in streams:
        assert stream.client == stream.request.client != ""
        assert stream.rest() is stream.request
        stream.new_token_ids.append(5)
        assert stream.rest() == replace(stream.request, new_token_ids=(5,))


def test_traces_have_the_name_of_the_model_that_answers():
    found = []
    service = SimpleNamespace(tracing=SimpleNamespace(record=lambda *values: found.append(values)))
    usage = {"total_tokens": 2}
    answer = SimpleNamespace(
        exchange=Exchange("id"), frame={"model": "an-adapter"}, usage=lambda: usage
    )
    _ended(service, "chat", UNLIMITED, answer)
    assert found == [("chat", "an-adapter", "id", {}, answer)]
