"""Rows and places in the queue are shared between clients, whoever asks for more."""

import json
import threading

import httpx
import pytest

from serve.cache.page_pool import Pages
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.scheduler import Scheduler
from serve.sampling_params import SamplingParams
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.fair_queue import FairQueue
from serve.server.replicas.replica import Replica
from serve.server.replicas.stream import Busy, Stream
from serve.server.replicas.supervisor import ReplicasConfig
from tests.serve.requests import make_request
from tests.serve.server_process import SECONDS, eventually, serving


def request(client, count, seed=1, prompt=(1, 100, 101), **more):
    return make_request(prompt, count, SamplingParams(seed=seed), client=client, **more)


def decoded(engine, requests, later=(), after_steps=0):
    """Tokens of each request, and the order in which they were scheduled and ended. `later` are
    added after so many steps."""
    ids = [engine.add(given) for given in requests]
    tokens, scheduled, ended, steps = {}, [], [], 0
    while engine.has_work:
        if steps == after_steps:
            ids += [engine.add(given) for given in later]
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                ended.append(output.request_id)
        scheduled += [it for it in engine.scheduled if it not in scheduled]
        steps += 1
        engine.check_integrity()
    return [tokens[it] for it in ids], scheduled, ended


@pytest.fixture
def make_engine(code_model, code_tokenizer):
    def make(**settings):
        config = EngineConfig(**{"cache_gib": 0.01, "max_running": 2, **settings})
        return Engine(code_model, code_tokenizer, config)

    return make


def test_a_short_request_runs_beside_many_of_another_client(make_engine):
    """It takes one of the two rows, and what gives way to it goes on as it would have."""
    many = [request("a", 30, seed) for seed in range(6)]
    short = request("b", 3)
    alone, *_ = decoded(make_engine(batch_invariant=True), [*many, short])
    engine = make_engine(batch_invariant=True)
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
    """Four rows: the two clients that come later get one each, or two of them two."""
    engine = make_engine(max_running=4)
    first = [request("a", 40, seed) for seed in range(6)]
    later = [request("b", 40, seed) for seed in range(6)]
    ids = [engine.add(given) for given in first]
    for _ in range(3):
        engine.step()
    ids += [engine.add(given) for given in later]
    for _ in range(5):
        engine.step()
    clients = [job.request.client for job in engine._scheduler.running]
    assert sorted(clients) == ["a", "a", "b", "b"]
    assert engine.stats().preemptions == 2


def test_none_gives_way_where_waiting_costs_less(make_engine):
    """A row is free two steps later, and to prefill 40 tokens again would take longer."""
    engine = make_engine()
    many = [request("a", 9, seed, prompt=[1, *range(100, 139)]) for seed in range(4)]
    _, scheduled, _ = decoded(engine, many, [request("b", 3)], after_steps=7)
    assert scheduled[:4] == [0, 1, 4, 2]
    assert engine.stats().preemptions == 0


def test_clients_take_turns_at_a_single_row(make_engine):
    clients = "aaaabbc"
    _, scheduled, _ = decoded(make_engine(max_running=1), [request(it, 2) for it in clients])
    assert "".join(clients[it] for it in scheduled) == "abcabaa"


def test_clients_that_come_and_go_pass_none_that_waits_for_pages():
    """Each was new again with every request, and a large one waited for ever."""
    pages_of, capacity, numbers = {}, 100, iter(range(1000))

    def prefill():
        jobs = scheduler.next_group(
            lambda: Pages(capacity - sum(pages_of.values()), 0),
            lambda number: Pages(pages_of[number], 0),
            scheduler.preempt,
        )
        scheduler.prefilling.clear()
        scheduler.running.extend(jobs)
        pages_of.update({job.request_id: job.request.sampling.max_new_tokens for job in jobs})
        return [job.request.client for job in jobs]

    def add(client, count):
        scheduler.add(next(numbers), request(client, count, prompt=(1,)))

    def end():
        pages_of.pop(scheduler.running.pop(0).request_id)

    config = EngineConfig(max_running=4)
    scheduler = Scheduler(config, lambda _, count: Pages(1 + count, 0), Pages(capacity, 0))
    add("large", 10)
    add("large", 99)
    assert prefill() == ["large"]
    add("b", 10)
    assert prefill() == ["b"], "it goes before a client that had the last turn"
    end()  # the first of them
    for coming in "cbcbcb":
        add(coming, 10)
        assert prefill() == []
    end()
    assert prefill() == ["large"]


def test_a_lower_priority_number_goes_before_any_turn(make_engine):
    engine = make_engine(max_running=1)
    first = [request("a", 3, priority=1), request("b", 3, priority=1), request("a", 3, priority=0)]
    _, scheduled, _ = decoded(engine, first)
    assert scheduled == [2, 1, 0]


def streams(clients):
    return [Stream(number, request(client, 5), client) for number, client in enumerate(clients)]


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


class StoppedReplica(Replica):
    """One that takes requests and does nothing."""

    def __init__(self, max_running):
        self.settings = {"engine": {"max_running": max_running}}
        self.streams, self.stats, self._writer = {}, object(), None


@pytest.fixture
def replicas(tmp_path):
    replicas = Replicas(ReplicasConfig(tmp_path, max_waiting=12))
    replicas._replicas, replicas._has_been_ready = [StoppedReplica(4)], True
    return replicas


def test_an_engine_that_is_full_takes_the_first_of_another_client(replicas):
    replicas.submit([request("", 5)] * 8, "a")
    (replica,) = replicas.running
    assert len(replica.streams) == 5  # of the four that run, and a quarter ahead
    replicas.submit([request("", 5)] * 2, "b")
    assert [its.client for its in replica.streams.values()] == ["a"] * 5 + ["b"]
    assert [its.rest().client for its in replica.streams.values()] == ["a"] * 5 + ["b"]
    for number in range(2):
        replicas.abort(replica.streams[number])
    # b, whose turn was the last, waits for a.
    assert [its.client for its in replica.streams.values()] == ["a"] * 3 + ["b", "a"]


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


def test_a_short_request_of_another_key_does_not_wait_for_a_large_body(model_directory, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")

    def ask(key, **more):
        headers = {"authorization": f"Bearer {key}", "x-request-id": key}
        body = {"prompt": "x", "stop_at_eos": False, **more}
        url = f"{server.url}/v1/completions"
        httpx.post(url, json=body, headers=headers, timeout=SECONDS).raise_for_status()

    with serving(model_directory, "--api-keys", keys, "--max-running", 4) as server:
        thread = threading.Thread(
            target=ask, args=["first-key"], kwargs={"n": 64, "max_tokens": 60}
        )
        thread.start()
        header = {"authorization": "Bearer second-key"}
        eventually(lambda: server.metric("vllm:num_requests_running", **header) == 4)
        ask("second-key", max_tokens=5)
        thread.join()
        ended = [json.loads(line) for line in list(server.lines) if "request ended" in line]
    assert [(its["request_id"], its["client"]) for its in ended] == [
        ("second-key", "key 2"),
        ("first-key", "key 1"),
    ]
