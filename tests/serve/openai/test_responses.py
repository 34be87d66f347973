"""Bodies of responses, what is written for them piece by piece, and the store."""

import json
import math
import sqlite3
from pathlib import Path
from random import Random

import pytest
from openai._models import construct_type
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent, response_create_params

from serve.completion import Completion
from serve.openai.chat import ChatCompletions
from serve.openai.responses.body import ResponseBody
from serve.openai.responses.endpoint import Responses
from serve.openai.responses.store import ResponseStore, earlier_items
from serve.openai.schemas import ChatBody, read_body
from serve.prompts import RequestBuilder
from serve.request import TokenLogprobs
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"name": "add", "parameters": PARAMETERS, "strict": True}
TOOL, CHAT_TOOL = {"type": "function", **ADD}, {"type": "function", "function": ADD}
CALL = {"call_id": "call_1", "name": "add", "arguments": '{"a": 1}'}
LOGPROBS = "message.output_text.logprobs"
ANSWER = (
    'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 17}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 5}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def chats(code_tokenizer):
    common = {"tokenizer": code_tokenizer, "model_name": "demo", "max_seq_len": 4096}
    builder = RequestBuilder(code_tokenizer, {"seed": 3, "temperature": 1.0})
    template = ChatTemplate(Path("nothing"), code_tokenizer)
    return ChatCompletions(template, 9, builder=builder, **common)


@pytest.fixture(scope="module")
def responses(chats, code_tokenizer):
    return Responses(chats, tokenizer=code_tokenizer, model_name="demo", max_seq_len=4096)


def request_of(responses, **fields):
    (request,) = responses.requests(0, read_body(ResponseBody, {"input": "hi", **fields}))
    return request


def test_bodies_ask_for_the_same_as_chats(responses, chats):
    user, calls = {"role": "user", "content": "hi"}, [{"id": "call_1", "type": "function"}]
    calls[0]["function"] = {"name": "add", "arguments": CALL["arguments"]}
    schema = {"name": "x", "schema": {"type": "object"}, "strict": True}
    for response, chat in (
        ({}, {"messages": [user]}),
        ({"input": [user], "max_output_tokens": 5}, {"messages": [user], "max_tokens": 5}),
        (
            {"instructions": "Be brief.", "temperature": 0.5, "seed": 4, "top_k": 3},
            {
                "messages": [{"role": "system", "content": "Be brief."}, user],
                **{"temperature": 0.5, "seed": 4, "top_k": 3},
            },
        ),
        (
            {"input": [{"role": "developer", "content": "Be brief."}, user]},
            {"messages": [{"role": "system", "content": "Be brief."}, user]},
        ),
        (
            {
                "input": [
                    {**user, "type": "message", "content": [{"type": "input_text", "text": "hi"}]},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
                    {"type": "function_call", **CALL, "id": "fc_1", "status": "completed"},
                    {"type": "function_call_output", "call_id": "call_1", "output": "2"},
                ],
                "tools": [TOOL],
                "tool_choice": {"type": "function", "name": "add"},
                "parallel_tool_calls": False,
            },
            {
                "messages": [
                    user,
                    {"role": "assistant", "content": "Yes.", "tool_calls": calls},
                    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
                ],
                "tools": [CHAT_TOOL],
                "tool_choice": {"type": "function", "function": {"name": "add"}},
                "parallel_tool_calls": False,
            },
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "add"}],
                },
            },
            {"messages": [user], "tools": [CHAT_TOOL], "tool_choice": "required"},
        ),
        (
            {"text": {"format": {"type": "json_schema", **schema}, "verbosity": "medium"}},
            {"messages": [user], "response_format": {"type": "json_schema", "json_schema": schema}},
        ),
        (
            {"include": [LOGPROBS, "reasoning.encrypted_content"], "top_logprobs": 2},
            {"messages": [user], "logprobs": True, "top_logprobs": 2},
        ),
        ({"text": {"format": {"type": "text"}}, "background": False}, {"messages": [user]}),
        ({"reasoning": {"effort": "none", "summary": "auto"}}, {"messages": [user]}),
        ({"metadata": {"a": "b"}, "store": False, "user": "x"}, {"messages": [user]}),
    ):
        (expected,) = chats.requests(0, read_body(ChatBody, chat))
        assert request_of(responses, **response) == expected, response


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"input": []}, "input", "a text, or a list of at least one item"),
        ({"input": None}, "input", 'field "input" is missing'),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "input.0.type",
            "give the item itself",
        ),
        ({"input": [5]}, "input.0", "an object"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "'user'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type",
            "the model reads only text",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
            "input",
            "no message before it has a call with this id",
        ),
        (
            {"input": [{"type": "function_call", **CALL, "arguments": "["}]},
            "input.0.arguments",
            "a JSON object",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "no tools of its own"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name", "1 to 64 letters"),
        ({"tool_choice": "required"}, "tool_choice", "tools has none"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type", "function or allowed_tools"),
        ({"tool_choice": "any"}, "tool_choice", '{"type": "function", "name": ".."}, or {"type'),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
            "tool_choice",
            'like {"type": "function", "name": ".."}',
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
            "tool_choice",
            'like {"type": "allowed_tools", "mode": "auto", "tools": [',
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [CHAT_TOOL]},
            },
            "tool_choice.tools.0",
            'like {"type": "function", "name": ".."}',
        ),
        ({"background": True}, "background", "not written in the background"),
        ({"conversation": "conv_1"}, "conversation", "use previous_response_id"),
        ({"truncation": "auto"}, "truncation", "shorten the input yourself"),
        ({"include": ["x"]}, "include", "of code_interpreter_call.outputs"),
        ({"top_logprobs": 3}, "top_logprobs", "used with include"),
        ({"include": [LOGPROBS], "tools": [TOOL]}, "include", "use /v1/chat/completions"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "one of text"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "schema"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {}, "more": 1}}},
            "text.format.more",
            "there is no such field",
        ),
        (
            {"text": {"format": {"type": "json_schema", "schema": 5}}},
            "text.format.schema",
            "an object",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "ask for a shorter or longer answer"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", "no separate reasoning"),
        ({"max_output_tokens": -1}, "max_output_tokens", "a whole number >= 0"),
        ({"metadata": {"a": "x" * 600}}, "metadata", "at most 16 texts"),
        ({"stream_options": {}}, "stream_options", "it needs stream=true"),
        ({"stop_token_ids": [5] * 1000}, "stop_token_ids", "elements"),
        ({"logit_bias": {str(i): 1.0 for i in range(5000)}}, "logit_bias", "at most 4096"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": 5}]},
            "input.0.output",
            "a string or a list of text parts",
        ),
        (
            {
                "input": [
                    {"type": "function_call_output", "call_id": "x", "output": [5] * 100}
                    for _ in range(100)
                ]
            },
            "input",
            "items of at most 8192 parts together, not 10000",
        ),
        ({"inptu": 5}, "inptu", "did you mean"),
        # They would be in the response, as JSON that is none.
        (
            {"tools": [{**TOOL, "parameters": {"x": [math.inf]}}], "tool_choice": "none"},
            "tools",
            "a number that is not finite",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "add", "x": math.nan}},
            "tool_choice",
            "a number that is not finite",
        ),
    ],
)
def test_wrong_bodies_are_refused_by_name(responses, fields, field, message):
    with pytest.raises(UserError) as found:
        request_of(responses, **fields)
    assert found.value.field == field
    assert message in str(found.value)


def test_every_parameter_of_openai_s_client_is_known():
    """A new parameter of a newer client fails here, until somebody decides about it."""
    sent = response_create_params.ResponseCreateParamsBase.__annotations__.keys()
    known = {*ResponseBody.model_fields, *ResponseBody.harmless, *ResponseBody.neutral}
    assert sent - known == set()


def pieces(text, rng):
    while text:
        size = rng.randint(1, 12)
        yield text[:size]
        text = text[size:]


def write(responses, text, rng, finish_reason="stop", logprobs=(), **fields):
    """All events of a response, and the response."""
    body = read_body(ResponseBody, {"input": "hi", "stream": True, **fields})
    (request,) = responses.requests(0, body)
    writer = responses.writer("ab12", 5, body, request)
    events = json.loads(json.dumps(writer.begin()))
    for piece in pieces(text, rng):
        events += json.loads(json.dumps(writer.write(Completion(piece, (), logprobs, None))))
    writer_events = writer.write(Completion("", (), (), finish_reason))
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    writer_events += writer.end(usage, finish_reason == "length", 9)
    return events + json.loads(json.dumps(writer_events)), writer.response


@pytest.mark.parametrize(
    ("text", "reason", "fields"),
    [
        ("Yes, of course.", "stop", {}),
        ("", "stop", {}),
        ("Yes, of", "length", {}),
        (ANSWER, "stop", {"tools": [TOOL]}),
        (ANSWER[:-15], "length", {"tools": [TOOL]}),
        ("None.", "stop", {"tools": [TOOL]}),
    ],
)
def test_events_add_up_to_the_response(responses, text, reason, fields):
    """OpenAI's client adds them up; whatever the pieces are, the response is the same."""
    _, whole = write(responses, text, Random(0), reason, **fields)
    for seed in range(10):
        events, response = write(responses, text, Random(seed), reason, **fields)
        assert response == whole
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        kinds = [event["type"] for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == f"response.{whole['status']}"
        state = ResponseStreamState(input_tools=[], text_format=omit)
        added = {}
        for event in events:
            typed = construct_type(type_=ResponseStreamEvent, value=event)
            state.handle_event(typed)
            index = event.get("output_index")
            if event["type"] == "response.output_item.added":
                assert index == len(added)
                added[index] = ""
            elif event["type"].endswith(".delta"):
                added[index] += event["delta"]
            elif event["type"] == "response.output_item.done":
                item = event["item"]
                assert item == whole["output"][index]
                text_of = (
                    item["content"][0]["text"] if item["type"] == "message" else item["arguments"]
                )
                assert text_of == added[index]
        assert len(added) == len(whole["output"])
        snapshot = state._ResponseStreamState__current_snapshot
        assert [item.id for item in snapshot.output] == [item["id"] for item in whole["output"]]
        Response.model_validate(response)
    assert whole["status"] == ("incomplete" if reason == "length" else "completed")
    assert whole["incomplete_details"] == (
        {"reason": "max_output_tokens"} if reason == "length" else None
    )
    usage = whole["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (3, 4, 7)
    calls = [item for item in whole["output"] if item["type"] == "function_call"]
    assert len(calls) == text.count("<tool_call>")
    for call in calls:
        assert (call["status"] == "completed") == (reason == "stop" or call is not calls[-1])
    if text == ANSWER:
        assert [call["arguments"] for call in calls] == ['{"a": 17}', '{"a": 5}']
        assert whole["output"][0]["content"][0]["text"] == "Let me see."


def test_a_call_that_a_stop_string_cuts_is_incomplete(responses):
    _, response = write(responses, ANSWER[:-20], Random(0), tools=[TOOL])
    statuses = [item["status"] for item in response["output"]]
    assert statuses == ["completed", "completed", "incomplete"]
    assert response["status"] == "completed"
    store = ResponseStore(None, 10_000)
    store.add("me", response, [])
    assert len(store.conversation("me", response["id"])) == 2
    store.close()


def test_log_probabilities_are_in_events_and_the_response(responses):
    logprobs = [TokenLogprobs(70, -0.5, {70: -0.5, 71: -1.0}, 1)]
    fields = {"include": [LOGPROBS], "top_logprobs": 2}
    events, response = write(responses, "a", Random(0), logprobs=logprobs, **fields)
    (found,) = response["output"][0]["content"][0]["logprobs"]
    assert found["logprob"] == -0.5
    assert len(found["top_logprobs"]) == 2
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == [found]


def test_a_failed_response(responses):
    body = read_body(ResponseBody, {"input": "hi"})
    (request,) = responses.requests(0, body)
    writer = responses.writer("ab12", 5, body, request)
    writer.begin()
    writer.write(Completion("Yes", (), (), None))
    events = writer.fail({"error": {"message": "no", "type": "server_error"}})
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "no"}
    assert writer.response["output"][0]["status"] == "incomplete"
    Response.model_validate(writer.response)


def test_a_row_of_a_batch_has_the_whole_response(responses):
    body = responses.read({"input": "hi", "tools": [TOOL]})
    requests = responses.requests(3, body)
    answer = responses.answer(3, body, requests, [Completion(ANSWER, (5, 6), (), "stop")])
    assert answer == responses.answer(3, body, requests, [Completion(ANSWER, (5, 6), (), "stop")])
    assert (answer["id"], answer["store"], answer["usage"]["output_tokens"]) == ("resp_3", False, 2)
    for field, value in (("stream", True), ("previous_response_id", "resp_1")):
        with pytest.raises(UserError, match=field):
            responses.read({"input": "hi", field: value})


def stored(number, previous=None, size=0, status="completed"):
    items = [{"type": "message", "id": f"msg_in{number}", "status": "completed"}]
    output = [{"type": "function_call", "id": f"fc_{number}", "status": status, "x": "x" * size}]
    response_id = f"resp_{number}"
    return {"id": response_id, "previous_response_id": previous, "output": output}, items


@pytest.fixture(params=["memory", "file"])
def database(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "responses.sqlite3"


def test_stored_responses_are_found_by_their_owner_until_deleted(database):
    store = ResponseStore(database, 10_000)
    for number in range(3):
        store.add("me", *stored(number, f"resp_{number - 1}" if number else None))
    assert json.loads(store.response("me", "resp_1")) == stored(1, "resp_0")[0]
    assert store.items("me", "resp_1") == stored(1)[1]
    ids = [item["id"] for item in store.conversation("me", "resp_2")]
    assert ids == ["msg_in0", "fc_0", "msg_in1", "fc_1", "msg_in2", "fc_2"]
    for owner, response_id in (("you", "resp_1"), ("me", "resp_7"), ("", "resp_1")):
        for call in (store.response, store.items, store.conversation, store.delete):
            with pytest.raises(UserError) as found:
                call(owner, response_id)
            assert found.value.code == "response_not_found"
    store.delete("me", "resp_0")
    assert store.response("me", "resp_2")
    with pytest.raises(UserError, match="resp_0"):
        store.conversation("me", "resp_2")
    store.close()


def test_responses_used_least_recently_make_room(database):
    store = ResponseStore(database, 3000)
    store.add("me", *stored(0, size=500))
    store.add("me", *stored(1, "resp_0", size=500))
    store.add("me", *stored(2, size=500))
    store.conversation("me", "resp_1")
    for number in (3, 4):
        store.add("me", *stored(number, size=500))
    found = [number for number in range(5) if has(store, number)]
    assert found == [0, 1, 3, 4]
    store.response("me", "resp_0")  # asking for one is a use of it, too
    store.items("me", "resp_1")
    for number in (6, 7):
        store.add("me", *stored(number, size=500))
    assert [number for number in range(8) if has(store, number)] == [0, 1, 6, 7]
    assert not store.add("me", *stored(5, size=5000))  # larger than all
    assert not has(store, 5)
    store.close()


def test_responses_that_a_full_disk_refuses_take_no_room(database):
    store = ResponseStore(database, 3000)
    for number in range(4):
        store.add("me", *stored(number, size=500))
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count={pages}")
    for number in range(10, 20):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            store.add("me", *stored(number, size=2500))
    assert [number for number in range(20) if has(store, number)] == [0, 1, 2, 3]
    store._database.execute("PRAGMA max_page_count=1000")
    store.add("me", *stored(4, size=500))
    assert [number for number in range(20) if has(store, number)] == [1, 2, 3, 4]
    store.close()


def test_a_file_that_cannot_be_written_ends_no_conversation(database):
    store = ResponseStore(database, 3000)
    store.add("me", *stored(0, size=500))
    store._database.execute("PRAGMA query_only=ON")
    assert store.conversation("me", "resp_0")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store.add("me", *stored(1, size=500))
    store.close()


def has(store, number):
    try:
        store.response("me", f"resp_{number}")
    except UserError:
        return False
    return True


def test_a_file_outlives_the_server(tmp_path):
    path = tmp_path / "responses.sqlite3"
    first = ResponseStore(path, 3000)
    for number in range(4):
        first.add("me", *stored(number, size=500))
    # As after a kill: not closed.
    second = ResponseStore(path, 3000)
    assert has(second, 3)
    for number in (4, 5):
        second.add("me", *stored(number, size=500))
    assert [number for number in range(6) if has(second, number)] == [2, 3, 4, 5]
    second.close()
    first.close()


def test_calls_that_were_cut_off_are_no_part_of_the_conversation():
    store = ResponseStore(None, 3000)
    store.add("me", *stored(0, status="incomplete"))
    assert [item["id"] for item in store.conversation("me", "resp_0")] == ["msg_in0"]
    store.close()


def test_stored_conversations_that_cannot_be_continued(database):
    store = ResponseStore(database, 10**6)
    user = {"type": "message", "role": "user", "content": "x", "id": "m", "status": "completed"}
    call = {"type": "function_call", **CALL, "id": "fc", "status": "completed"}
    for name, items, output in (
        ("whole", 1023 * [user], call),
        ("long", 1024 * [user], call),
        ("broken", [user], {**call, "arguments": '{"a": '}),
    ):
        store.add("me", {"id": name, "previous_response_id": None, "output": [output]}, items)
    assert len(earlier_items(store, "me", "whole", 0)) == 1024
    for name, num_new_items, message, code in (
        ("whole", 1, "a conversation may have 1024 items", None),
        ("long", 0, "a conversation may have 1024 items", None),
        ("broken", 1, "1.arguments=.* a JSON object", None),
        ("none", 1, "no stored response", "previous_response_not_found"),
    ):
        with pytest.raises(UserError, match=message) as found:
            earlier_items(store, "me", name, num_new_items)
        assert (found.value.field, found.value.code) == ("previous_response_id", code)
    store.close()
