"""Random bodies for a live server: none causes a fault, changes the answer to another request, or
leaves a page behind."""

import json
import random
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.serve.server_process import SECONDS

SENTINEL = {"prompt": "def f(", "max_tokens": 12, "temperature": 1, "seed": 11, "logprobs": 2}
JSON = {"content-type": "application/json"}
SEEDS = [
    {"prompt": "x", "max_tokens": 3},
    {"prompt": [1, 100], "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2},
    {"prompt": ["a", "b"], "max_tokens": 1, "stop": ["x", "yy"], "seed": 4, "temperature": 0.5},
    {"prompt": "x", "max_tokens": 2, "logit_bias": {"5": 3}, "stream": True, "top_k": 3},
    {"prompt": "x", "max_tokens": 3, "response_format": {"type": "regex", "regex": "a|b"}},
    {"prompt": "x", "max_tokens": 3, "min_tokens": 2, "stop_token_ids": [5, 9], "seed": -2},
    {"prompt": "x", "stream": True, "stream_options": {"continuous_usage_stats": True}},
    {"prompt": "x", "n": 2, "best_of": 3, "prompt_logprobs": 2, "truncate_prompt_tokens": 2},
    {"prompt": "x", "guided_choice": ["a", "b"], "priority": 3, "skip_special_tokens": False},
    {"prompt": "x", "structured_outputs": {"grammar": 'root ::= "a" root | "b"'}},
    {"prompt": "x", "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 2},
    {
        "prompt": "x",
        "max_tokens": 3,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    },
]
PARTS = [{"type": "text", "text": "x"}]
EMPTY = {"content": None, "refusal": None, "tool_calls": [], "annotations": []}
CHAT = {
    "max_tokens": 2,
    "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", **EMPTY}],
    "chat_template_kwargs": {"x": 1},
}
NAMES = [
    *("n", "stop", "seed", "user", "suffix", "top_p", "x", "ignore_eos", "min_tokens", "metadata"),
    *("stop_token_ids", "tools", "stream_options", "logit_bias", "modalities", "echo"),
    *("best_of", "prompt_logprobs", "truncate_prompt_tokens", "priority", "guided_json"),
    *("guided_choice", "guided_grammar", "structured_outputs", "skip_special_tokens"),
]
INTEGERS = "n", "best_of", "prompt_logprobs", "truncate_prompt_tokens", "priority"
VALUES = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**64), 10**400),
    *(0.0, -0.0, 1e308, 5e-324),
    *("", "x", "\x00", "\ud800", "größe", "x" * 3000, "{{ 7 * 7 }}", "(a+)+$", "../../etc/passwd"),
    *([], [[]], [[[]]], [None], ["x"], [0], [1] * 200, [2**70], [-1], ["x"] * 200),
    *({}, {"a": 1}, {"type": "regex", "regex": "("}, {"type": "json_object"}, {"1": 1e400}),
]


def sentinel(http):
    answer = http.post("/v1/completions", json=SENTINEL)
    assert answer.status_code == 200
    return answer.json()["choices"]


def mutated(rng, is_chat):
    """A body with a few values changed, perhaps no longer JSON."""
    body = json.loads(json.dumps(CHAT if is_chat else rng.choice(SEEDS)))
    if is_chat and rng.random() < 0.5:
        message = rng.choice(body["messages"])
        message[rng.choice([*message, "name", "audio", "x"])] = rng.choice(VALUES)
    for _ in range(rng.randint(1, 3)):
        kind, key = rng.random(), rng.choice(list(body) or ["prompt"])
        if kind < 0.6:
            body[key] = rng.choice(VALUES)
        elif kind < 0.8:
            body[rng.choice(NAMES)] = rng.choice(VALUES)
        else:
            body.pop(key, None)
    content = json.dumps(body).encode()
    if rng.random() < 0.15:
        at = rng.randrange(len(content))
        content = content[:at] + bytes([rng.randrange(256)]) + content[at + rng.randint(0, 2) :]
    return content


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_bodies(server, count):
    rng, statuses = random.Random(0), Counter()
    with server.client(headers=JSON) as http:
        expected = sentinel(http)
        for number in range(count):
            path = rng.choice(["/v1/completions"] * 8 + ["/v1/chat/completions", "/tokenize"])
            content = mutated(rng, path.startswith("/v1/chat"))
            answer = http.post(path, content=content)
            assert answer.status_code < 500, (content, answer.text)
            statuses[answer.status_code] += 1
            if number % 100 == 99:
                assert sentinel(http) == expected
    assert statuses[200] > 0.03 * count
    assert statuses[400] > 0.3 * count


def test_numbers_too_large_to_send_are_refused_by_name(server):
    names = *INTEGERS, "min_tokens", "seed", "logprobs", "top_k"
    with server.client(headers=JSON) as http:
        expected = sentinel(http)
        for name in names:
            for number in (2**64, 10**400):
                answer = http.post("/v1/completions", json={"prompt": "x", name: number})
                assert answer.status_code == 400, (name, answer.text)
                assert answer.json()["error"]["param"] == name
        assert sentinel(http) == expected


def test_requests_of_schemathesis_cause_no_fault(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 10

    def check(case):
        answer = case.call(base_url=server.url, timeout=SECONDS)
        assert answer.status_code < 500, answer.text

    repeatable = settings(
        max_examples=3,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with server.client() as http:
        expected = sentinel(http)
        for operation in operations:
            repeatable(given(case=operation.as_strategy())(check))()
            assert sentinel(http) == expected
