"""Grammars of answers that may call tools, and what reads such answers."""

import json
from random import Random

import jsonschema_rs
import pytest

from serve.openai.tools.reader import CallReader
from serve.sampling.grammar import Grammars
from serve.sampling.tool_grammar import BEGIN, CallableTool, ToolAnswers, tool_constraint
from stu.common.errors import UserError

ADD = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "mark": {"enum": ["}", "\n</tool_call>", "<tool_call>", '"'], "type": "string"},
        "more": {"type": "array", "items": {"$ref": "#/$defs/inner"}, "maxItems": 2},
    },
    "required": ["a", "mark"],
    "$defs": {"inner": {"type": "object", "properties": {"x": {"type": "null"}}}},
}
TOOLS = [
    CallableTool("add", ADD, True),
    CallableTool("now", None, True),
    CallableTool("no-thing", {"type": "object", "properties": {}}, True),
    CallableTool("list_2", {**ADD, "x-guidance": {"whitespace_flexible": True}}, False),
]
SCHEMAS = {
    "add": ADD,
    "now": {"type": "object", "maxProperties": 0},
    "no-thing": {"type": "object", "maxProperties": 0},
    "list_2": ADD,
}


@pytest.fixture(scope="module")
def grammars(code_tokenizer):
    return Grammars(code_tokenizer)


def walk(grammars, tokenizer, answers, rng, begin="", most_tokens=400):
    """A random answer that follows `begin`, and whether it is whole."""
    matcher = grammars.matcher(tool_constraint(answers))
    tokens = tokenizer.encode(begin) if begin else []
    for token in tokens:
        assert matcher.allowed(tokenizer.vocab_size)[token], begin
        matcher.append(token)
    for _ in range(most_tokens):
        allowed = matcher.allowed(tokenizer.vocab_size).nonzero()[:, 0].tolist()
        assert not matcher.error
        token = rng.choice(allowed)
        if tokenizer.eos_id in allowed and rng.random() < 0.5:
            token = tokenizer.eos_id
        if token == tokenizer.eos_id:
            return tokenizer.decode(tokens), True
        tokens.append(token)
        matcher.append(token)
    return tokenizer.decode(tokens), False


def read(text, rng=None, follows_text=True):
    """Text and calls of an answer, read in random pieces."""
    reader, said, calls = CallReader(follows_text), "", []
    while text or rng is not None:
        size = len(text) if rng is None else rng.randint(1, 9)
        piece, text = text[:size], text[size:]
        for part in reader.read(piece, not text):
            if part.kind == "text":
                said += part.text
            elif part.kind == "call":
                calls.append([part.text, "", False])
            elif part.kind == "arguments":
                calls[-1][1] += part.text
            else:
                calls[-1][2] = True
        if not text:
            break
    assert reader.num_ended == sum(is_whole for *_, is_whole in calls)
    return said, calls


@pytest.mark.parametrize("must_call", [True, False])
@pytest.mark.parametrize("calls_several", [True, False])
def test_random_answers_have_valid_calls(grammars, code_tokenizer, must_call, calls_several):
    rng = Random(0)
    answers = ToolAnswers(TOOLS, must_call, calls_several)
    found, most, num_whole = set(), 0, 0
    for _ in range(25):
        begin = "" if must_call else rng.choice(["", "x < y \n", "<tool_cal", "<<"]) + BEGIN
        text, is_whole = walk(grammars, code_tokenizer, answers, rng, begin)
        said, calls = read(text)
        assert (said, calls) == read(text, rng)
        assert said == begin[: -len(BEGIN)].rstrip()
        for name, arguments, is_ended in calls:
            if is_ended:
                jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))
                found.add(name)
        if is_whole:
            num_whole += 1
            assert all(is_ended for *_, is_ended in calls)
            most = max(most, len(calls))
    assert num_whole > 10
    assert found == SCHEMAS.keys()
    assert most > 1 if calls_several else most == 1


def test_any_text_without_a_call_is_an_answer(grammars, code_tokenizer):
    rng = Random(1)
    for begin in ("", "def f(x):", "a <tool_call", "{\n}\n</tool_call>\n"):
        text, _ = walk(grammars, code_tokenizer, ToolAnswers(TOOLS, False, True), rng, begin, 40)
        assert read(text) == read(text, rng) == (text, [])


def test_an_answer_is_calls_or_follows_a_schema(grammars, code_tokenizer):
    rng, kinds = Random(2), set()
    schema = {"enum": ["<tool_call>", "\n<tool_call>\n{"]}
    answers = ToolAnswers(TOOLS[1:2], False, False, schema)
    for _ in range(20):
        text, is_whole = walk(grammars, code_tokenizer, answers, rng)
        said, calls = read(text, rng, follows_text=False)
        assert (said, calls) == read(text, follows_text=False)
        assert is_whole
        kinds.add(bool(calls))
        if calls:
            assert (said, calls) == ("", [["now", "{}", True]])
        else:
            assert json.loads(said) in schema["enum"]
    assert kinds == {True, False}


def test_white_space_of_answers_without_calls(grammars, code_tokenizer):
    """As without tools: none unless the schema allows it."""
    schema = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}
    for guidance, is_allowed in (
        (None, False),
        ({"whitespace_pattern": " ?"}, True),
        ({"whitespace_flexible": True}, True),
    ):
        text = schema if guidance is None else {**schema, "x-guidance": guidance}
        matcher = grammars.matcher(tool_constraint(ToolAnswers(TOOLS, False, True, text)))
        tokens = code_tokenizer.encode("[true, false]")
        assert (matcher.num_allowed(tokens) == len(tokens)) == is_allowed
        tokens = code_tokenizer.encode("[true,false]")
        assert matcher.num_allowed(tokens) == len(tokens)


def test_errors_of_tools_and_of_the_text_beside_them_are_told_apart(grammars):
    deep = {"type": "object"}
    for _ in range(90):
        deep = {"type": "object", "properties": {"a": deep}}
    definitions = {str(number): {"$ref": f"#/$defs/{number + 1}"} for number in range(1100)}
    definitions["1100"] = {"type": "object"}
    for wrong in (
        {"type": "object", "properties": {"a": {"not": {}}}},
        {"type": "object", "properties": {"a": {"type": "what"}}},
        deep,
        {"$ref": "#/$defs/0", "$defs": definitions},
    ):
        for tools, text, field in (
            (TOOLS, wrong, "json_schema"),
            ([CallableTool("wrong", wrong, True)], {"type": "object"}, "tools"),
            ([CallableTool("wrong", wrong, True)], None, "tools"),
        ):
            with pytest.raises(UserError) as found:
                grammars.check(tool_constraint(ToolAnswers(tools, False, True, text)))
            assert found.value.field == field
            assert ('the tool "wrong"' in str(found.value)) == (field == "tools")


def test_parameters_without_a_type_are_objects(grammars, code_tokenizer):
    tools = [CallableTool("f", {"properties": {"a": {"type": "null"}}}, True)]
    matcher = grammars.matcher(tool_constraint(ToolAnswers(tools, True, False)))
    for token in code_tokenizer.encode(BEGIN + '\n{"name": "f", "arguments": '):
        matcher.append(token)
    for text, is_allowed in (('{"a": null}', True), ("5", False), ("null", False)):
        tokens = code_tokenizer.encode(text)
        assert (matcher.num_allowed(tokens) == len(tokens)) == is_allowed


def test_answers_that_are_cut_off(grammars):
    call = '<tool_call>\n{"name": "now", "arguments": {"a": {}}}\n</tool_call>'
    rng = Random(3)
    for end in range(len(call)):
        said, calls = read(call[:end])
        assert (said, calls) == read(call[:end], rng)
        if end < len(BEGIN):
            assert (said, calls) == (call[:end], [])
        for name, arguments, is_ended in calls:
            assert (said, name, is_ended) == ("", "now", False)
            assert '{"a": {}}'.startswith(arguments)
    assert read("Yes. \n\n" + call + "\n" + call) == ("Yes.", [["now", '{"a": {}}', True]] * 2)


@pytest.mark.parametrize(
    ("parameters", "is_strict", "message"),
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, True, "not cannot be followed"),
        ({"type": "object", "properties": {"a": {"type": "what"}}}, False, "at #/properties/a, "),
        ({"type": "array", "items": {"$ref": "#/$defs/no"}}, False, "no"),
    ],
)
def test_parameters_that_cannot_be_followed(grammars, parameters, is_strict, message):
    tools = [TOOLS[0], CallableTool("wrong", parameters, is_strict)]
    with pytest.raises(UserError, match='the parameters of the tool "wrong": ') as found:
        grammars.check(tool_constraint(ToolAnswers(tools, True, True)))
    assert message in str(found.value)
    assert found.value.field == "tools"


DECIMAL = {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}


@pytest.mark.parametrize(
    ("schema", "arguments", "message"),
    [
        ({"properties": {"a": {"not": {"type": "null"}}}}, '{"a": 1}', "not cannot be"),
        ({"properties": {"a": {"pattern": "^(?!x)"}}}, '{"a": "x"}', "at #/properties/a, regex"),
        ({"properties": {"a": {"pattern": r"\bx"}}}, '{"a": "y"}', "at #/properties/a, lookar"),
        ({"properties": {"a": {"items": DECIMAL}}}, '{"a": ["y"]}', "at #/properties/a/items, r"),
        ({"patternProperties": {"^(?!x)": {"type": "null"}}}, '{"a": null}', "at #, regex parse"),
        ({"propertyNames": {"pattern": "x(?=y)"}}, '{"a": null}', "at #, regex parse"),
    ],
)
def test_keywords_that_cannot_be_followed_are_ignored_unless_strict(
    grammars, code_tokenizer, schema, arguments, message
):
    def check(is_strict):
        tools = [CallableTool("f", {"type": "object", **schema}, is_strict)]
        constraint = tool_constraint(ToolAnswers(tools, True, True))
        grammars.check(constraint)
        return grammars.matcher(constraint)

    call = f'{BEGIN}\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    tokens = code_tokenizer.encode(call)
    assert check(False).num_allowed(tokens) == len(tokens)
    with pytest.raises(UserError, match=f'the parameters of the tool "f": .*{message}'):
        check(True)


def test_what_can_be_followed_is_not_ignored(grammars, code_tokenizer):
    """The strings of a Decimal would otherwise be any texts."""
    of_names = {"^(?!x)": {"type": "null"}, "^b": {"type": "boolean"}}
    decimal = {"anyOf": [{"type": "number"}, DECIMAL]}
    for schema, wrong in (
        ({"properties": {"a": decimal}}, '{"a": "'),
        ({"properties": {"a": {"type": "string", "pattern": "^x"}}}, '{"a": "y'),
        ({"patternProperties": of_names, "additionalProperties": False}, '{"a": true'),
        ({"patternProperties": of_names, "additionalProperties": False}, '{"b": null'),
    ):
        tools = [CallableTool("f", {"type": "object", **schema}, False)]
        matcher = grammars.matcher(tool_constraint(ToolAnswers(tools, True, True)))
        begin = code_tokenizer.encode(f'{BEGIN}\n{{"name": "f", "arguments": {{"')
        tokens = code_tokenizer.encode(f'{BEGIN}\n{{"name": "f", "arguments": {wrong}')
        assert len(begin) <= matcher.num_allowed(tokens) < len(tokens)
