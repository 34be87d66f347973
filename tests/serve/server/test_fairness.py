"""Rows and places in the queue are shared between clients."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest

from serve.cache.page_pool import Pages
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.scheduler import Scheduler
from serve.sampling_params import SamplingParams
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.fair_queue import FairQueue
from serve.server.replicas.prefixes import SentPrefixes
from serve.server.replicas.replica import Replica
from serve.server.replicas.stream import Busy, Stream
from serve.server.replicas.supervisor import ReplicasConfig
from tests.serve.requests import make_request
from tests.serve.server_process import eventually, serving


def request(client, count, seed=1, prompt=(1, 100, 101), **more):
    return make_request(prompt, count, SamplingParams(seed=seed), client=client, **more)


def decoded(engine, requests, later=(), after_steps=0):
    """The tokens of each request, and the orders in which requests were scheduled and ended.
    `later` are added after a number of steps."""
    ids = [engine.add(request) for request in requests]
    tokens, scheduled, ended, steps = {}, [], [], 0
    while engine.has_work:
        if steps == after_steps:
            ids += [engine.add(request) for request in later]
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                ended.append(output.request_id)
        scheduled += [number for number in engine.scheduled if number not in scheduled]
        steps += 1
        engine.check_integrity()
    return [tokens[number] for number in ids], scheduled, ended


@pytest.fixture
def make_engine(code_model, code_tokenizer):
    def make(**settings):
        config = EngineConfig(**{"cache_gib": 0.01, "max_running": 2, **settings})
        return Engine(code_model, code_tokenizer, config)

    return make


def test_short_request_runs_beside_many_of_another_client(make_engine):
    """It takes one of the two rows, and the request that is preempted continues exactly."""
    many = [request("a", 30, seed) for seed in range(6)]
    short = request("b", 3)
    settings = {"batch_invariant": True, "page_len": 2}  # rows soon join
    alone, *_ = decoded(make_engine(**settings), [*many, short])
    engine = make_engine(**settings)
    tokens, scheduled, ended = decoded(engine, many, [short], after_steps=4)
    assert tokens == alone
    assert scheduled[:3] == [0, 1, 6]
    assert ended[0] == 6
    assert engine.stats().preemptions == 1


def test_requests_of_one_client_keep_their_order(make_engine):
    engine = make_engine()
    _, scheduled, _ = decoded(engine, [request("a", 6 + number % 3, number) for number in range(7)])
    assert scheduled == list(range(7))
    assert engine.stats().preemptions == 0


def test_rows_are_shared_evenly(make_engine):
    engine = make_engine(max_running=4)
    for client, num_steps in (("a", 3), ("b", 5)):
        for seed in range(6):
            engine.add(request(client, 40, seed))
        for _ in range(num_steps):
            engine.step()
    clients = [job.request.client for job in engine._scheduler.running]
    assert sorted(clients) == ["a", "a", "b", "b"]
    assert engine.stats().preemptions == 2


def test_no_request_is_preempted_if_waiting_costs_less(make_engine):
    """A row is free two steps later, and to prefill 40 tokens again would take longer."""
    engine = make_engine()
    many = [request("a", 9, seed, prompt=[1, *range(100, 139)]) for seed in range(4)]
    _, scheduled, _ = decoded(engine, many, [request("b", 3)], after_steps=7)
    assert scheduled[:4] == [0, 1, 4, 2]
    assert engine.stats().preemptions == 0


def test_clients_take_turns_at_a_single_row(make_engine):
    clients = "aaaabbc"
    _, scheduled, _ = decoded(
        make_engine(max_running=1), [request(client, 2) for client in clients]
    )
    assert "".join(clients[number] for number in scheduled) == "abcabaa"


def test_clients_that_come_and_go_do_not_overtake_a_request_that_waits_for_pages():
    pages_of, capacity, numbers = {}, 100, iter(range(1000))

    def prefill():
        jobs = scheduler.next_group(
            lambda: Pages(capacity - sum(pages_of.values()), 0),
            lambda number: Pages(pages_of[number], 0),
            scheduler.preempt,
        )
        scheduler.prefilling.clear()
        scheduler.running.extend(jobs)
        for job in jobs:
            job.row = job.request_id
            pages_of[job.row] = job.request.sampling.max_new_tokens
        return [job.request.client for job in jobs]

    def add(client, count):
        scheduler.add(next(numbers), request(client, count, prompt=(1,)))

    def end():
        pages_of.pop(scheduler.running.pop(0).request_id)

    config = EngineConfig(max_running=4)
    no_prefixes = Mock(**{"num_found.return_value": 0, "waits_for.return_value": False})
    scheduler = Scheduler(
        config, lambda _, count: Pages(1 + count, 0), Pages(capacity, 0), True, no_prefixes
    )
    add("large", 10)
    add("large", 99)
    assert prefill() == ["large"]
    add("b", 10)
    assert prefill() == ["b"], "it goes before a client that had the last turn"
    end()  # the first request
    for client in "cbcbcb":
        add(client, 10)
        assert prefill() == []
    end()
    assert prefill() == ["large"]


def test_lower_priority_number_goes_before_any_turn(make_engine):
    engine = make_engine(max_running=1)
    first = [request("a", 3, priority=1), request("b", 3, priority=1), request("a", 3, priority=0)]
    _, scheduled, _ = decoded(engine, first)
    assert scheduled == [2, 1, 0]


def test_lower_priority_number_preempts_others(make_engine):
    """They continue exactly, and run only when nothing more urgent waits."""
    rows = [request("a", 20, seed, priority=2) for seed in range(3)]
    urgent = [request("a", 3, 7, priority=1), request("b", 3, 8)]
    settings = {"batch_invariant": True, "page_len": 2}
    alone, *_ = decoded(make_engine(**settings), [*rows, *urgent])
    engine = make_engine(**settings)
    tokens, _, ended = decoded(engine, rows, urgent, after_steps=4)
    assert tokens == alone
    assert ended[:2] == [4, 3]
    assert engine.stats().preemptions == 2


def streams(clients, priorities=None):
    """Requests of these clients, with these priorities."""
    levels = priorities or [0] * len(clients)
    return [
        Stream(number, request(client, 5, priority=level), client)
        for number, (client, level) in enumerate(zip(clients, levels, strict=True))
    ]


def test_clients_take_turns_in_the_queue():
    queue = FairQueue()
    queue.add(streams("aaabba"))
    returned = Stream(9, request("a", 5), "a")
    queue.put_back([returned])
    assert len(queue) == 7
    taken = []
    while queue:
        head = queue.heads()[0]
        queue.take(head)
        taken.append((head.client, head.number))
    assert taken == [("a", 9), ("a", 0), ("b", 3), ("a", 1), ("b", 4), ("a", 2), ("a", 5)]
    queue.add(more := streams("ab"))
    queue.remove(more[0])
    queue.remove(more[0])
    assert list(queue) == [more[1]]
    assert queue.clear() == [more[1]]
    assert not queue.heads()


def test_lower_priorities_go_first_in_the_queue():
    queue = FairQueue()
    queue.add(streams("aabbc", [2, 1, 1, 2, 0]))
    queue.put_back([Stream(9, request("a", 5, priority=1), "a")])
    assert len(queue) == 6
    assert [head.number for head in queue.heads()] == [4, 9, 1, 2, 0, 3]
    taken = []
    while queue:
        queue.take(queue.heads()[0])
        taken.append(len(queue))
    assert taken == [5, 4, 3, 2, 1, 0]
    assert not queue.heads()
    queue.remove(Stream(9, request("a", 5, priority=1), "a"))


class StoppedReplica(Replica):
    """A replica that takes requests and decodes nothing."""

    def __init__(self, max_running):
        self.settings = {"engine": {"max_running": max_running}}
        self.streams, self.prefixes, self._writer = {}, SentPrefixes(), None
        self.stats = Mock(prefix_tokens_asked=0)


@pytest.fixture
def replicas(tmp_path):
    replicas = Replicas(ReplicasConfig(tmp_path, max_waiting=12))
    replicas._replicas, replicas._has_been_ready = [StoppedReplica(4)], True
    return replicas


def test_full_replica_takes_the_first_request_of_another_client(replicas):
    def clients():
        return [stream.client for stream in replica.streams.values()]

    replicas.submit([request("", 5)] * 8, "a")
    (replica,) = replicas.running
    assert len(replica.streams) == 5  # four that run, and a quarter ahead
    replicas.submit([request("", 5)] * 2, "b")
    assert clients() == ["a"] * 5 + ["b"]
    assert [stream.rest().client for stream in replica.streams.values()] == clients()
    for number in range(2):
        replicas.abort(replica.streams[number])
    assert clients() == ["a"] * 3 + ["b", "a"]  # b had its turn last


def test_full_replica_takes_requests_that_overtake_its_own(replicas):
    """Others wait in the server."""
    replicas.submit([request("", 5, priority=3)] * 7, "a")
    (replica,) = replicas.running
    assert len(replica.streams) == 5
    replicas.submit([request("", 5, priority=number) for number in (4, 2, 2, 0)], "a")
    placed = [stream.priority for stream in replica.streams.values()]
    assert placed == [3] * 5 + [0, 2, 2]
    assert [stream.priority for stream in replicas._waiting] == [3, 3, 4]


def test_requests_go_where_the_fewest_tokens_are_before_them(replicas):
    second = StoppedReplica(4)
    replicas._replicas.append(second)
    first, _ = replicas.running
    replicas.submit([request("", 50, priority=3)], "a")
    replicas.submit([request("", 10)], "a")  # where no row has begun
    replicas.submit([request("", 10)], "a")  # where only others of lower priority have
    assert [stream.priority for stream in first.streams.values()] == [3, 0]
    assert [stream.priority for stream in second.streams.values()] == [0]


def test_one_client_alone_may_fill_the_queue_and_others_get_a_share(replicas):
    replicas.submit([request("", 5)] * 12, "a")
    with pytest.raises(Busy, match="12 requests wait, of at most 12"):
        replicas.submit([request("", 5)], "a")
    replicas.submit([request("", 5)] * 6, "b")
    for client in ("a", "b"):
        with pytest.raises(Busy):
            replicas.submit([request("", 5)], client)
    replicas.submit([request("", 5)] * 4, "c")
    with pytest.raises(Busy):
        replicas.submit([request("", 5)], "c")
    assert replicas.num_waiting == 22


def test_short_request_of_another_key_does_not_wait_for_a_large_body(model_directory, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")

    def ask(key, **more):
        headers = {"authorization": f"Bearer {key}", "x-request-id": key}
        body = {"prompt": "x", "stop_at_eos": False, **more}
        server.post("/v1/completions", json=body, headers=headers).raise_for_status()

    options = "--api-keys", keys, "--max-running", 4
    with serving(model_directory, *options) as server, ThreadPoolExecutor() as pool:
        header = {"authorization": "Bearer second-key"}
        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)  # until both bodies are in the queue
        answers = [pool.submit(ask, "first-key", n=12, max_tokens=60)]
        eventually(lambda: server.metric("vllm:num_requests_waiting", **header) == 12)
        answers.append(pool.submit(ask, "second-key", max_tokens=5))
        eventually(lambda: server.metric("vllm:num_requests_waiting", **header) == 13)
        replica.send_signal(signal.SIGCONT)
        for answer in answers:
            answer.result()
        ended = [json.loads(line) for line in list(server.lines) if "request ended" in line]
    assert [(line["request_id"], line["client"]) for line in ended] == [
        ("second-key", "key 2"),
        ("first-key", "key 1"),
    ]


@pytest.mark.slow
def test_urgent_request_overtakes_rows_of_low_priority(long_model_directory):
    """It takes a row from them, though they fill the replica and the queue."""
    rows = {"prompt": "x", "n": 12, "max_tokens": 6000, "stop_at_eos": False, "priority": 1}
    with (
        serving(long_model_directory, "--max-running", 2) as server,
        server.client() as client,
        client.stream("POST", "/v1/completions", json={**rows, "stream": True}) as answer,
    ):
        lines = answer.iter_lines()  # while it lives, the connection is open
        next(lines)
        eventually(lambda: server.metric("vllm:num_requests_running") == 2)
        urgent = {"prompt": "x", "max_tokens": 5, "stop_at_eos": False}
        server.post("/v1/completions", json=urgent).raise_for_status()
        assert server.metric("vllm:num_preemptions_total") == 1
        assert server.metric("vllm:request_success_total") == 1, "no row has ended"
