"""`stu-serve` over HTTP: OpenAI's client, bodies that are wrong, and what operators ask."""

import json

import httpx
import openai
import pytest
import torch

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling_params import SamplingParams
from tests.serve.requests import make_request
from tests.serve.server_process import events, eventually, serving

NO_EOS = {"stop_at_eos": False}
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def server(model_directory):
    with serving(model_directory, "--batch-invariant") as server:
        yield server
        assert server.pages_used() == 0
        assert server.metric("stu:replica_restarts_total") == 0
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
    expected = decode(code_model, code_tokenizer, make_request(tokens, 20, sampling))
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


def test_messages_as_the_client_returns_them_go_into_the_next_turn(client, http):
    first = {"role": "user", "content": "f"}
    settings = {"model": "model", "max_tokens": 3, "temperature": 0}
    answer = client.chat.completions.create(messages=[first], **settings, extra_body=NO_EOS)
    message = answer.choices[0].message
    last = {"role": "user", "content": [{"type": "text", "text": "g", "cache_control": {}}]}
    plain = {"role": "assistant", "content": message.content}
    expected = client.chat.completions.create(messages=[first, plain, last], **settings)
    nulls = {"refusal": None, "audio": None, "function_call": None, "tool_calls": None}
    for whole in (
        message,
        message.model_dump(),
        {**plain, **nulls, "annotations": [], "reasoning_content": None},
        {**plain, "tool_calls": [], "annotations": [{"type": "url_citation"}], "parsed": {"a": 1}},
    ):
        found = client.chat.completions.create(messages=[first, whole, last], **settings)
        assert found.choices == expected.choices
        assert found.usage == expected.usage
    empty = [first, {"role": "assistant", "content": ""}, last]
    expected = client.chat.completions.create(messages=empty, **settings)
    null = [first, {"role": "assistant", "content": None, "refusal": None}, last]
    assert client.chat.completions.create(messages=null, **settings).choices == expected.choices


def guidellm_body(limit, **content):
    """A body as guidellm 0.8 sends it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    more = {"stop": None, "ignore_eos": True}
    return {"model": "model", "stream": True, "stream_options": options, **limit, **more, **content}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", guidellm_body({"max_tokens": 6}, prompt="def f(x)")),
        ("chat/completions", guidellm_body({"max_completion_tokens": 6}, messages=[USER])),
        ("completions", guidellm_body({"max_tokens": 6}, prompt=["x", "y"], n=2)),
    ],
)
def test_usage_in_every_piece(http, path, body):
    with http.stream("POST", f"/v1/{path}", json=body) as answer:
        *pieces, last = events(answer)
    counts = [its["usage"]["completion_tokens"] for its in pieces]
    num_choices = 4 if "n" in body else 1
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 6 * num_choices
    assert last["choices"] == []
    assert last["usage"] == pieces[-1]["usage"]
    assert {its["usage"]["prompt_tokens"] for its in pieces} == {last["usage"]["prompt_tokens"]}
    alone = {**body, "stream_options": {"continuous_usage_stats": True}}
    with http.stream("POST", f"/v1/{path}", json=alone) as answer:
        assert all("usage" not in its for its in events(answer))


def test_obfuscation_hides_the_lengths_of_pieces(http):
    body = {**X, "max_tokens": 20, "seed": 2, "stream": True, **NO_EOS}
    lengths, texts = {}, {}
    for hides in (True, False):
        with http.stream(
            "POST",
            "/v1/completions",
            json={**body, "stream_options": {"include_obfuscation": hides}},
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        lengths[hides] = {len(f"{line}\n\n".encode()) % 128 for line in lines[:-1]}
        texts[hides] = "".join(its["choices"][0]["text"] for its in pieces)
        assert all(("obfuscation" in its) == hides for its in pieces)
    assert lengths[True] == {0}
    assert len(lengths[False]) > 1
    assert texts[True] == texts[False]


def test_errors_that_gateways_fall_back_on(client):
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(model="model", prompt="x", max_tokens=100)
    assert found.value.code == "context_length_exceeded"
    assert "maximum context length is" in found.value.message
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("gpt-4")
    assert found.value.code == "model_not_found"
    assert client.models.retrieve("model").id == "model"


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
YES = {"type": "regex", "regex": "yes"}
HI = {"messages": [USER]}
BAD = [
    ({}, "prompt", 'field "prompt" is missing'),
    (
        {**X, "max_token": 5},
        "max_token",
        "max_token is not allowed: there is no such field, did you mean",
    ),
    ({**X, "max_tokens": -1}, "max_tokens", "max_tokens=-1 is not allowed"),
    ({**X, "max_tokens": 10**30}, "prompt", "max_seq_len"),
    ({**X, "logit_bias": {str(10**30): 1}}, "logit_bias", "has the id 1000000"),
    ({**X, "max_tokens": "5"}, "max_tokens", 'max_tokens="5" is not allowed: it must be a whole'),
    ({**X, "max_tokens": 1000}, "prompt", "This model's maximum context length is 64 tokens"),
    ({**X, "temperature": -1}, "temperature", "temperature=-1"),
    ({**X, "temperature": True}, "temperature", "true is not allowed: it must be a number"),
    ({**X, "top_k": -2}, "top_k", "top_k=-2 is not allowed"),
    ({**X, "top_p": -0.1}, "top_p", "from 0 (for the most probable token) to 1"),
    ({**X, "n": 0}, "n", "n=0 is not allowed"),
    ({**X, "n": 10**9}, "n", "n=1000000000"),
    ({"prompt": ["x"] * 100, "n": 2}, "n", "a body may ask for 128 choices, not 200"),
    ({"prompt": ["x"] * 129}, "prompt", "a list of at most 128 prompts, not 129"),
    ({**X, "logprobs": 21}, "logprobs", "logprobs=21 is not allowed"),
    ({**X, "stop": ["a"] * 129}, "stop", "at most 128 strings"),
    ({**X, "stop": ""}, "stop", "none of them empty"),
    *(
        ({**X, "logit_bias": {key: 1}}, "logit_bias", "must be an object whose keys are token ids")
        for key in ("x", "1_0", " 300 ", "+3", "-1", "03", "\u0663", "1.0", "", "1" * 5000)
    ),
    ({**X, "logit_bias": {"999": 1}}, "logit_bias", "has the id 999"),
    ({**X, "logit_bias": {"1": 1000}}, "logit_bias", "-100 to 100"),
    ({"prompt": [999]}, "prompt", "prompt has the id 999"),
    ({"prompt": [-1]}, "prompt", "token ids (whole numbers >= 0)"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": [1] * 70}, "prompt", "maximum context length is 64"),
    ({"prompt": {"a": 1}}, "prompt", "prompt is not allowed: it must be a string, a list of"),
    ({**X, "seed": -(2**63) - 1}, "seed", "is not allowed"),
    ({**X, "ignore_eos": True, "stop_at_eos": True}, "ignore_eos", "opposite of stop_at_eos"),
    ({**X, "ignore_eos": True, "response_format": YES}, "ignore_eos", "as EOS ends it"),
    ({**X, "min_tokens": 1, "response_format": YES}, "min_tokens", "with a constraint"),
    ({**X, "min_tokens": 5, "max_tokens": 4}, "min_tokens", "from 0 to 4, the limit of new tokens"),
    ({**X, "stop_token_ids": [999]}, "stop_token_ids", "has the id 999"),
    ({**X, "stop_token_ids": [1] * 129}, "stop_token_ids", "at most 128"),
    ({**X, "user": 5}, "user", "must be a string"),
    ({**X, "stream_options": {"include_usage": True}}, "stream_options", "it needs stream=true"),
    ({**X, "response_format": {"type": "regex", "regex": "(a"}}, "regex", "regex is not allowed"),
    (
        {**X, "response_format": {"type": "xml"}},
        "response_format",
        "it must be one of text, json_object",
    ),
    ({**X, "suffix": "y"}, "suffix", "leave it out"),
    ({**X, "best_of": 3}, "best_of", "or equal to n"),
    ({**X, "chat_template": "{{ x }}"}, "chat_template", "there is no such field"),
]
BAD_CHATS = [
    ({}, "messages", 'field "messages" is missing'),
    ({"messages": []}, "messages", "a list of at least 1 element"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system'"),
    ({**HI, "chat_template": "{{ 1 }}"}, "chat_template", "the model has its own template"),
    (
        {**HI, "max_token": 1},
        "max_token",
        "max_token is not allowed: there is no such field, did you mean",
    ),
    ({**HI, "prompt": "x"}, "prompt", "prompt is not allowed: there is no such field"),
    ({**HI, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "the server sets"),
    *(
        ({"messages": [{"role": "assistant", "content": "x", name: value}]}, name, text)
        for name, value, text in (
            ("refusal", "no", 'messages.0.refusal="no" is not allowed: put its text into'),
            ("tool_calls", [{"id": "x"}], "the model calls no tools"),
            ("speed", 5, "messages.0.speed is not allowed: there is no such field"),
        )
    ),
    (
        {"messages": [{"role": "user", "content": None}]},
        "messages.0.content",
        "messages.0.content=null is not allowed: it must be a string",
    ),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages.0.role",
        'messages.0.role="tool" is not allowed',
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.type",
        'type="image_url" is not allowed: it must be "text"',
    ),
    ({**HI, "top_logprobs": 2}, "top_logprobs", "used with logprobs=true"),
    ({**HI, "max_tokens": 1000}, "messages", "maximum context length is 64 tokens"),
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
        assert param in (error["param"] or "") or param in error["message"]
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
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    for path in ("/v1/models/gpt-4", "/v1/models/org/model", "/v1/models/org%2Fmodel"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "the only model here" in answer.json()["error"]["message"]
    for path in ("/v1/nothing", "/v1/completions"):
        assert set(http.get(path).json()["error"]) == {"message", "type", "param", "code"}


def test_what_operators_ask(http, code_tokenizer):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ok"}
    assert http.get("/version").json()["version"]
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("model", "model", 64)
    assert http.get("/v1/models/model").json() == model
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
