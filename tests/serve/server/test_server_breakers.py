"""What has broken other servers, each by name. Those that are not here:

- an engine that is dead while /health says 200: `test_server_faults`, as are slots that leak when
  readers go away;
- queues without bounds, huge headers, SIGTERM that drops requests: `test_server_limits`;
- chat templates from requests: `test_server`, among the bodies that are refused;
- batches that are written only at their end: `test_output` and `test_resume`.
"""

import ast
import asyncio
import hmac
import json
import pickle
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import msgpack
import pytest
from pydantic import ValidationError

import serve
from serve.openai.errors import MOST_CHARACTERS, error_body
from serve.openai.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from serve.server.guard import Guard
from serve.server.json_body import JsonRequest
from serve.server.replicas.wire import Unpacker
from tests.serve.server_process import SECONDS, events, eventually, serving

SENTINEL = {"prompt": "def f(", "max_tokens": 40, "temperature": 1, "seed": 3, "logprobs": 2}
POISON = [1, 66, 67, 68]
POISONS = "poison", "other poison"
ENDS_ITS_ENGINE = f"""
import os
from serve.server.replicas import wire
read = wire.request_from_wire
def request_from_wire(values):
    if list(values["prompt_token_ids"]) == {POISON}:
        os._exit(7)
    return read(values)
wire.request_from_wire = request_from_wire
"""
FINDS_A_FAULT = """
import os
from serve.cache import page_pool as pages
check = pages.PagePool.check_integrity
def check_integrity(self):
    if os.path.exists("{marker}"):
        os.remove("{marker}")
        raise RuntimeError("page 7 is owned twice")
    check(self)
pages.PagePool.check_integrity = check_integrity
"""
HUGE = {
    "n": [10**6, 129, 2**70],
    "prompt": [["x"] * 200, [[1]] * 200, [1] * 100_000, "x" * 100_000],
    "logprobs": [21, 10**6, 2**70],
    "logit_bias": [{"280": 1}, {str(2**70): 1}, {"-1": 1}, {str(i): 101 for i in range(300)}],
    "stop": [["x"] * 129, "x" * 10_000, [""], ["x" * 5000] * 4],
    "stop_token_ids": [[280], [-1], [2**70]],
    "top_k": [-2, 2**70],
    "seed": [2**70, -(2**70)],
}


@pytest.fixture(scope="module")
def server(model_directory):
    with serving(model_directory, "--batch-invariant") as server:
        yield server
        assert server.metric("stu:replica_restarts_total") == 0


def completed(server, body):
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_requests_that_end_every_engine_end_no_other(model_directory, patched):
    """Two of them: with one alone, the others would just outlive it."""
    environment = patched(ENDS_ITS_ENGINE)
    with serving(model_directory, "--batch-invariant", **environment) as server:
        expected = completed(server, SENTINEL)
        answers = {}

        def ask(name, body):
            url = f"{server.url}/v1/completions"
            answers[name] = httpx.post(url, json=body, timeout=2 * SECONDS)

        bodies = dict.fromkeys(range(10), SENTINEL)
        bodies |= {name: {"prompt": POISON, "max_tokens": 5} for name in POISONS}
        threads = [threading.Thread(target=ask, args=its) for its in bodies.items()]
        for thread in reversed(threads):  # the poisons first
            thread.start()
        for thread in threads:
            thread.join()
        for name in POISONS:
            poisoned = answers.pop(name)
            assert poisoned.status_code == 503
            assert (
                "during this request, which may be the cause" in poisoned.json()["error"]["message"]
            )
        assert [its.status_code for its in answers.values()] == [200] * 10
        assert [its.json()["choices"] for its in answers.values()] == [expected] * 10
        assert 6 < server.metric("stu:replica_restarts_total") <= 12
        assert completed(server, SENTINEL) == expected


def test_an_engine_whose_pages_are_in_disorder_is_replaced(model_directory, patched, tmp_path):
    marker = tmp_path / "marker"
    environment = patched(FINDS_A_FAULT.format(marker=marker))
    with serving(model_directory, "--batch-invariant", **environment) as server:
        expected = completed(server, SENTINEL)
        eventually(lambda: server.metric("vllm:num_requests_running") == 0)
        marker.touch()
        assert completed(server, SENTINEL) == expected
        eventually(lambda: server.metric("stu:replica_restarts_total") == 1)
        assert completed(server, SENTINEL) == expected
        assert any("page 7 is owned twice" in line for line in server.lines)


@pytest.mark.parametrize("name", HUGE)
def test_huge_and_foreign_values_change_no_other_answer(server, name):
    """Each is refused by its name, while another request is decoded."""
    alone = completed(server, SENTINEL)
    with (
        server.client() as http,
        http.stream("POST", "/v1/completions", json={**SENTINEL, "stream": True}) as beside,
    ):
        for value in HUGE[name]:
            body = {"prompt": "x", "max_tokens": 3, name: value}
            refused = http.post("/v1/completions", json=body)
            assert refused.status_code == 400, (value, refused.text)
            assert name in refused.json()["error"]["message"]
        pieces = [its["choices"][0] for its in events(beside)]
    assert "".join(its["text"] for its in pieces) == alone[0]["text"]
    logprobs = [value for its in pieces for value in its["logprobs"]["token_logprobs"]]
    assert logprobs == alone[0]["logprobs"]["token_logprobs"]


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
@pytest.mark.parametrize("model", [CompletionBody, ChatBody, TokenizeBody, DetokenizeBody])
def test_validation_stops_at_the_first_errors(model, kind):
    """In every field, also those within messages, a long value makes no more than a few errors."""
    value = LONG_VALUES[kind]
    usual = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "tokens": [1]}
    usual = {name: of for name, of in usual.items() if name in model.model_fields}
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
    """Of values that are right, each for itself: there is one error, and it names the size."""
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


def test_a_body_of_nulls_is_refused_at_once(server):
    """A million errors took a minute, in which nothing else ran, and gigabytes."""
    nulls = "[" + ",".join(["null"] * 838_000) + "]"
    zeros = "[" + ",".join("0" * 1_500_000) + "]"
    before = server.peak_bytes()
    with server.client(headers={"content-type": "application/json"}) as http:
        bodies = [f'{{"prompt":{nulls}}}', f'{{"prompt":"x","stop":{nulls}}}']
        for body in [*bodies, f'{{"prompt":"x","stop":{zeros}}}']:
            began = time.monotonic()
            assert http.post("/v1/completions", content=body).status_code == 400
            assert time.monotonic() - began < 10  # it is 0.05 on a quiet machine
    assert server.peak_bytes() - before < 100e6


BODIES = '{"a": 1, "a": [null, 1e999, -0, 1.5]}', "NaN", '"größe"', '"\\ud800"', str(10**30)


def parsed(content):
    async def receive():
        return {"type": "http.request", "body": content}

    return asyncio.run(JsonRequest({"type": "http"}, receive).json())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", BODIES)
def test_a_faster_parser_finds_the_same(text, encoding):
    assert repr(parsed(text.encode(encoding))) == repr(json.loads(text))


@pytest.mark.parametrize("content", [b"", b"{", b"[1,]", b"01"])
def test_a_faster_parser_refuses_the_same(content):
    with pytest.raises(json.JSONDecodeError):
        parsed(content)


def test_long_bodies_do_without_the_slower_parser(monkeypatch):
    """It took 100 ms for a list that is refused by its length, and everything stood still."""
    monkeypatch.setattr(json, "loads", None)
    assert parsed(b"[" + b"0," * 1000 + b"0]") == [0] * 1001


@pytest.mark.parametrize("prompt", ["", [], [""], [[]]])
def test_empty_prompts_begin_from_bos(server, prompt):
    body = {"max_tokens": 5, "seed": 1, "temperature": 1}
    assert completed(server, {**body, "prompt": prompt}) == completed(
        server, {**body, "prompt": [1]}
    )


def test_keys_are_compared_in_constant_time(monkeypatch):
    """All of them, as digests of one length, whichever is the right one."""
    compared, compare_digest = [], hmac.compare_digest

    def compare(one, other):
        compared.append((one, other))
        return compare_digest(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    guard = Guard(None, ["one", "another-key", "three"], 1024)
    for key, holds in {"one": True, "three": True, "on": False, "": False, "x" * 99: False}.items():
        compared.clear()
        assert (guard._key_position(f"Bearer {key}".encode()) is not None) == holds
        assert len(compared) == 3
        assert {len(its) for pair in compared for its in pair} == {32}


def test_metric_labels_do_not_come_from_requests(server):
    def series():
        text = httpx.get(f"{server.url}/metrics", timeout=SECONDS).text
        return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}

    with server.client() as http:
        strange = "strange-name"
        its_last = {"max_tokens": 1, "stop_at_eos": False}  # one reason to finish
        http.post("/v1/completions", json={"prompt": "x", "model": strange})
        completed(server, {**its_last, "prompt": strange, "user": strange})
        before = series()
        for number in range(20):
            own = f"{strange}-{number}"
            http.get(f"/{own}", headers={own: own})
            http.request(own.upper(), "/v1/models")
            http.post("/v1/completions", json={"prompt": own, "model": own, "user": own})
            completed(server, {**its_last, "prompt": own, "user": own, "stop": own})
        after = series()
    assert not [its for its in after if strange in its.lower()]
    statuses = {its for its in after if re.search(r'(status|code)="\d+"', its)}
    assert after - statuses == before - statuses


def test_nothing_is_pickled():
    """Neither by name, nor what comes on an engine's socket is unpickled."""
    names = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for path in Path(serve.__file__).parent.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [its.name for its in node.names] + [getattr(node, "module", "") or ""]
                roots = {module.split(".")[0] for module in modules}
                assert not roots & {*names, "multiprocessing"}, path
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.load", path
    touched = []

    class Evil:
        def __reduce__(self):
            return touched.append, (1,)

    data = pickle.dumps(Evil())
    with suppress(ValueError, msgpack.UnpackException):
        list(Unpacker().feed(data))
    assert list(Unpacker().feed(msgpack.packb(data))) == [data]
    assert touched == []


def test_a_reader_of_many_prompts_goes_away_while_they_are_taken_in(server, code_tokenizer):
    """Log probabilities of many prompts took several steps, and an abort in between the engine."""
    body = {"prompt": ["def f(x):"] * 100, "max_tokens": 0, "echo": True, "logprobs": 5}
    for milliseconds in (5, 10, 20, 40, 80, 160):
        with suppress(httpx.TimeoutException):
            url = f"{server.url}/v1/completions"
            httpx.post(url, json=body, timeout=milliseconds / 1000)
    eventually(lambda: server.metric("vllm:num_requests_running") == 0)
    assert server.metric("stu:replica_restarts_total") == 0
    assert len(completed(server, body)) == 100


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("regex", r"[^\s\S]"),
        ("json_schema", {"schema": {"$ref": "#"}}),
        ("json_schema", {"schema": {"type": "object"}, "strct": True}),
    ],
)
def test_constraints_that_no_text_meets_are_the_clients(server, kind, given):
    wanted = {"type": kind, kind: given}
    body = {"prompt": "x", "max_tokens": 3, "response_format": wanted}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS)
    assert answer.status_code == 400, answer.text
    assert "<state>" not in answer.text
    assert kind in answer.json()["error"]["message"]
