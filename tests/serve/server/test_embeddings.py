"""`/v1/embeddings` over HTTP, with OpenAI's client."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import pairwise

import numpy as np
import openai
import pytest
import torch

from tests.serve.server_process import eventually, serving

INPUTS = ["def f(x)", "größe", [1, 100, 101], [7], ""]
JSON = {"content-type": "application/json"}
ABORTED = 'request_success_total{finished_reason="abort"'


@pytest.fixture(scope="module")
def http(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def embeddings(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client.embeddings


@pytest.fixture(scope="module")
def expected(code_model, code_tokenizer):
    """Call with an input and a pooling: its embedding by the full forward pass."""

    def compute(text, pooling):
        tokens = code_tokenizer.encode_prompt(text) if isinstance(text, str) else text
        with torch.no_grad():
            hidden = code_model.hidden(torch.tensor([tokens]))[0].double()
        return (hidden.mean(0) if pooling == "mean" else hidden[-1]).numpy()

    return compute


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("format", [None, "float", "base64"])
def test_embeddings_equal_the_forward_pass(embeddings, expected, pooling, normalize, format):
    """Without a format, OpenAI's client asks for Base64 and decodes it."""
    settings = {} if format is None else {"encoding_format": format}
    extra = {"pooling": pooling, "normalize": normalize}
    for text in INPUTS:
        answer = embeddings.create(model="model", input=text, extra_body=extra, **settings)
        (data,) = answer.data
        found = data.embedding
        if isinstance(found, str):
            found = np.frombuffer(base64.b64decode(found), "<f4")
        whole = expected(text, pooling)
        if normalize:
            whole = whole / np.linalg.norm(whole)
        assert found == pytest.approx(whole, abs=1e-5)
        assert (answer.object, answer.model, data.object, data.index) == (
            "list",
            "model",
            "embedding",
            0,
        )


def test_several_inputs_are_answered_in_order_and_as_alone(embeddings, code_tokenizer):
    texts = [text for text in INPUTS if isinstance(text, str)]
    ids = [code_tokenizer.encode_prompt(text) for text in texts]
    together = embeddings.create(model="model", input=texts)
    assert embeddings.create(model="model", input=ids).data == together.data
    alone = [embeddings.create(model="model", input=text).data[0] for text in texts]
    assert [data.index for data in together.data] == [0, 1, 2]
    assert [data.embedding for data in together.data] == [data.embedding for data in alone]
    assert together.usage.prompt_tokens == together.usage.total_tokens == sum(map(len, ids))


def test_embeddings_of_the_end_of_an_input(embeddings):
    """With -1 as much of it as the model can read."""
    ids = [5, *range(7, 100)]
    for count, kept in ((3, ids[-3:]), (-1, ids[-64:]), (200, ids[-64:])):
        text = ids if count < 200 else kept
        cut = embeddings.create(
            model="model", input=text, extra_body={"truncate_prompt_tokens": count}
        )
        assert cut == embeddings.create(model="model", input=kept)


def test_embedding_may_name_its_user_and_its_width(embeddings, http):
    plain = http.post("/v1/embeddings", json={"input": "x"}).json()
    assert plain["data"][0].keys() == {"object", "index", "embedding"}
    assert len(plain["data"][0]["embedding"]) == 16
    named = embeddings.create(model="model", input="x", dimensions=16, user="someone")
    assert named.data[0].embedding == pytest.approx(plain["data"][0]["embedding"], abs=1e-7)


BAD = [
    ({}, "input", 'field "input" is missing'),
    ({"input": []}, "input", "input=[] is not allowed: it must be a text or a list of at least"),
    ({"input": 5}, "input", "input=5 is not allowed: it must be a string, a list of token ids"),
    ({"input": ["x", None]}, "input", "input is not allowed: it must be a string, a list"),
    ({"input": [280]}, "input", "input is not allowed: it has the id 280"),
    ({"input": "\ud800"}, "input", "input is not allowed: it has half of a surrogate pair"),
    ({"input": "x" * 64}, "input", "maximum context length is 64 tokens"),
    ({"input": ["x"] * 129}, "input", "a body may have 128 inputs, not 129: send several"),
    ({"input": ["x"] * 2049}, "input", "one input, or a list of at most 2048 inputs, not 2049"),
    ({"input": "x", "dimensions": 8}, "dimensions", "dimensions=8 is not allowed: it must be 16"),
    ({"input": "x", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
    ({"input": "x", "pooling": "max"}, "pooling", "'mean' or 'last'"),
    ({"input": "x", "normalize": 1}, "normalize", "it must be true or false"),
    ({"input": "x", "prompt": "x"}, "prompt", "there is no such field"),
    ({"input": "x", "max_tokens": 3}, "max_tokens", "there is no such field"),
    ({"input": "x", "stream": True}, "stream", "there is no such field"),
    ({"input": "x", "truncate_prompt_tokens": 0}, "truncate", "a whole number >= 1"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD)
def test_wrong_bodies_are_refused_by_name(http, server, body, param, message):
    steps = server.metric("stu:step_seconds_count")
    answer = http.post("/v1/embeddings", content=json.dumps(body), headers=JSON)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert param in error["param"]
    assert server.metric("stu:step_seconds_count") == steps


def test_unknown_models_are_not_found(embeddings):
    with pytest.raises(openai.NotFoundError, match="the only model here"):
        embeddings.create(model="text-embedding-3-small", input="x")


def test_a_client_goes_away_and_others_are_answered(long_model_directory):
    """The inputs of the first one end, and are counted."""
    options = ["--max-running", "2", "--prompt-tokens-per-step", "64"]
    with serving(long_model_directory, *options) as server:
        connection = HTTPConnection(*server.address)
        many = json.dumps({"input": [[5] * 8000] * 100})
        connection.request("POST", "/v1/embeddings", many, JSON)
        eventually(lambda: server.metric("vllm:num_requests_running") > 0)
        connection.close()
        answer = server.post("/v1/embeddings", json={"input": [[5, 6], "x"]})
        assert [len(data["embedding"]) for data in answer.json()["data"]] == [16, 16]
        eventually(lambda: server.metric("vllm:num_requests_running") == 0)
        assert server.metric("vllm:num_requests_waiting") == 0
        assert server.pages_used() == 0
        assert server.metric("vllm:request_success_total") == 102
        assert server.metric("vllm:generation_tokens_total") == 0
        (aborted,) = [line for line in server.get("/metrics").text.splitlines() if ABORTED in line]
        assert float(aborted.split()[-1]) > 50


@pytest.mark.slow
def test_embeddings_continue_in_another_replica(long_model_directory):
    options = ["--replicas", "2", "--prompt-tokens-per-step", "64"]
    bodies = [{"input": [[token] * 8000]} for token in (5, 6)]
    with serving(long_model_directory, *options) as server, ThreadPoolExecutor(2) as pool:

        def ask(body):
            return server.post("/v1/embeddings", json=body).json()["data"]

        expected = [ask(body) for body in bodies]
        answers = [pool.submit(ask, body) for body in bodies]
        eventually(lambda: server.metric("vllm:num_requests_running") == 2)
        server.replicas()[0].kill()
        assert [answer.result() for answer in answers] == expected
        assert server.metric("stu:requests_resumed_total") == 1


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_are_the_cosines_of_embeddings(http, expected, path):
    def cosine(one, other, pooling="mean"):
        first, second = expected(one, pooling), expected(other, pooling)
        return first @ second / np.linalg.norm(first) / np.linalg.norm(second)

    one, several, pairs = INPUTS[0], INPUTS[1:], list(pairwise(INPUTS))
    for text_1, text_2, cosines in (
        (one, several, [cosine(one, other) for other in several]),
        ([one], "größe", [cosine(one, "größe")]),
        ([1, 100], [1, 100], [1.0]),
        ([a for a, _ in pairs], [b for _, b in pairs], [cosine(a, b) for a, b in pairs]),
    ):
        answer = http.post(path, json={"text_1": text_1, "text_2": text_2}).json()
        assert [data["index"] for data in answer["data"]] == list(range(len(cosines)))
        assert {data["object"] for data in answer["data"]} == {"score"}
        found = [data["score"] for data in answer["data"]]
        assert found == pytest.approx(cosines, abs=1e-5)
        assert (answer["object"], answer["id"][:6]) == ("list", "score-")
        assert answer["usage"]["completion_tokens"] == 0
    one, other = [3, 9, 7], [9, 5, 8, 6]
    for count in (2, -1):
        more = {"pooling": "last", "truncate_prompt_tokens": count}
        (data,) = http.post(path, json={"text_1": one, "text_2": other, **more}).json()["data"]
        kept = (one[-2:], other[-2:]) if count == 2 else (one, other)
        assert data["score"] == pytest.approx(cosine(*kept, "last"), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"text_1": "x"}, "text_2", 'field "text_2" is missing'),
        ({"text_1": [], "text_2": "x"}, "text_1", "a text or a list of at least one"),
        ({"text_1": ["x", "y"], "text_2": "x"}, "text_1", "it has 2 texts and text_2 1: give one"),
        ({"text_1": "x", "text_2": 5}, "text_2", "it must be a string, a list of token ids"),
        ({"text_1": "x", "text_2": ["y", "\ud800"]}, "text_2", "half of a surrogate pair"),
        ({"text_1": "x", "text_2": ["y"] * 128}, "text_2", "may have 128 texts, not 129"),
        ({"text_1": "x", "text_2": [[1] * 65]}, "text_2", "maximum context length is 64"),
        ({"text_1": "x", "text_2": ["y", [10**6]]}, "text_2", "it has the id 1000000"),
        ({"text_1": [[1] * 65], "text_2": ["y"]}, "text_1", "maximum context length is 64"),
        ({"text_1": "x", "text_2": "y", "use_activation": True}, "use_activation", "no such field"),
    ],
)
def test_wrong_pairs_are_refused(http, body, param, message):
    answer = http.post("/score", content=json.dumps(body), headers=JSON)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param
