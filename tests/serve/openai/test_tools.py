"""Tools in chats: prompts by templates that know tools or not, which calls are allowed, answers."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from serve.completion import Completion
from serve.openai.chat import ChatCompletions
from serve.openai.schemas import ChatBody, read_body
from serve.prompts import RequestBuilder
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"name": "add", "description": "Add two numbers.", "parameters": PARAMETERS, "strict": True}
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": {"name": "now"}}]
ASKED = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "max_tokens": 50}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "3"}]},
    {"role": "assistant", "content": "2."},
    {"role": "user", "content": "Thanks."},
]
KNOWS = """{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}
{{- message.role + '|' + (message.name or '') + '|' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '\\n' }}
{%- endfor %}"""
OTHER = KNOWS.replace("tool_call>", "function_call>")


@pytest.fixture
def make(tmp_path, code_tokenizer):
    """Call with the source of a template, or None for a model without one: chat completions."""

    def call(source):
        folder = Path("nothing")
        if source is not None:
            folder = tmp_path
            (tmp_path / "chat_template.jinja").write_text(source)
        common = {"tokenizer": code_tokenizer, "model_name": "demo", "max_seq_len": 4096}
        builder = RequestBuilder(code_tokenizer, {"seed": 3})
        return ChatCompletions(ChatTemplate(folder, code_tokenizer), 9, builder=builder, **common)

    return call


@pytest.fixture
def chats(make):
    return make(None)


def requests(chats, **fields):
    return chats.requests(0, read_body(ChatBody, {**ASKED, **fields}))


def prompt(chats, tokenizer, **fields):
    (request,) = requests(chats, **fields)
    return tokenizer.decode(request.prompt_token_ids)


def constraint(chats, **fields):
    (request,) = requests(chats, **fields)
    found = request.sampling.constraint
    return None if found is None else json.loads(found.source)


def test_a_template_without_tools_describes_them_in_a_system_message(chats, code_tokenizer):
    text = prompt(chats, code_tokenizer, messages=TURNS)
    system, rest = text.split("user: ", 1)
    assert system.startswith("system: Be brief.\n\n")
    shown = {name: value for name, value in ADD.items() if name != "strict"}
    assert f"{json.dumps(shown)}\n{json.dumps({'name': 'now'})}\n" in system
    assert (
        '<tool_call>\n{"name": "NAME", "arguments": {"PARAMETER": VALUE}}\n</tool_call>' in system
    )
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    answers = "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    assert rest == (
        f"1 + 1?\n\nassistant: {call}\n{call}\n\nuser: {answers}\n\nassistant: 2.\n\n"
        "user: Thanks.\n\nassistant:"
    )
    without = prompt(chats, code_tokenizer, messages=TURNS, tool_choice="none")
    assert without == f"system: Be brief.\n\nuser: {rest}"
    alone = prompt(chats, code_tokenizer)
    assert alone.startswith("system: These functions")
    assert alone.endswith("\n\nuser: hi\n\nassistant:")
    developer = [{**TURNS[0], "role": "developer"}, *TURNS[1:]]
    assert prompt(chats, code_tokenizer, messages=developer) == text


def test_a_template_with_tools_writes_them(make, code_tokenizer):
    text = prompt(make(KNOWS), code_tokenizer, messages=TURNS)
    shown = {"type": "function", "function": {**ADD}}
    del shown["function"]["strict"]
    assert text.startswith(json.dumps(shown))
    assert text.count('\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>') == 2
    assert "tool|add|2\n" in text


def test_calls_of_a_template_that_answers_would_not_have_are_refused(make, code_tokenizer):
    chats = make(OTHER)
    with pytest.raises(UserError, match="tools is not allowed: the model's chat template writes"):
        requests(chats)
    assert constraint(chats, tools=[]) is None


@pytest.mark.parametrize(
    ("fields", "names", "must_call"),
    [
        ({}, ["add", "now"], False),
        ({"tool_choice": "auto"}, ["add", "now"], False),
        ({"tool_choice": "required"}, ["add", "now"], True),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, ["now"], True),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": TOOLS[:1]},
                }
            },
            ["add"],
            False,
        ),
    ],
)
def test_the_choice_of_tools(chats, code_tokenizer, fields, names, must_call):
    found = constraint(chats, **fields)
    assert [tool["name"] for tool in found["tools"]] == names
    assert (found["must_call"], found["calls_several"]) == (must_call, True)
    assert constraint(chats, **fields, parallel_tool_calls=False) == {
        **found,
        "calls_several": False,
    }
    # A prompt does not depend on the choice, so that it is remembered.
    assert prompt(chats, code_tokenizer, **fields) == prompt(chats, code_tokenizer)


def test_no_tools_no_constraint(chats):
    for fields in ({"tool_choice": "none"}, {"tools": []}, {"tools": [], "tool_choice": "auto"}):
        assert constraint(chats, **fields) is None


def test_text_with_tools_may_have_a_format(chats):
    schema = {"type": "object"}
    found = constraint(chats, response_format={"type": "json_object", "schema": schema})
    assert found["text"] == schema
    with pytest.raises(UserError, match="it must be a JSON schema with tools"):
        constraint(chats, response_format={"type": "regex", "regex": "a"})
    with pytest.raises(
        UserError, match="ignore_eos=true is not allowed: it must be false with tools"
    ):
        constraint(chats, ignore_eos=True)


def pieces(text, rng):
    while text:
        size = rng.randint(1, 12)
        yield text[:size]
        text = text[size:]


ANSWER = (
    'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 17}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


def completion(text, finish_reason):
    return Completion(text, (), (), finish_reason)


def test_whole_and_streamed_answers_are_equal(chats):
    body = read_body(ChatBody, ASKED)
    (request,) = chats.requests(0, body)
    (writer,) = chats.writers(body, [request])
    whole = writer.write(completion(ANSWER, "stop"))
    assert whole["finish_reason"] == "tool_calls"
    message = whole["message"]
    assert message["content"] == "Let me see."
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [
        {"name": "add", "arguments": '{"a": 17}'},
        {"name": "now", "arguments": "{}"},
    ]
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    streamed = read_body(ChatBody, {**ASKED, "stream": True})
    for seed in range(30):
        (writer,) = chats.writers(streamed, [request])
        deltas = []
        parts = list(pieces(ANSWER, Random(seed)))
        for number, part in enumerate(parts, 1):
            choice = writer.write(completion(part, "stop" if number == len(parts) else None))
            deltas.append(choice["delta"])
        assert choice["finish_reason"] == "tool_calls"
        assert "".join(delta.get("content", "") for delta in deltas) == "Let me see."
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        for index in range(2):
            own = [call for call in calls if call["index"] == index]
            assert (own[0]["id"], own[0]["type"]) == (ids[index], "function")
            assert own[0]["function"]["name"] == functions[index]["name"]
            assert all(call.keys() == {"index", "function"} for call in own[1:])
            arguments = "".join(call["function"]["arguments"] for call in own)
            assert arguments == functions[index]["arguments"]
        assert all(first["index"] <= second["index"] for first, second in pairwise(calls))


def test_answers_without_calls_and_cut_off_ones(chats):
    body = read_body(ChatBody, ASKED)
    (request,) = chats.requests(0, body)
    for text, reason, content, arguments in (
        ("I do not know <tool", "length", "I do not know <tool", None),
        ("", "stop", "", None),
        (ANSWER[: ANSWER.index("7}")], "length", "Let me see.", '{"a": 1'),
    ):
        (writer,) = chats.writers(body, [request])
        choice = writer.write(completion(text, reason))
        assert (choice["finish_reason"], choice["message"]["content"]) == (reason, content)
        calls = choice["message"].get("tool_calls", [])
        assert [call["function"]["arguments"] for call in calls] == [arguments] * len(calls)
        assert bool(calls) == (arguments is not None)


def test_a_call_that_a_stop_string_cuts_is_no_call_to_run(chats):
    body = read_body(ChatBody, ASKED)
    (request,) = chats.requests(0, body)
    second = ANSWER.index('{"name": "now"')
    for end, reason in ((second + 30, "stop"), (second - 1, "tool_calls"), (None, "tool_calls")):
        (writer,) = chats.writers(body, [request])
        choice = writer.write(completion(ANSWER[:end], "stop"))
        assert choice["finish_reason"] == reason
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 17}'


OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    ("parameters", "is_allowed"),
    [
        ({}, True),
        ({"properties": {"a": {"type": "integer"}}}, True),
        ({"type": ["object"]}, True),
        ({"$ref": "#/$defs/a", "$defs": {"a": OBJECT}}, True),
        ({"anyOf": [OBJECT, {"enum": [{"a": 1}]}]}, True),
        ({"allOf": [{"description": "x"}, OBJECT]}, True),
        ({"type": "array"}, False),
        ({"type": "integer"}, False),
        ({"type": ["object", "null"]}, False),
        ({"enum": [1]}, False),
        ({"const": "x"}, False),
        ({"anyOf": [OBJECT, {"type": "null"}]}, False),
        ({"oneOf": []}, False),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": 99 * [{"$ref": "#/$defs/a"}]}}}, False),
    ],
)
def test_parameters_are_objects(chats, parameters, is_allowed):
    tools = [TOOLS[0], {"type": "function", "function": {"name": "f", "parameters": parameters}}]
    if is_allowed:
        assert requests(chats, tools=tools)
        return
    with pytest.raises(UserError, match="a schema of objects") as found:
        requests(chats, tools=tools)
    assert found.value.field == "tools.1.function.parameters"


def test_schemas_that_are_nested_too_deeply_are_refused(chats):
    schema = OBJECT
    for _ in range(300):
        schema = {**OBJECT, "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for field, value in (
        ("tools", [tool]),
        ("response_format", {"type": "json_object", "schema": schema}),
        ("guided_json", schema),
        ("chat_template_kwargs", schema),
    ):
        with pytest.raises(UserError, match="nested more than 200 levels") as found:
            requests(chats, **{field: value})
        assert found.value.field == field


def test_ids_of_calls_differ_between_turns(chats):
    body = read_body(ChatBody, {**ASKED, "seed": 1})
    (request,) = chats.requests(0, body)
    later = replace(request, prompt_token_ids=[*request.prompt_token_ids, 5])
    ids = set()
    for turn in (request, later, request):
        (writer,) = chats.writers(body, [turn])
        for call in writer.write(completion(ANSWER, "stop"))["message"]["tool_calls"]:
            ids.add(call["id"])
    assert len(ids) == 4
