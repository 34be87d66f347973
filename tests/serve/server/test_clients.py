"""Structured output for unmodified clients, from a server whose model knows no JSON."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import jsonschema_rs
import openai
import pytest
from openai import LengthFinishReasonError, OpenAI
from pydantic import BaseModel, Field

from tests import forked
from tests.serve.server_process import SECONDS, eventually, serving

TESTS = Path(__file__).parents[2]
CLIENTS = Path(__file__).parent / "clients"
INSTALLED = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stu-test-clients"

TWO_FIELDS = {
    "type": "object",
    "properties": {"count": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["count", "ok"],
}
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 100, "maxItems": 100}


class Step(BaseModel):
    kind: Literal["add", "subtract"]
    value: int


class Answer(BaseModel):
    title: Annotated[str, Field(max_length=8)]
    steps: Annotated[list[Step], Field(min_length=1, max_length=3)]
    note: Annotated[str, Field(max_length=4)] | None


ASKED = {"model": "model", "messages": [{"role": "user", "content": "Answer."}]}
PARSED = {**ASKED, "response_format": Answer, "max_tokens": 400}


@pytest.fixture(scope="module")
def server(long_model_directory):
    with serving(long_model_directory) as server:
        yield server


@pytest.fixture(scope="module")
def chat(server):
    with OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS
    ) as client:
        yield client.chat.completions


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def body(schema, **settings):
    return {"prompt": "x", "max_tokens": 200, "response_format": json_schema(schema), **settings}


def test_usage_and_metrics_count_remembered_prompts(server):
    """Those of the same `cache_salt` alone, and a prompt of several choices once."""
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    before = [server.metric(name) for name in names]
    prompt, cached = list(range(7, 47)), []
    with server.client() as client:
        for salt, rest, n in (("a", [], 1), ("a", [5], 1), ("b", [6], 1), ("a", [8, 9], 2)):
            asked = {"prompt": prompt + rest, "max_tokens": 3, "cache_salt": salt, "n": n}
            usage = client.post("/v1/completions", json=asked).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 40, 0, 40]
    counts = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert counts == [40 + 41 + 41 + 2 * 42, 40 + 2 * 40]


def test_openai_parses_whole_and_streamed_answers(chat):
    several = chat.parse(**PARSED, n=3, seed=1, logprobs=True, top_logprobs=2, stop=["\x00"])
    for choice in several.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Answer)
        tokens = [bytes(token.bytes) for token in choice.logprobs.content]
        assert b"".join(tokens).decode() == choice.message.content
    (whole,) = chat.parse(**PARSED, temperature=0).choices
    with chat.stream(**PARSED, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        message = stream.get_final_completion().choices[0].message
    assert isinstance(message.parsed, Answer)
    assert message.parsed == whole.message.parsed
    assert "".join(deltas) == message.content


def test_openai_reports_an_answer_that_was_cut_off(chat):
    with pytest.raises(LengthFinishReasonError):
        chat.parse(**{**PARSED, "max_tokens": 5})


class Add(BaseModel):
    """Add two numbers."""

    first: Annotated[int, Field(ge=0, le=99)]
    kind: Literal["}", "</tool_call>"]


TOOLS = [openai.pydantic_function_tool(Add, name="add")]
NOW = {"type": "function", "function": {"name": "now", "strict": True}}
CHOICE = {"type": "function", "function": {"name": "now"}}
CALLED = {**ASKED, "tools": [*TOOLS, NOW], "tool_choice": "required", "max_tokens": 300}


def test_openai_parses_whole_and_streamed_calls(chat):
    """Random answers have calls with valid arguments, which the next turn takes back."""
    for seed in range(2):
        asked = {**CALLED, "seed": seed, "parallel_tool_calls": seed % 2 == 0}
        (whole,) = chat.parse(**asked).choices
        with chat.stream(**asked) as stream:
            events = list(stream)
            (streamed,) = stream.get_final_completion().choices
        assert streamed.finish_reason == whole.finish_reason == "tool_calls"
        calls = whole.message.tool_calls
        assert [(call.id, call.function) for call in streamed.message.tool_calls] == [
            (call.id, call.function) for call in calls
        ]
        assert len(calls) == 1 or seed % 2 == 0
        for call in calls:
            is_add = call.function.name == "add"
            assert isinstance(call.function.parsed_arguments, Add) == is_add
            assert is_add or call.function.arguments == "{}"
        kinds = {event.type for event in events}
        assert {
            "tool_calls.function.arguments.delta",
            "tool_calls.function.arguments.done",
        } <= kinds
        results = [{"role": "tool", "tool_call_id": call.id, "content": "5"} for call in calls]
        messages = [*ASKED["messages"], whole.message, *results]
        answer = chat.create(**{**ASKED, "messages": messages}, tools=TOOLS, max_tokens=3)
        assert answer.usage.prompt_tokens > 100


def test_a_named_tool_and_none(chat):
    named = chat.create(
        **{**CALLED, "tool_choice": CHOICE, "parallel_tool_calls": False}, logprobs=True
    )
    (call,) = named.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("now", "{}")
    assert named.choices[0].message.content is None
    assert named.choices[0].logprobs.content
    asked = {**CALLED, "tool_choice": "none", "max_tokens": 5}
    assert chat.create(**asked).choices[0].message.tool_calls is None
    parameters = {"type": "object", "properties": {"a": {"type": "what"}}}
    wrong = {"type": "function", "function": {"name": "x", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError, match='the parameters of the tool "x": ') as found:
        chat.create(**{**CALLED, "tools": [wrong]})
    assert found.value.param == "tools"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_schema_that_becomes_too_costly_ends_its_request_with_a_reason(server, is_stream):
    options = [[{"properties": {f"{i}{name}": {}}} for name in "ab"] for i in range(8)]
    costly = {"type": "object", "allOf": [{"anyOf": pair} for pair in options]}
    first = {"type": "array", "items": {"type": "boolean"}, "minItems": 30, "maxItems": 30}
    schema = {"type": "array", "prefixItems": [first, costly], "minItems": 2}
    with server.client() as client:
        asked = body(schema, max_tokens=1000, stream=is_stream)
        with client.stream("POST", "/v1/completions", json=asked) as answer:
            if is_stream:
                lines = [line for line in answer.iter_lines() if line]
                found = json.loads(lines[-1].removeprefix("data: "))
            else:
                assert answer.status_code == 400
                found = json.loads(answer.read())
    assert found["error"]["type"] == "invalid_request_error"
    assert found["error"]["message"].startswith("json_schema cannot be followed beyond ")


@pytest.mark.slow
def test_json_continues_in_another_engine_after_a_kill(server):
    (replica,) = server.replicas()
    asked = body(NUMBERS, max_tokens=3000, stream=True, temperature=0)
    with server.client() as client, client.stream("POST", "/v1/completions", json=asked) as answer:
        pieces = []
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0])
            if len(pieces) == 20:
                replica.kill()
    assert server.metric("stu:replica_restarts_total") >= 1
    assert pieces[-1]["finish_reason"] == "stop"
    jsonschema_rs.validate(NUMBERS, json.loads("".join(piece["text"] for piece in pieces)))
    eventually(lambda: len(server.replicas()) == 1)


@pytest.mark.slow
def test_json_whitespace_is_a_setting(long_model_directory):
    schema = {"type": "array", "items": {"type": "null"}, "maxItems": 2}
    with serving(long_model_directory, "--json-whitespace", "flexible") as server:
        answer = server.post("/v1/completions", json=body(schema, n=20, max_tokens=400))
    choices = answer.json()["choices"]
    texts = [choice["text"] for choice in choices if choice["finish_reason"] == "stop"]
    assert all(len(json.loads(text)) <= 2 for text in texts)
    assert any(character.isspace() for text in texts for character in text)


def install(*more):
    command = ["sh", str(TESTS / "install_clients.sh"), sys.executable, str(INSTALLED), *more]
    subprocess.run(command, check=True)


def answers_of(server, *command):
    command = [*map(str, command), f"{server.url}/v1"]
    done = forked.run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.slow
def test_instructor_and_langchain(server):
    install()
    answers = answers_of(server, INSTALLED / "venv" / "bin" / "python", CLIENTS / "structured.py")
    for name in ("instructor JSON_SCHEMA", "instructor JSON_O1", "instructor partial"):
        Answer.model_validate(answers.pop(name))
    for name in ("json_schema None", "json_schema True", "stream"):
        Answer.model_validate({"note": None, **answers.pop(f"langchain {name}")})
    for name in ("instructor JSON", "langchain json_mode"):
        objects = answers.pop(name)
        assert objects, "none of eight answers ended"
        assert all(isinstance(value, dict) for value in objects)
    assert not answers


@pytest.mark.slow
def test_node_clients(server, tmp_path):
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    install("npm")
    # Node looks for modules beside the script.
    (tmp_path / "node_modules").symlink_to(INSTALLED / "node_modules")
    script = shutil.copy(CLIENTS / "structured.mjs", tmp_path)
    answers = answers_of(server, "node", script)
    for name in ("parse", "stream"):
        Answer.model_validate(answers.pop(f"openai {name}"))
    for name in ("generateObject", "streamObject"):
        answer = answers.pop(f"vercel {name}")
        Answer.model_validate(answer)
        assert set(answer["marks"]) == {"a", "b"}
        assert answer["shape"]["type"] in ("circle", "none")
    assert not answers


@pytest.mark.slow
def test_tools_and_responses_of_python_clients(server):
    install()
    answers = answers_of(server, INSTALLED / "venv" / "bin" / "python", CLIENTS / "tools.py")
    kinds = ("chat", "responses")
    modes = ("TOOLS", "TOOLS_STRICT", "partial", "RESPONSES_TOOLS")
    names = [f"instructor {mode}" for mode in modes]
    names += [f"langchain {kind} {name}" for kind in kinds for name in ("tools", "stream")]
    names += [f"langchain {kind} function_calling" for kind in kinds]
    names += ["litellm tools", "litellm stream", "litellm responses"]
    for name in names:
        Answer.model_validate({"note": None, **answers.pop(name)})
    for kind in kinds:
        assert answers.pop(f"langchain {kind} next turn") > 100
    first, later = answers.pop("langchain previous_response_id")
    assert later > first
    assert answers.pop("litellm events") in ("response.completed", "response.incomplete")
    assert not answers


@pytest.mark.slow
def test_tools_and_responses_of_node_clients(server, tmp_path):
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    install("npm")
    (tmp_path / "node_modules").symlink_to(INSTALLED / "node_modules")
    answers = answers_of(server, "node", shutil.copy(CLIENTS / "tools.mjs", tmp_path))
    names = [f"openai {name}" for name in ("parse", "stream", "runTools", "responses tools")]
    names += [
        f"vercel {provider} {name}"
        for provider in ("compatible", "chat", "responses")
        for name in ("generateText", "streamText")
    ]
    for name in names:
        found = answers.pop(name)
        assert found.keys() == {"first", "kind"}, name
        assert 0 <= found["first"] <= 99
        assert found["kind"] in ("}", "plain")
    for name in ("parse", "stream"):
        assert answers.pop(f"openai responses {name}").keys() == {"title", "good"}
    first, later = answers.pop("openai previous_response_id")
    assert later > first
    assert not answers
