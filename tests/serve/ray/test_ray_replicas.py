"""Requests and counts of replicas that Ray Serve runs, with a handle that needs no cluster."""

import asyncio
import threading
from dataclasses import asdict
from unittest.mock import Mock

import pytest

from serve.server.http_server import HttpServer
from serve.server.replicas.stream import Abandoned, EngineError, Stream, Unavailable
from serve.server.replicas.supervisor import ReplicasConfig, Totals
from serve.wire import Unpacker, pack, request_from_wire, request_to_wire
from tests.serve.requests import make_request

ray_replicas = pytest.importorskip("serve.ray.replicas")
engine_replica = pytest.importorskip("serve.ray.engine_replica")
exceptions = pytest.importorskip("ray.exceptions")
pytestmark = pytest.mark.anyio


class Call:
    """A call of `decode`, whose answers a test gives: messages, or an error at the end."""

    def __init__(self, packed, prefix, cost, num_moves):
        (values,) = Unpacker().feed(packed)
        self.request, self.prefix, self.num_moves = request_from_wire(values), prefix, num_moves
        self.answers = asyncio.Queue()

    def __aiter__(self):
        return self

    async def __anext__(self):
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return pack(answer)

    def cancel(self):
        pass


class Handle:
    """A handle of a deployment; `decode` makes calls and `answer` answers them at once."""

    def __init__(self, answer=None):
        self.calls, self._answer = [], answer
        self.decode = self

    def options(self, **_):
        return self

    def remote(self, *packed, **values):
        call = Call(*packed, **values)
        self.calls.append(call)
        if self._answer is not None:
            call.answers.put_nowait(self._answer)
            call.answers.put_nowait(StopAsyncIteration())
        return call


def report(name, num_restarts=0, **counts):
    totals = asdict(Totals(**counts))
    return {"replica": name, "stats": [], "totals": totals, "num_restarts": num_restarts}


@pytest.fixture
def replicas_of(monkeypatch):
    monkeypatch.setattr(ray_replicas, "RETRY_SECONDS", 0)

    def make(handle, max_running=4, disconnect=lambda waits: None):
        replicas = ray_replicas.RayReplicas(lambda: handle, disconnect, 1, max_running, 256, 30.0)
        replicas._handle = handle
        replicas._hear([report("first")])
        return replicas

    return make


async def error_of(replicas):
    (stream,) = replicas.submit([make_request([1, 100], 4)])
    return await asyncio.wait_for(stream.outputs.get(), 20)


async def test_a_request_that_ends_engines_or_actors_is_given_up_and_a_fault_is_not_tried_again(
    replicas_of,
):
    handle = Handle({"abandoned": "6 replicas ended"})
    error = await error_of(replicas_of(handle))
    assert isinstance(error, Abandoned)
    assert (str(error), len(handle.calls)) == ("6 replicas ended", 1)

    handle = Handle(exceptions.ActorDiedError())
    replicas = replicas_of(handle)
    assert isinstance(await error_of(replicas), Abandoned)
    assert (len(handle.calls), replicas.num_resumed) == (6, 5)

    fault = exceptions.RayTaskError("decode", "a traceback", ValueError("wrong"))
    for error in fault, fault.as_instanceof_cause():
        handle = Handle(error)
        found = await error_of(replicas_of(handle))
        assert isinstance(found, EngineError)
        assert len(handle.calls) == 1

    handle = Handle({"unavailable": "no replica can be started"})
    error = await error_of(replicas_of(handle))
    assert not isinstance(error, Abandoned)
    assert len(handle.calls) == ray_replicas.MOST_TRIES + 1


async def test_engines_that_end_in_several_replicas_are_counted_together(replicas_of):
    handle = Handle()
    (stream,) = replicas_of(handle).submit([make_request([1, 100], 4)])

    async def next_call(number):
        while len(handle.calls) <= number:
            await asyncio.sleep(0)
        return handle.calls[number]

    empty, token = ({"request_id": 0, "new_token_ids": ids, "text": ""} for ids in ([], [5]))
    for number, expected in enumerate([0, 3]):
        call = await next_call(number)
        assert call.num_moves == expected
        message = {"outputs": [empty], "num_moves": expected + 2}
        call.answers.put_nowait(message)
        call.answers.put_nowait(exceptions.ActorDiedError())
    error = await asyncio.wait_for(stream.outputs.get(), 20)
    assert (type(error), len(handle.calls)) == (Abandoned, 2)
    assert str(error).startswith("6 replicas ended")

    (stream,) = replicas_of(handle).submit([make_request([1, 100], 4)])
    call = await next_call(2)
    call.answers.put_nowait({"outputs": [empty], "num_moves": 4})
    call.answers.put_nowait({"outputs": [token], "num_moves": 0})
    assert (await asyncio.wait_for(stream.outputs.get(), 20)).new_token_ids == [5]
    call.answers.put_nowait(exceptions.ActorDiedError())
    assert (await next_call(3)).num_moves == 1


async def test_a_replica_counts_the_engines_that_end_and_tells_at_once(tmp_path):
    engine = engine_replica._Engine(ReplicasConfig(tmp_path))
    engine._has_been_ready = True
    replica = object.__new__(engine_replica.EngineReplica)
    replica._replicas = engine
    request = pack(request_to_wire(make_request([1, 100], 4)))
    messages = replica.decode(request, b"", 1, 3)
    found = asyncio.ensure_future(anext(messages))
    while not len(engine._waiting):
        await asyncio.sleep(0)
    (stream,) = engine._waiting.clear()
    assert stream.is_suspect
    engine._move(Mock(streams={stream.number: stream}))
    (message,) = Unpacker().feed(await found)
    assert message["num_moves"] == 4
    (output,) = message["outputs"]
    assert (output["new_token_ids"], output["text"]) == ([], "")
    await messages.aclose()


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (Abandoned("6 replicas ended"), "abandoned"),
        (Unavailable("no replica can be started"), "unavailable"),
        (EngineError("it failed"), "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_replica_tells_why_a_request_ended(error, name):
    request = make_request([1, 100], 4)
    stream = Stream(0, request)
    stream.outputs.put_nowait(error)
    replica = object.__new__(engine_replica.EngineReplica)
    replica._replicas = Mock(submit=lambda *_, **__: [stream])
    request = pack(request_to_wire(request))
    messages = [packed async for packed in replica.decode(request, b"", 1, 0)]
    (message,) = Unpacker().feed(b"".join(messages))
    assert message == {name: str(error)}


async def test_requests_of_lower_priority_take_no_room_of_others(replicas_of):
    handle = Handle()
    replicas = replicas_of(handle)

    def submit(client, priority):
        replicas.submit([make_request([1, 100], 4, priority=priority)], client)

    async def called():
        await asyncio.sleep(0)
        return [(call.request.client, call.request.priority) for call in handle.calls]

    for _ in range(8):
        submit("a", 1)
    assert await called() == [("a", 1)] * 5  # 1.25 times those that a replica decodes together
    for _ in range(6):
        submit("a", 0)
    assert (await called())[5:] == [("a", 0)] * 5
    submit("b", 0)
    submit("b", 0)
    assert (await called())[10:] == [("b", 0)]
    await replicas.stop()


async def test_counts_grow_only_by_what_was_counted(replicas_of):
    replicas = replicas_of(Handle())
    replicas._hear([report("a", 1, preemptions=5), report("b", preemptions=7)])
    assert (replicas.totals().preemptions, replicas.num_restarts) == (12, 1)
    replicas._hear([report("b", preemptions=8)])  # a did not answer in time
    assert (replicas.totals().preemptions, replicas.num_restarts) == (13, 1)
    replicas._hear([report("a", 2, preemptions=6), report("b", preemptions=8)])
    assert (replicas.totals().preemptions, replicas.num_restarts) == (14, 2)


async def test_prefixes_are_sent_only_if_engines_look_for_them(replicas_of):
    handle = Handle()
    replicas = replicas_of(handle)
    for num_asked in 0, 100:
        replicas._hear([report("first", prefix_tokens_asked=num_asked)])
        replicas.submit([make_request([1, *range(100, 200)] * 3, 4)])
        await asyncio.sleep(0)
    assert [bool(call.prefix) for call in handle.calls] == [False, True]
    await replicas.stop()


async def test_the_end_at_once_does_not_wait_for_ray(replicas_of, monkeypatch):
    monkeypatch.setattr(ray_replicas, "KILL_SECONDS", 0.01)
    answered, waited, ended = threading.Event(), [], []

    def disconnect(waits):
        waited.append(waits)
        ended.append(answered.wait(5))

    replicas_of(Handle(), disconnect=disconnect).kill()
    assert (waited, ended) == ([False], [])
    answered.set()


def test_a_second_signal_ends_the_server_though_its_replicas_cannot_be_told(monkeypatch):
    server = object.__new__(HttpServer)
    server.should_exit, server._service, codes = True, Mock(), []
    server._service.kill.side_effect = OSError("no cluster")
    monkeypatch.setattr("os._exit", codes.append)
    with pytest.raises(OSError, match="no cluster"):
        server.handle_exit(15, None)
    assert codes == [143]


async def test_the_failure_of_the_reports_is_logged(replicas_of, caplog):
    replicas = replicas_of(Handle())  # which has no `broadcast`
    await replicas.start()
    await asyncio.wait([replicas._watching])
    await asyncio.sleep(0)
    assert "a task of the server failed" in caplog.text
