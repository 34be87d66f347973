"""`stu-serve` over HTTP: OpenAI's client, wrong bodies, and routes for operators."""

import json
import re
from functools import partial

import openai
import pytest

from serve.sampling_params import SamplingParams
from tests.serve.requests import decode, make_request
from tests.serve.server_process import events

NO_EOS = {"stop_at_eos": False}
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def http(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def complete(client):
    """Call with settings of a completion that EOS does not end."""
    return partial(client.completions.create, model="model", extra_body=NO_EOS)


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_completions_match_the_engine(complete, code_model, code_tokenizer, temperature):
    tokens = [code_tokenizer.bos_id, *code_tokenizer.encode("def f(")]
    settings = {"temperature": temperature, "top_p": 0.9, "seed": 7}
    requests = [make_request(tokens, 20, SamplingParams(**settings))]
    (expected,) = decode(code_model, code_tokenizer, requests, batch_invariant=True)
    for prompt in ("def f(", tokens):
        asked = {"prompt": prompt, "max_tokens": 20, **settings}
        answer = complete(**asked)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(tokens), 20)
        stream = complete(**asked, stream=True, stream_options={"include_usage": True})
        *pieces, last = stream
        assert "".join(piece.choices[0].text for piece in pieces) == expected.text
        assert pieces[-1].choices[0].finish_reason == expected.finish_reason
        assert {piece.id for piece in pieces} == {last.id}
        assert (last.choices, last.usage) == ([], usage)


def test_streams_have_the_log_probabilities_of_whole_answers(complete, client):
    asked = {"prompt": ["def f(", "größe"], "n": 2, "seed": 4, "max_tokens": 12, "logprobs": 2}
    eos = {"logit_bias": {"2": 4}, "extra_body": {"min_tokens": 1}}
    for more in ({"echo": False}, {"echo": True}, {"echo": True, **eos}):
        whole = complete(**asked, **more).choices
        found = [{name: [] for name in choice.logprobs.to_dict()} for choice in whole]
        for piece in complete(**asked, **more, stream=True):
            (choice,) = piece.choices
            for name, values in choice.logprobs.to_dict().items():
                found[choice.index][name] += values
        assert found == [choice.logprobs.to_dict() for choice in whole]
    assert any(tokens["tokens"][-1] == "</s>" for tokens in found)
    chat = partial(client.chat.completions.create, model="model", messages=[USER], seed=4)
    asked = {"max_tokens": 12, "n": 2, "logprobs": True, "top_logprobs": 3, "extra_body": NO_EOS}
    whole, found = chat(**asked).choices, [[], []]
    for piece in chat(**asked, stream=True):
        (choice,) = piece.choices
        found[choice.index] += choice.logprobs.content
    assert found == [choice.logprobs.content for choice in whole]
    assert [len(tokens) for tokens in found] == [12, 12]


def test_best_of_and_prompt_logprobs_over_http(complete):
    """`test_answers.py` has what they must be."""
    asked = {"prompt": "def f(", "max_tokens": 8, "seed": 4}
    more = {"prompt_logprobs": 1, "best_of": 4, **NO_EOS}
    answer = complete(**asked, n=2, extra_body=more)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens == 4 * 8
    num_tokens = answer.usage.prompt_tokens
    assert [len(choice.prompt_logprobs) for choice in answer.choices] == [num_tokens] * 2
    each = {choice.text for choice in complete(**asked, n=4).choices}
    assert len({choice.text for choice in answer.choices} & each) == 2


def test_several_prompts_and_completions(complete):
    asked = {"prompt": ["def", "x ="], "n": 2, "seed": 1, "max_tokens": 8}
    choices = complete(**asked).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in choices}) == 4
    texts = ["", "", "", ""]
    for piece in complete(**asked, stream=True):
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in choices]


def test_only_a_seed_repeats_a_completion(complete):
    def text(**settings):
        return complete(prompt="x", max_tokens=20, **settings).choices[0].text

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text() != text()


def test_chats_match_completions_of_the_rendered_prompt(client, complete, code_tokenizer):
    chat = partial(
        client.chat.completions.create,
        model="model",
        messages=[{"role": "user", "content": "def f(x)"}],
        seed=1,
        extra_body=NO_EOS,
    )
    whole = chat(max_tokens=9, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 9
    prompt = "user: def f(x)\n\nassistant:"
    assert whole.usage.prompt_tokens == 1 + len(code_tokenizer.encode(prompt))
    pieces = [piece.choices[0] for piece in chat(max_completion_tokens=9, stream=True)]
    assert pieces[0].delta.role == "assistant"
    assert "".join(piece.delta.content for piece in pieces) == choice.message.content
    assert pieces[-1].finish_reason == "length"
    same = complete(prompt=prompt, max_tokens=9, seed=1)
    assert same.choices[0].text == choice.message.content


def test_the_next_turn_takes_messages_as_the_client_returns_them(client):
    chat = partial(client.chat.completions.create, model="model", max_tokens=3, temperature=0)
    first = {"role": "user", "content": "f"}
    message = chat(messages=[first], extra_body=NO_EOS).choices[0].message
    last = {"role": "user", "content": [{"type": "text", "text": "g", "cache_control": {}}]}
    plain = {"role": "assistant", "content": message.content}
    expected = chat(messages=[first, plain, last])
    nulls = {"refusal": None, "audio": None, "function_call": None, "tool_calls": None}
    for turn in (
        message,
        message.model_dump(),
        {**plain, **nulls, "annotations": [], "reasoning_content": None},
        {**plain, "tool_calls": [], "annotations": [{"type": "url_citation"}], "parsed": {"a": 1}},
    ):
        found = chat(messages=[first, turn, last])
        assert (found.choices, found.usage) == (expected.choices, expected.usage)
    empty, null = (
        chat(messages=[first, {"role": "assistant", "content": content}, last])
        for content in ("", None)
    )
    assert null.choices == empty.choices


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
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    num_choices = 4 if "n" in body else 1
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 6 * num_choices
    assert last["choices"] == []
    assert last["usage"] == pieces[-1]["usage"]
    assert {piece["usage"]["prompt_tokens"] for piece in pieces} == {last["usage"]["prompt_tokens"]}
    without_usage = {**body, "stream_options": {"continuous_usage_stats": True}}
    with http.stream("POST", f"/v1/{path}", json=without_usage) as answer:
        assert all("usage" not in piece for piece in events(answer))


def test_obfuscation_hides_the_lengths_of_pieces(http):
    body = {**X, "max_tokens": 20, "seed": 2, "stream": True, **NO_EOS}
    lengths, texts = {}, {}
    for hides in (True, False):
        asked = {**body, "stream_options": {"include_obfuscation": hides}}
        with http.stream("POST", "/v1/completions", json=asked) as answer:
            *lines, _ = filter(None, answer.iter_lines())
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines]
        lengths[hides] = {len(f"{line}\n\n".encode()) % 128 for line in lines}
        texts[hides] = "".join(piece["choices"][0]["text"] for piece in pieces)
        assert all(("obfuscation" in piece) == hides for piece in pieces)
    assert lengths[True] == {0}
    assert len(lengths[False]) > 1
    assert texts[True] == texts[False]


def test_regex_response_format(complete):
    body = {"response_format": {"type": "regex", "regex": "(yes|no)!"}}
    for choice in complete(prompt="x", n=3, max_tokens=30, extra_body=body).choices:
        assert choice.text in ("yes!", "no!")
        assert choice.finish_reason == "stop"


VLLM_NAMES = [
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("prompt_tokens_total", "request_success_total", "num_preemptions_total"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total"),
    *("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total"),
    "spec_decode_num_accepted_tokens_total",
    *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
    *("e2e_request_latency_seconds_bucket", "request_queue_time_seconds_bucket"),
    *("request_prompt_tokens_bucket", "request_generation_tokens_bucket"),
    *("request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket"),
    *("request_inference_time_seconds_bucket", "iteration_tokens_total_bucket"),
]


def json_schema(value):
    return {"type": "json_schema", "json_schema": value}


X = {"prompt": "x"}
YES = {"type": "regex", "regex": "yes"}
HI = {"messages": [USER]}
NO_FIELD = "is not allowed: there is no such field"
BAD = [
    ({}, "prompt", 'field "prompt" is missing'),
    ({**X, "max_token": 5}, "max_token", f"max_token {NO_FIELD}, did you mean"),
    ({**X, "max_tokens": -1}, "max_tokens", "max_tokens=-1 is not allowed"),
    ({**X, "max_tokens": 10**30}, "prompt", "max_seq_len"),
    ({**X, "max_tokens": "5"}, "max_tokens", 'max_tokens="5" is not allowed: it must be a whole'),
    ({**X, "max_tokens": 1000}, "prompt", "This model's maximum context length is 64 tokens"),
    ({**X, "temperature": -1}, "temperature", "temperature=-1"),
    ({**X, "temperature": True}, "temperature", "true is not allowed: it must be a number"),
    ({**X, "top_k": -2}, "top_k", "top_k=-2 is not allowed"),
    ({**X, "top_k": 2**70}, "top_k", "is not allowed"),
    ({**X, "top_p": -0.1}, "top_p", "from 0 (for the most probable token) to 1"),
    ({**X, "n": 0}, "n", "n=0 is not allowed: it must be a whole number from 1 to 128"),
    ({**X, "n": True}, "n", "n=true is not allowed"),
    ({**X, "n": 2**70}, "n", f"n={2**70}"),
    ({"prompt": ["x"] * 100, "n": 2}, "n", "a body may ask for 128 choices, not 200"),
    ({"prompt": ["x"] * 129}, "prompt", "a list of at most 128 prompts, not 129"),
    ({"prompt": [[1]] * 200}, "prompt", "a list of at most 128 prompts, not 200"),
    ({**X, "logprobs": 21}, "logprobs", "logprobs=21 is not allowed"),
    ({**X, "logprobs": 2**70}, "logprobs", "is not allowed"),
    ({**X, "stop": ["a"] * 129}, "stop", "at most 128 strings"),
    ({**X, "stop": ["x" * 5000] * 4}, "stop", "at most 128 strings"),
    ({**X, "stop": ""}, "stop", "none of them empty"),
    *(
        ({**X, "logit_bias": {key: 1}}, "logit_bias", "must be an object whose keys are token ids")
        for key in ("x", "1_0", " 300 ", "+3", "-1", "03", "\u0663", "1.0", "", "1" * 5000)
    ),
    ({**X, "logit_bias": {str(10**30): 1}}, "logit_bias", "has the id 1000000"),
    ({**X, "logit_bias": {"280": 1}}, "logit_bias", "has the id 280"),
    ({**X, "logit_bias": {"1": 1000}}, "logit_bias", "-100 to 100"),
    ({**X, "logit_bias": {str(i): 101 for i in range(300)}}, "logit_bias", "-100 to 100"),
    ({"prompt": [999]}, "prompt", "prompt is not allowed: it has the id 999"),
    ({"prompt": [-1]}, "prompt", "token ids (whole numbers >= 0)"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": [1] * 100_000}, "prompt", "maximum context length is 64"),
    ({"prompt": "x" * 100_000}, "prompt", "maximum context length is 64"),
    ({"prompt": {"a": 1}}, "prompt", "prompt is not allowed: it must be a string, a list of"),
    ({**X, "seed": -(2**63) - 1}, "seed", "is not allowed"),
    ({**X, "seed": 2**70}, "seed", "is not allowed"),
    ({**X, "ignore_eos": True, "stop_at_eos": True}, "ignore_eos", "opposite of stop_at_eos"),
    ({**X, "ignore_eos": True, "response_format": YES}, "ignore_eos", "as EOS ends it"),
    ({**X, "min_tokens": 1, "response_format": YES}, "min_tokens", "with a constraint"),
    ({**X, "min_tokens": 5, "max_tokens": 4}, "min_tokens", "from 0 to 4, the limit of new tokens"),
    ({**X, "stop_token_ids": [280]}, "stop_token_ids", "has the id 280"),
    ({**X, "stop_token_ids": [2**70]}, "stop_token_ids", "has the id"),
    ({**X, "stop_token_ids": [1] * 129}, "stop_token_ids", "at most 128"),
    ({**X, "stop": 5}, "stop", "stop=5 is not allowed"),
    ({**X, "echo": 1}, "echo", "echo=1 is not allowed: it must be true or false"),
    ({**X, "seed": "1"}, "seed", 'seed="1" is not allowed: it must be a whole number'),
    ({**X, "presence_penalty": 3}, "presence_penalty", "=3.0 is not allowed"),
    ({**X, "user": 5}, "user", "must be a string"),
    ({**X, "stream_options": {"include_usage": True}}, "stream_options", "it needs stream=true"),
    ({**X, "response_format": {"type": "regex", "regex": "(a"}}, "regex", "regex is not allowed"),
    ({**X, "response_format": {"type": "xml"}}, "response_format", "must be one of text, json_obj"),
    # No text meets these two.
    ({**X, "response_format": {"type": "regex", "regex": r"[^\s\S]"}}, "regex", "regex is not all"),
    ({**X, "response_format": json_schema({"schema": {"$ref": "#"}})}, "json_schema", ""),
    ({**X, "response_format": json_schema({"schema": {}, "strct": True})}, "json_schema", ""),
    ({**X, "suffix": "y"}, "suffix", "leave it out"),
    ({**X, "n": 2, "best_of": 1}, "best_of", "a whole number from n, which is 2, to 128"),
    ({**X, "priority": -1}, "priority", "from 0, which goes first and is the default"),
    ({**X, "prompt_logprobs": 21}, "prompt_logprobs", "from 0 to 20, or null"),
    ({**X, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "a whole number >= 1"),
    ({**X, "truncation_side": "right"}, "truncation_side", "shorten the prompt yourself"),
    ({**X, "skip_special_tokens": 0}, "skip_special_tokens", "true or false"),
    ({**X, "chat_template": "{{ x }}"}, "chat_template", "there is no such field"),
]


def message(role, content, **fields):
    return {"messages": [{"role": role, "content": content, **fields}]}


IMAGE = {"type": "image_url", "image_url": {}}
CALLS = [{"id": "x"}]
WRONG = {"name": "xy", "arguments": "[]"}
CALL = {"id": "x", "type": "function", "function": {"name": "xy", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "xy"}}
NAMED = {"type": "function", "function": {"name": "x"}}
BAD_CHATS = [
    ({}, "messages", 'field "messages" is missing'),
    ({"messages": []}, "messages", "a list of at least 1 element"),
    ({**HI, "chat_template": "{{ 1 }}"}, "chat_template", "the model has its own template"),
    ({**HI, "max_token": 1}, "max_token", f"max_token {NO_FIELD}, did you mean"),
    ({**HI, "prompt": "x"}, "prompt", f"prompt {NO_FIELD}"),
    ({**HI, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "the server sets"),
    (message("assistant", "x", refusal="no"), "refusal", '.refusal="no" is not allowed: put its'),
    (
        message("assistant", "x", tool_calls=CALLS),
        "tool_calls",
        'tool_calls.0.function" is missing',
    ),
    (
        message("assistant", "", tool_calls=[{**CALL, "function": WRONG}]),
        "arguments",
        "JSON object",
    ),
    (message("user", "x", tool_calls=[CALL]), "tool_calls", 'only a message of role "assistant"'),
    (message("user", "x", tool_call_id="x"), "tool_call_id", 'only a message of role "tool"'),
    (message("tool", "x", tool_call_id="x"), "tool_call_id", "no message before it has a call"),
    ({**HI, "tools": [{"type": "custom"}]}, "tools.0.type", "no tools of its own"),
    ({**HI, "tools": [{**TOOL, "function": {"name": "a b"}}]}, "name", "1 to 64 letters, digits"),
    ({**HI, "tools": [TOOL, TOOL]}, "tools", "several have the name"),
    ({**HI, "tools": [TOOL], "tool_choice": "any"}, "tool_choice", "it must be none, auto"),
    ({**HI, "tools": [TOOL], "tool_choice": 5}, "tool_choice", "a string or an object"),
    ({**HI, "tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type", "function or"),
    ({**HI, "tools": [TOOL], "tool_choice": NAMED}, "tool_choice", "no function 'x': did you mean"),
    ({**HI, "tool_choice": "required"}, "tool_choice", "tools has none"),
    ({**HI, "functions": [{}]}, "functions", "use tools"),
    (message("assistant", "x", speed=5), "speed", f"messages.0.speed {NO_FIELD}"),
    (message("user", None), "messages.0.content", "=null is not allowed: it must be a string"),
    (message("robot", "x"), "messages.0.role", "'system'"),
    (message("tool", "x"), "messages.0.tool_call_id", "the id of the call"),
    (message("function", "x"), "messages.0.role", 'use role "tool"'),
    (message("user", [IMAGE]), "messages.0.content.0.type", '="image_url" is not allowed: it must'),
    ({**HI, "top_logprobs": 2}, "top_logprobs", "used with logprobs=true"),
    ({**HI, "max_tokens": 1000}, "messages", "maximum context length is 64 tokens"),
    (message("user", "\ud800"), "messages", "surrogate"),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [("/v1/completions", *case) for case in BAD]
    + [("/v1/chat/completions", *case) for case in BAD_CHATS],
)
def test_wrong_bodies_are_refused_by_name_without_an_engine_step(
    http, server, path, body, param, message
):
    steps = server.metric("stu:step_seconds_count")
    for more in ({}, {"stream": True}) if "stream_options" not in body else ({},):
        answer = http.post(path, content=json.dumps({**body, **more}), headers=JSON)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert message in error["message"]
        is_too_long = "maximum context length is" in message  # gateways fall back on this code
        assert error["code"] == "context_length_exceeded" or not is_too_long
        assert "<state>" not in error["message"]
        assert param in (error["param"] or "") or param in error["message"]
    assert server.metric("stu:step_seconds_count") == steps


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 10_000]
)
def test_bodies_that_are_no_json_object_are_refused(http, content):
    for headers in ({}, JSON):
        answer = http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        if headers == {} and content:
            assert "content-type: application/json" in answer.json()["error"]["message"]


def test_unknown_paths_methods_and_models(http):
    for path, status in (("/v1/nothing", 404), ("/v1/completions", 405)):
        answer = http.get(path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    answer = http.post("/v1/completions", json={**X, "model": "gpt-4"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    for path in ("/v1/models/gpt-4", "/v1/models/org/model", "/v1/models/org%2Fmodel"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "the only model here" in answer.json()["error"]["message"]


def test_state_model_and_tokenizer_routes(http, code_tokenizer):
    state = {"status": "ok", "replicas": 1, "replicas_ready": 1}
    assert http.get("/health").json() == http.get("/ready").json() == state
    assert http.get("/version").json()["version"]
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("model", "model", 64)
    assert http.get("/v1/models/model").json() == model
    tokens = code_tokenizer.encode("größe\n")
    for special, first in ((True, [code_tokenizer.bos_id]), (False, [])):
        body = {"prompt": "größe\n", "add_special_tokens": special}
        answer = http.post("/tokenize", json=body).json()
        assert (answer["tokens"], answer["count"]) == (first + tokens, len(first + tokens))
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "größe\n"}
    assert http.post("/detokenize", json={"tokens": [999]}).status_code == 400
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    eos = http.post("/tokenize", json={"prompt": "</s>", "add_special_tokens": False}).json()
    assert eos["tokens"] == [code_tokenizer.eos_id]


def test_metrics_have_the_names_of_vllm(http, server):
    before = server.metric("vllm:generation_tokens_total")
    http.post("/v1/completions", json={**X, "max_tokens": 7, **NO_EOS}).raise_for_status()
    assert server.metric("vllm:generation_tokens_total") == before + 7
    text = http.get("/metrics").text
    for name in VLLM_NAMES:
        assert f"\nvllm:{name}{{" in text


def test_metrics_say_which_convolution_cache_runs(http, server):
    (line,) = re.findall(
        r"^stu:convolution_cache_info\{.*", http.get("/metrics").text, re.MULTILINE
    )
    assert re.search(r'kind="state",.*rank="[1-9]\d*",reason="".*\} 1.0$', line)
    assert 0 < server.metric("stu:convolution_cache_error") < 5e-7
    started = "replica 0 of model on cpu: long convolutions are cached as spectral states"
    assert any(started in line for line in server.lines)
    assert server.metric("stu:convolution_page_bytes") > 0
