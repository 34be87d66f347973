"""`stu-serve` over HTTP: OpenAI's client, bodies that are wrong, and what operators ask."""

import json

import httpx
import openai
import pytest
import torch

from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import Request
from serve.sampling import SamplingParams
from tests.serve.server_process import events, eventually, serving

NO_EOS = {"stop_at_eos": False}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(model_directory):
    with serving(model_directory, "--batch-invariant") as server:
        yield server
        assert server.pages_used() == 0
        assert server.stop() == 0
        assert not [line for line in server.lines if '"error"' in line]


@pytest.fixture(scope="module")
def http(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def decode(model, tokenizer, request):
    engine = Engine(model, tokenizer, EngineConfig(cache_gib=0.01, batch_invariant=True))
    engine.add(request)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return "".join(its.text for its in outputs), outputs[-1].finish_reason


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_completions_are_those_of_the_engine(client, code_model, code_tokenizer, temperature):
    tokens = [code_tokenizer.bos_id, *code_tokenizer.encode("def f(")]
    sampling = SamplingParams(temperature=temperature, top_p=0.9, seed=7)
    expected = decode(code_model, code_tokenizer, Request(tokens, 20, sampling))
    settings = {"temperature": temperature, "top_p": 0.9, "seed": 7, "max_tokens": 20}
    for prompt in ("def f(", tokens):
        answer = client.completions.create(
            model="model", prompt=prompt, **settings, extra_body=NO_EOS
        )
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == expected
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(tokens), 20)
        pieces = list(
            client.completions.create(
                model="model",
                prompt=prompt,
                stream=True,
                stream_options={"include_usage": True},
                **settings,
                extra_body=NO_EOS,
            )
        )
        assert "".join(its.choices[0].text for its in pieces[:-1]) == expected[0]
        assert pieces[-2].choices[0].finish_reason == expected[1]
        assert len({its.id for its in pieces}) == 1
        assert pieces[-1].choices == []
        assert pieces[-1].usage == usage


def test_several_prompts_and_completions(client):
    answer = client.completions.create(
        model="model", prompt=["def", "x ="], n=2, seed=1, max_tokens=8, extra_body=NO_EOS
    )
    assert [its.index for its in answer.choices] == [0, 1, 2, 3]
    assert len({its.text for its in answer.choices}) == 4
    texts = ["", "", "", ""]
    for piece in client.completions.create(
        model="model",
        prompt=["def", "x ="],
        n=2,
        seed=1,
        max_tokens=8,
        stream=True,
        extra_body=NO_EOS,
    ):
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [its.text for its in answer.choices]


def test_a_seed_decides_and_none_does_not(client):
    def text(**settings):
        answer = client.completions.create(
            model="model", prompt="x", max_tokens=20, extra_body=NO_EOS, **settings
        )
        return answer.choices[0].text

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text() != text()


def test_log_probabilities_of_a_prompt(client, code_model, code_tokenizer):
    tokens = [code_tokenizer.bos_id, *code_tokenizer.encode("def größe(x):")]
    with torch.no_grad():
        logprobs = code_model(torch.tensor([tokens]))[0].double().log_softmax(-1)
    expected = [row[token].item() for row, token in zip(logprobs, tokens[1:], strict=False)]
    for count in (0, 1):
        (choice,) = client.completions.create(
            model="model", prompt=tokens, max_tokens=count, echo=True, logprobs=1, temperature=0
        ).choices
        assert choice.logprobs.token_logprobs[0] is None
        found = choice.logprobs.token_logprobs[1 : len(tokens)]
        assert found == pytest.approx(expected, abs=2e-5)
        assert len(choice.logprobs.tokens) == len(tokens) + count
        assert choice.finish_reason == "length"


def test_chats(client, code_tokenizer):
    messages = [{"role": "user", "content": "def f(x)"}]
    whole = client.chat.completions.create(
        model="model",
        messages=messages,
        max_tokens=9,
        seed=1,
        logprobs=True,
        top_logprobs=2,
        extra_body=NO_EOS,
    )
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 9
    assert [len(its.top_logprobs) for its in choice.logprobs.content] == [2] * 9
    prompt = "user: def f(x)\n\nassistant:"
    assert whole.usage.prompt_tokens == 1 + len(code_tokenizer.encode(prompt))
    pieces = list(
        client.chat.completions.create(
            model="model",
            messages=messages,
            max_completion_tokens=9,
            seed=1,
            stream=True,
            extra_body=NO_EOS,
        )
    )
    deltas = [its.choices[0].delta for its in pieces]
    assert deltas[0].role == "assistant"
    assert "".join(its.content for its in deltas) == choice.message.content
    assert pieces[-1].choices[0].finish_reason == "length"
    same = client.completions.create(
        model="model", prompt=prompt, max_tokens=9, seed=1, extra_body=NO_EOS
    )
    assert same.choices[0].text == choice.message.content


def test_response_formats(client):
    for _ in range(3):
        answer = client.completions.create(
            model="model",
            prompt="x",
            max_tokens=30,
            extra_body={"response_format": {"type": "regex", "regex": "(yes|no)!"}},
        )
        assert answer.choices[0].text in ("yes!", "no!")
        assert answer.choices[0].finish_reason == "stop"


VLLM_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
]
X = {"prompt": "x"}
HI = {"messages": [{"role": "user", "content": "hi"}]}
BAD = [
    ({}, "prompt", 'field "prompt" is missing'),
    ({**X, "max_token": 5}, "max_token", 'unknown field "max_token"'),
    ({**X, "max_tokens": -1}, "max_tokens", "max_tokens=-1 is not allowed"),
    ({**X, "max_tokens": 10**30}, "prompt", "max_seq_len"),
    ({**X, "logit_bias": {str(10**30): 1}}, "logit_bias", "has the id 1000000"),
    ({**X, "max_tokens": "5"}, "max_tokens", "valid integer"),
    ({**X, "max_tokens": 1000}, "prompt", "exceed the model's max_seq_len=64"),
    ({**X, "temperature": -1}, "temperature", "temperature=-1"),
    ({**X, "temperature": True}, "temperature", "valid number"),
    ({**X, "top_k": -1}, "top_k", "top_k=-1 is not allowed"),
    ({**X, "top_p": 0}, "top_p", "above 0"),
    ({**X, "n": 0}, "n", "n=0 is not allowed"),
    ({**X, "n": 10**9}, "n", "n=1000000000"),
    ({"prompt": ["x"] * 100, "n": 2}, "n", "200, and a request may ask for 128"),
    ({"prompt": ["x"] * 129}, "prompt", "129 elements"),
    ({**X, "logprobs": 21}, "logprobs", "logprobs=21 is not allowed"),
    ({**X, "stop": ["a"] * 5}, "stop", "at most 4 strings"),
    ({**X, "stop": ""}, "stop", "none of them empty"),
    ({**X, "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({**X, "logit_bias": {"999": 1}}, "logit_bias", "has the id 999"),
    ({**X, "logit_bias": {"1": 1000}}, "logit_bias", "-100 to 100"),
    ({"prompt": [999]}, "tokens", "has the id 999"),
    ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": [1] * 70}, "prompt", "exceed the model's max_seq_len=64"),
    ({"prompt": {"a": 1}}, "prompt", "valid string"),
    ({**X, "seed": -1}, "seed", "seed=-1 is not allowed"),
    ({**X, "stream_options": {"include_usage": True}}, "stream_options", "stream=true alone"),
    ({**X, "response_format": {"type": "regex", "regex": "(a"}}, "regex", "regex is not allowed"),
    ({**X, "response_format": {"type": "xml"}}, "response_format", "its type must be one of"),
    ({**X, "suffix": "y"}, "suffix", "left out"),
    ({**X, "best_of": 3}, "best_of", "equal to n"),
    ({**X, "chat_template": "{{ x }}"}, "chat_template", "unknown field"),
]
BAD_CHATS = [
    ({}, "messages", 'field "messages" is missing'),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system'"),
    ({**HI, "chat_template": "{{ 1 }}"}, "chat_template", "unknown field"),
    ({**HI, "top_logprobs": 2}, "top_logprobs", "logprobs=true alone"),
    ({**HI, "max_tokens": 1000}, "prompt", "max_seq_len"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [("/v1/completions", *case) for case in BAD]
    + [("/v1/chat/completions", *case) for case in BAD_CHATS],
)
def test_wrong_bodies_are_refused_by_name(http, server, path, body, param, message):
    """And no engine steps for them."""
    steps = server.metric("stu:step_seconds_count")
    for more in ({}, {"stream": True}) if "stream_options" not in body else ({},):
        answer = http.post(path, content=json.dumps({**body, **more}), headers=JSON)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert message in error["message"]
        assert param in (error["param"] or "")
    assert server.metric("stu:step_seconds_count") == steps


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 10_000]
)
def test_bodies_that_are_no_json_object(http, content):
    for headers in ({}, JSON):
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        if headers == {} and content:
            assert "content-type: application/json" in answer.json()["error"]["message"]


def test_paths_methods_and_models_that_there_are_not(http):
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    answer = http.post("/v1/completions", json={**X, "model": "gpt-4"})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    for path in ("/v1/nothing", "/v1/completions"):
        assert set(http.get(path).json()["error"]) == {"message", "type", "param", "code"}


def test_what_operators_ask(http, code_tokenizer):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ok"}
    assert http.get("/version").json()["version"]
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("model", "model", 64)
    for special, first in ((True, [code_tokenizer.bos_id]), (False, [])):
        body = {"prompt": "größe\n", "add_special_tokens": special}
        answer = http.post("/tokenize", json=body).json()
        assert answer["tokens"] == first + code_tokenizer.encode("größe\n")
        assert answer["count"] == len(answer["tokens"])
    answer = http.post("/detokenize", json={"tokens": code_tokenizer.encode("größe\n")})
    assert answer.json() == {"prompt": "größe\n"}
    assert http.post("/detokenize", json={"tokens": [999]}).status_code == 400
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    eos = http.post("/tokenize", json={"prompt": "</s>", "add_special_tokens": False}).json()
    assert eos["tokens"] == [code_tokenizer.eos_id]


def test_metrics_have_vllm_s_names(http, server):
    before = server.metric("vllm:generation_tokens_total")
    http.post("/v1/completions", json={**X, "max_tokens": 7, **NO_EOS}).raise_for_status()
    assert server.metric("vllm:generation_tokens_total") == before + 7
    text = http.get("/metrics").text
    for name in VLLM_NAMES:
        assert f"\nvllm:{name}{{" in text


def test_a_reader_that_goes_away_frees_its_pages(server, http):
    body = {**X, "max_tokens": 60, "stream": True, **NO_EOS}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    eventually(lambda: server.pages_used() == 0 and not server.metric("vllm:num_requests_running"))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**body, "stream": False}, timeout=0.02)
    eventually(lambda: server.pages_used() == 0 and not server.metric("vllm:num_requests_running"))


def test_answers_go_on_beside_wrong_ones(http):
    """A stream beside a hundred bodies that are refused is what it is alone."""
    body = {**X, "max_tokens": 60, "seed": 5, "stream": True, **NO_EOS}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        alone = events(answer)
    with http.stream("POST", "/v1/completions", json=body) as answer:
        for _ in range(3):
            for wrong, *_ in BAD:
                http.post("/v1/completions", content=json.dumps(wrong), headers=JSON)
        beside = events(answer)
    assert [its["choices"] for its in beside] == [its["choices"] for its in alone]
