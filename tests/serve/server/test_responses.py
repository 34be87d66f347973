"""Responses for OpenAI's client, from a server whose model knows no JSON."""

import json
import signal
from typing import Annotated, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.serve.server_process import SECONDS, serving

KEYS = "key-one,key-two"


class Add(BaseModel):
    """Add two numbers."""

    first: Annotated[int, Field(ge=0, le=99)]
    kind: Literal["}", "</tool_call>"]


class Answer(BaseModel):
    title: Annotated[str, Field(max_length=8)]
    is_good: bool


TOOL = openai.pydantic_function_tool(Add, name="add")["function"] | {"type": "function"}
ASKED = {"model": "model", "input": "Answer.", "max_output_tokens": 12, "temperature": 0}
NO_EOS = {"logit_bias": {"2": -100}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def server(long_model_directory, store):
    options = ("--batch-dir", store, "--max-response-bytes", 50_000)
    with serving(long_model_directory, *options, STU_API_KEYS=KEYS) as server:
        yield server


def connect(server, key):
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)


@pytest.fixture(scope="module")
def client(server):
    with connect(server, "key-one") as client:
        yield client


def test_a_response_and_what_is_stored_of_it(client, server):
    response = client.responses.create(**ASKED, metadata={"a": "b"}, extra_body=NO_EOS)
    assert (response.status, response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    chat = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "Answer."}],
        temperature=0,
        max_tokens=12,
        extra_body=NO_EOS,
    )
    assert response.output_text == chat.choices[0].message.content != ""
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == 12
    assert client.responses.retrieve(response.id) == response
    (item,) = client.responses.input_items.list(response.id)
    assert (item.role, item.content[0].text) == ("user", "Answer.")
    with connect(server, "key-two") as other, pytest.raises(openai.NotFoundError) as found:
        other.responses.retrieve(response.id)
    assert found.value.code == "response_not_found"
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as found:
        client.responses.create(**ASKED, previous_response_id=response.id)
    assert (found.value.param, found.value.code) == (
        "previous_response_id",
        "previous_response_not_found",
    )
    unstored = client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_a_response_that_is_not_stored_says_so(client):
    schema = {"type": "boolean", "description": 60_000 * "x"}  # more than is kept of all
    asked = ASKED | {"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    for response in (whole, streamed):
        assert response.output_text
        assert response.model_dump()["store"] is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
    assert client.responses.create(**ASKED).model_dump()["store"] is True


def test_a_stream_has_the_events_of_its_response(client):
    whole = client.responses.create(**ASKED, extra_body=NO_EOS, store=False)
    with client.responses.create(**ASKED, extra_body=NO_EOS, stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.total_tokens == whole.usage.total_tokens
    assert client.responses.retrieve(events[0].response.id) == events[-1].response
    raw = client.responses.with_raw_response.create(
        **ASKED, stream=True, stream_options={"include_obfuscation": True}
    )
    lines = [line for line in raw.http_response.iter_lines() if '"obfuscation"' in line]
    assert len({len(f"{line}\n\n".encode()) % 128 for line in lines}) == 1


def test_a_conversation_continues_from_stored_responses(client):
    first = client.responses.create(**ASKED, instructions="Be brief.", extra_body=NO_EOS)
    second = client.responses.create(
        **{**ASKED, "input": [{"role": "user", "content": "More."}]},
        instructions="Be long.",
        previous_response_id=first.id,
        extra_body=NO_EOS,
    )
    messages = [
        {"role": "system", "content": "Be long."},
        {"role": "user", "content": "Answer."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "More."},
    ]
    asked = {"model": "model", "temperature": 0, "max_tokens": 12, "extra_body": NO_EOS}
    chat = client.chat.completions.create(messages=messages, **asked)
    assert second.output_text == chat.choices[0].message.content
    assert second.usage.input_tokens == chat.usage.prompt_tokens
    assert second.previous_response_id == first.id
    count = client.responses.input_tokens.count(
        model="model",
        input="More.",
        instructions="Be long.",
        previous_response_id=first.id,
    )
    assert count.input_tokens == second.usage.input_tokens
    items = client.responses.input_items.list(second.id).data
    assert [item.content[0].text for item in items] == ["More."]


def test_openai_parses_formats(client):
    asked = {**ASKED, "max_output_tokens": 200, "text_format": Answer}
    whole = client.responses.parse(**asked)
    assert isinstance(whole.output_parsed, Answer)
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_parsed == whole.output_parsed


def test_tools_and_their_results(client):
    asked = {**ASKED, "tools": [TOOL], "max_output_tokens": 200, "parallel_tool_calls": False}
    helper = openai.pydantic_function_tool(Add, name="add")
    called = client.responses.parse(**{**asked, "tools": [helper]}, tool_choice="required")
    (call,) = called.output
    assert (call.type, call.name, called.status) == ("function_call", "add", "completed")
    assert isinstance(call.parsed_arguments, Add)
    with client.responses.stream(
        **asked, tool_choice={"type": "function", "name": "add"}
    ) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    assert "response.function_call_arguments.delta" in kinds
    assert "response.function_call_arguments.done" in kinds
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    by_id = client.responses.create(
        **{**ASKED, "input": [result]}, tools=[TOOL], previous_response_id=called.id
    )
    user = {"role": "user", "content": "Answer."}
    by_items = client.responses.create(
        **{**ASKED, "input": [user, *called.output, result]}, tools=[TOOL], store=False
    )
    assert by_id.output_text == by_items.output_text
    assert by_id.usage.input_tokens == by_items.usage.input_tokens > called.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 10**5}, "input"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.format",
        ),
        ({"tools": [{**TOOL, "parameters": {"not": {}}}]}, "tools"),
        (
            {
                "tools": [TOOL],
                "text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}},
            },
            "text.format",
        ),
        ({"input": [{"role": "user", "content": "\ud800"}]}, "input"),
        ({"previous_response_id": "\ud800"}, "previous_response_id"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, fields, param):
    headers = {"authorization": "Bearer key-one", "content-type": "application/json"}
    content = json.dumps({**ASKED, **fields})
    answer = server.post("/v1/responses", content=content, headers=headers)
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"] == param


def test_wrong_questions_about_stored_responses(client):
    response = client.responses.create(**ASKED)
    for call in (
        lambda: client.responses.cancel(response.id),
        lambda: client.responses.retrieve(response.id, stream=True),
        lambda: client.responses.input_items.list(response.id, limit=0),
        lambda: client.responses.input_items.list(response.id, after="msg_1"),
    ):
        with pytest.raises(openai.BadRequestError):
            call()


@pytest.mark.slow
def test_stored_responses_are_there_after_a_kill(long_model_directory, tmp_path):
    options = ("--batch-dir", tmp_path / "stored")
    with serving(long_model_directory, *options) as first, connect(first, "none") as client:
        response = client.responses.create(**ASKED)
        first.process.send_signal(signal.SIGKILL)
    with serving(long_model_directory, *options) as second, connect(second, "none") as client:
        assert client.responses.retrieve(response.id) == response
        again = client.responses.create(**ASKED, previous_response_id=response.id)
        assert again.usage.input_tokens > response.usage.input_tokens
