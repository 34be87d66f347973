"""What has broken other servers. Further tests of such faults:

- an engine that is dead while /health says 200, and slots that leak when clients go away:
  `test_server_faults`;
- queues without bounds, huge headers, SIGTERM that drops requests: `test_server_limits`;
- huge values, and chat templates from requests: `test_server`, among the bodies that are refused;
- batches that are written only at their end: `test_output` and `test_resume`.
"""

import asyncio
import hmac
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from pydantic import ValidationError

from serve.openai.errors import MOST_CHARACTERS, error_body
from serve.openai.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
)
from serve.server.access.keys import Keys
from serve.server.json_body import JsonRequest
from tests.serve.server_process import SECONDS, eventually, serving

SENTINEL = {"prompt": "def f(", "max_tokens": 40, "temperature": 1, "seed": 3, "logprobs": 2}
POISON = [1, 66, 67, 68]
FAULTS = f"""
import os
from serve.cache import page_pool as pages
from serve import wire
from serve.server.replicas import stream
stream.MOST_MOVES = 3
read = wire.request_from_wire
def request_from_wire(values):
    if list(values["prompt_token_ids"]) == {POISON}:
        os._exit(7)
    return read(values)
wire.request_from_wire = request_from_wire
check = pages.PagePool.check_integrity
def check_integrity(self):
    if os.path.exists(os.environ["MARKER"]):
        os.remove(os.environ["MARKER"])
        raise RuntimeError("page 7 is owned twice")
    check(self)
pages.PagePool.check_integrity = check_integrity
"""
"""A prompt that ends its engine, and pages in disorder where there is a file."""


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    return tmp_path_factory.mktemp("fault") / "marker"


@pytest.fixture(scope="module")
def faulty_server(model_directory, patched, marker):
    """A server with FAULTS."""
    environment = {**patched(FAULTS), "MARKER": str(marker)}
    with serving(model_directory, "--batch-invariant", **environment) as server:
        yield server


def completed(server, body):
    answer = server.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_requests_that_end_every_engine_end_no_other(faulty_server):
    """Two of them: with one alone, the others would just outlive it."""
    expected = completed(faulty_server, SENTINEL)

    def ask(body):
        return faulty_server.post("/v1/completions", json=body, timeout=2 * SECONDS)

    with ThreadPoolExecutor(12) as pool:
        poisoned = [pool.submit(ask, {"prompt": POISON, "max_tokens": 5}) for _ in range(2)]
        others = [pool.submit(ask, SENTINEL) for _ in range(10)]
    for answer in poisoned:
        assert answer.result().status_code == 503
        message = answer.result().json()["error"]["message"]
        assert "4 replicas ended during this request, which may be the cause" in message
    assert [answer.result().status_code for answer in others] == [200] * 10
    assert [answer.result().json()["choices"] for answer in others] == [expected] * 10
    assert 4 < faulty_server.metric("stu:replica_restarts_total") <= 8
    assert completed(faulty_server, SENTINEL) == expected


def test_an_engine_whose_pages_are_in_disorder_is_replaced(faulty_server, marker):
    expected = completed(faulty_server, SENTINEL)
    restarts = faulty_server.metric("stu:replica_restarts_total")
    eventually(lambda: faulty_server.metric("vllm:num_requests_running") == 0)
    marker.touch()
    assert completed(faulty_server, SENTINEL) == expected
    eventually(lambda: faulty_server.metric("stu:replica_restarts_total") == restarts + 1)
    assert completed(faulty_server, SENTINEL) == expected
    assert any("page 7 is owned twice" in line for line in faulty_server.lines)


MANY = 10_000
LONG_VALUES = {
    "nulls": [None] * MANY,
    "negative": [-1] * MANY,
    "lists of nulls": [[None] * MANY] * 3,
    "objects": [{}] * MANY,
    "objects with unknown fields": [{str(key): 0 for key in range(MANY)}] * 2,
    "a wrong one at the end": [1] * MANY + [None],
    "mixed": [[1], "x", None] * MANY,
    "an object of nulls": {str(key): None for key in range(MANY)},
    "an object of objects": {str(key): {"x": []} for key in range(MANY)},
}


def num_errors(model, body):
    try:
        model.model_validate(body)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("kind", LONG_VALUES)
@pytest.mark.parametrize(
    "model", [CompletionBody, ChatBody, EmbeddingBody, TokenizeBody, DetokenizeBody]
)
def test_validation_stops_at_the_first_errors(model, kind):
    """A long value makes only a few errors, in every field, also within messages."""
    value = LONG_VALUES[kind]
    usual = {
        "prompt": "x",
        "input": "x",
        "messages": [{"role": "user", "content": "x"}],
        "tokens": [1],
    }
    usual = {name: usual[name] for name in usual.keys() & model.model_fields}
    bodies = [{**usual, name: value} for name in model.model_fields]
    bodies += [{**usual, "messages": [{"role": "user", "content": value}]}]
    bodies += [{**usual, "messages": [value]}, {**usual, "messages": [{"role": value}]}]
    bodies += [{**usual, "unknown": value}, {**usual, **{str(key): value for key in range(MANY)}}]
    for body in bodies:
        assert num_errors(model, body) <= 8


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["x"] * MANY},
        {"prompt": [[1]] * MANY},
        {"messages": [{"role": "user", "content": "x"}] * MANY},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * MANY}]},
        {"prompt": "x", "logit_bias": {str(key): 0 for key in range(MANY)}},
    ],
)
def test_sizes_are_checked_before_elements(body):
    """If all elements are right, the only error names the size."""
    with pytest.raises(ValidationError) as caught:
        (ChatBody if "messages" in body else CompletionBody).model_validate(body)
    (error,) = caught.value.errors()
    assert str(MANY) in error["msg"] or "at most" in error["msg"]


def test_errors_repeat_no_large_input(server):
    long = "x" * 100_000
    assert len(error_body(long, "", long)["error"]["param"]) < MOST_CHARACTERS + 10
    bodies = [{long: 0}, {"logit_bias": {long: 0}}, {"logit_bias": {long: None}}, {"model": long}]
    bodies += [{"n": 10**4000}, {"response_format": {"type": long}}, {"stop": [long] * 9}]
    bodies += [{"prompt": [0] * MANY + [None]}, {"logit_bias": {"1": "x" * 10_000}}]
    with server.client() as http:
        for body in bodies:
            answer = http.post("/v1/completions", json={"prompt": "x", **body})
            assert answer.status_code in (400, 404)
            assert len(answer.content) < 3 * MOST_CHARACTERS, answer.text[:100]


BODIES = '{"a": 1, "a": [null, 1e999, -0, 1.5]}', "NaN", '"größe"', '"\\ud800"', str(10**30)


def parsed(content):
    async def receive():
        return {"type": "http.request", "body": content}

    return asyncio.run(JsonRequest({"type": "http"}, receive).json())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", BODIES)
def test_the_faster_parser_returns_and_refuses_the_same(text, encoding):
    assert repr(parsed(text.encode(encoding))) == repr(json.loads(text))
    for wrong in ("", "{", "[1,]", "01"):
        with pytest.raises(json.JSONDecodeError):
            parsed(wrong.encode(encoding))


def test_long_bodies_do_without_the_slower_parser(monkeypatch):
    """It would hold up everything for 100 ms for a list that is then refused by its length."""
    monkeypatch.setattr(json, "loads", None)
    assert parsed(b"[" + b"0," * 1000 + b"0]") == [0] * 1001


@pytest.mark.parametrize("prompt", ["", [], [""], [[]]])
def test_empty_prompts_begin_from_bos(server, prompt):
    body = {"max_tokens": 5, "seed": 1, "temperature": 1}
    expected = completed(server, {**body, "prompt": [1]})
    assert completed(server, {**body, "prompt": prompt}) == expected


def test_keys_are_compared_in_constant_time(tmp_path, monkeypatch):
    """All of them, as digests of equal length, whichever is the right one."""
    compared, compare_digest = [], hmac.compare_digest

    def compare(*digests):
        compared.append(digests)
        return compare_digest(*digests)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    path = tmp_path / "keys"
    path.write_text("one\nanother-key\nthree\n")
    keys = Keys(path)
    for key, holds in {"one": True, "three": True, "on": False, "": False, "x" * 99: False}.items():
        compared.clear()
        assert (keys.find(f"Bearer {key}".encode()) is not None) == holds
        assert len(compared) == 3
        assert {len(digest) for pair in compared for digest in pair} == {32}


def test_metric_labels_do_not_come_from_requests(server):
    def series():
        text = server.get("/metrics").text
        return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}

    with server.client() as http:
        strange = "strange-name"
        settings = {"max_tokens": 1, "stop_at_eos": False}  # one reason to finish
        http.post("/v1/completions", json={"prompt": "x", "model": strange})
        completed(server, {**settings, "prompt": strange, "user": strange})
        before = series()
        for number in range(20):
            name = f"{strange}-{number}"
            http.get(f"/{name}", headers={name: name})
            http.request(name.upper(), "/v1/models")
            http.post("/v1/completions", json={"prompt": name, "model": name, "user": name})
            completed(server, {**settings, "prompt": name, "user": name, "stop": name})
        after = series()
    assert not [line for line in after if strange in line.lower()]
    statuses = {line for line in after if re.search(r'(status|code)="\d+"', line)}
    assert after - statuses == before - statuses


def test_a_client_goes_away_during_the_prefill_of_many_prompts(server):
    """Log probabilities of many prompts take several steps."""
    body = {"prompt": ["def f(x):"] * 100, "max_tokens": 0, "echo": True, "logprobs": 5}
    for milliseconds in (5, 10, 20, 40, 80, 160):
        with suppress(httpx.TimeoutException):
            server.post("/v1/completions", json=body, timeout=milliseconds / 1000)
    eventually(lambda: server.metric("vllm:num_requests_running") == 0)
    assert server.pages_used() == 0
    assert server.metric("stu:replica_restarts_total") == 0
    assert len(completed(server, body)) == 100
