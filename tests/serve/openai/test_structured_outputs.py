"""Structured output by the names of vLLM's fields."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.openai.chat import ChatCompletions
from serve.openai.completions import TextCompletions
from serve.openai.response_format import FLEXIBLE
from serve.prompts import RequestBuilder
from serve.sampling.grammar import Grammars
from serve.sampling_params import Constraint
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError
from tests.serve.requests import decode

SCHEMA = {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
LARK = 'start: "a" start "b" | "c"'
GBNF = 'root ::= "a" root "b" | "c"  # as llama.cpp writes grammars'
TEXT = {"prompt": "x", "max_tokens": 40, "seed": 1}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 40, "seed": 1}


@pytest.fixture(scope="module", params=["compact", "flexible"])
def whitespace(request):
    return request.param


@pytest.fixture(params=["text", "chat"])
def requests(request, code_tokenizer, whitespace):
    """Call with fields of a body: its requests."""
    common = {
        "builder": RequestBuilder(code_tokenizer, {"temperature": 1.0}),
        "json_whitespace": whitespace,
        "tokenizer": code_tokenizer,
        "model_name": "demo",
        "max_seq_len": 64,
    }
    template = ChatTemplate(Path("nothing"), code_tokenizer)
    endpoint, body = TextCompletions(**common), TEXT
    if request.param == "chat":
        endpoint, body = ChatCompletions(template, 9, **common), CHAT
    return lambda **fields: endpoint.requests(3, endpoint.read({**body, **fields}))


@pytest.fixture(scope="module")
def grammars(code_tokenizer):
    return Grammars(code_tokenizer)


def accepts(grammars, tokenizer, constraint, text):
    """Whether a constraint allows each token of `text` and then the end."""
    matcher = grammars.matcher(constraint)
    for token in [*tokenizer.encode(text), tokenizer.eos_id]:
        if not matcher.allowed(tokenizer.vocab_size)[token]:
            return False
        if token != tokenizer.eos_id:
            matcher.append(token)
    return True


def test_fields_of_the_same_meaning(requests):
    expected = requests(response_format=FORMAT)
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        assert requests(guided_json=schema) == expected
        assert requests(structured_outputs={"json": schema}) == expected
    more = {"disable_fallback": True, "disable_additional_properties": False, "regex": None}
    assert requests(structured_outputs={"json": SCHEMA, **more}) == expected
    assert requests(guided_json=SCHEMA, response_format={"type": "text"}) == expected
    anything = requests(response_format={"type": "json_object"})
    assert requests(structured_outputs={"json_object": True}) == anything
    assert requests(structured_outputs={"json_object": False}) == requests()
    assert requests(structured_outputs={}) == requests(guided_decoding_backend="xgrammar")
    regex = requests(response_format={"type": "regex", "regex": "a+"})
    assert requests(guided_regex="a+") == requests(structured_outputs={"regex": "a+"}) == regex
    assert requests(guided_choice=["a"]) == requests(structured_outputs={"choice": ["a"]})
    assert requests(guided_grammar=LARK) == requests(structured_outputs={"grammar": LARK})


def test_white_space_of_json(requests, whitespace, grammars, code_tokenizer):
    def allowed(**fields):
        (request,) = requests(**fields)
        texts = "[true,false]", "[true,  false]", "[true,\n  false]"
        constraint = request.sampling.constraint
        return [accepts(grammars, code_tokenizer, constraint, text) for text in texts]

    plain = [True, whitespace == "flexible", whitespace == "flexible"]
    assert re.fullmatch(FLEXIBLE, "\n  ")
    assert allowed(guided_json=SCHEMA) == plain
    assert allowed(guided_json=SCHEMA, guided_whitespace_pattern=" *") == [True, True, False]
    assert allowed(response_format=FORMAT, guided_whitespace_pattern=" *") == [True, True, False]
    for name, value, expected in (
        ("whitespace_pattern", " *", [True, True, False]),
        ("disable_any_whitespace", True, [True, False, False]),
    ):
        assert allowed(response_format=FORMAT, structured_outputs={name: value}) == expected
    options = {"json": SCHEMA, "whitespace_pattern": " *"}
    assert allowed(structured_outputs=options) == [True, True, False]
    same = {"structured_outputs": options, "guided_whitespace_pattern": " *"}
    assert allowed(**same) == [True, True, False]
    own = {**SCHEMA, "x-guidance": {"whitespace_pattern": " *"}}
    assert allowed(guided_json=own) == [True, True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_json": 5}, "guided_json=5 is not allowed: it must be an object, or true or"),
        ({"guided_json": "{"}, r"guided_json=\"\{\" is not allowed: it must be a JSON schema: E"),
        ({"guided_json": "[" * 10**5}, "guided_json=.* it must be a JSON schema: "),
        ({"guided_regex": 5}, "guided_regex=5 is not allowed: it must be a string"),
        ({"guided_choice": []}, "guided_choice=.* a list of strings, at least one"),
        ({"guided_choice": ["a", 1]}, "guided_choice=.* a list of strings, at least one"),
        ({"guided_choice": "a"}, 'guided_choice="a" .* a list of strings'),
        ({"guided_choice": ["\ud800"]}, "guided_choice is not allowed: it has half of a surrogate"),
        ({"structured_outputs": {"grammar": 5}}, "structured_outputs.grammar=5 .* a string"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn .* use json, json_object, "),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag .* there is no such"),
        ({"structured_outputs": {"disable_fallback": 1}}, "disable_fallback=1 .* true or false"),
        ({"structured_outputs": "json"}, 'structured_outputs="json" .* an object'),
        (
            {"guided_json": SCHEMA, "guided_regex": "a"},
            "guided_regex is not allowed: guided_json is given too: leave one of them out",
        ),
        (
            {"response_format": FORMAT, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex is not allowed: response_format is given too",
        ),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern .* none is asked for",
        ),
        (
            {"structured_outputs": {"choice": ["a"], "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace .* none is asked for",
        ),
        (
            {"guided_grammar": LARK, "guided_whitespace_pattern": " "},
            "guided_whitespace_pattern .* none is asked for",
        ),
        (
            {
                "guided_json": SCHEMA,
                "guided_whitespace_pattern": " ",
                "structured_outputs": {"whitespace_pattern": "  "},
            },
            "guided_whitespace_pattern .*structured_outputs.whitespace_pattern is given too",
        ),
        (
            {
                "structured_outputs": {
                    "json": SCHEMA,
                    "whitespace_pattern": " ",
                    "disable_any_whitespace": True,
                }
            },
            "structured_outputs.whitespace_pattern .*disable_any_whitespace is given too",
        ),
        (
            {
                "guided_json": {**SCHEMA, "x-guidance": {"whitespace_flexible": True}},
                "guided_whitespace_pattern": " ",
            },
            "guided_whitespace_pattern .* the schema has whitespace_flexible in its x-guidance",
        ),
        (
            {
                "response_format": {
                    "type": "json_object",
                    "schema": {**SCHEMA, "x-guidance": {"whitespace_pattern": " *"}},
                },
                "structured_outputs": {"disable_any_whitespace": True},
            },
            "structured_outputs.disable_any_whitespace .* the schema has whitespace_pattern",
        ),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern .* none is asked for"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos=true .* with guided_choice, as"),
    ],
)
def test_wrong_fields_are_refused_by_name(requests, fields, message):
    with pytest.raises(UserError, match=message):
        requests(**fields)


@given(st.lists(st.text(max_size=6), min_size=1, max_size=4), st.text(max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_choice_allows_its_texts_alone(grammars, code_tokenizer, texts, other):
    constraint = Constraint("choice", json.dumps(texts))
    for text in texts:
        assert accepts(grammars, code_tokenizer, constraint, text), text
    for text in (other, texts[0] + other, texts[0][:-1]):
        assert accepts(grammars, code_tokenizer, constraint, text) == (text in texts), text


@pytest.mark.parametrize("source", [LARK, GBNF])
def test_a_grammar_allows_its_texts_alone(grammars, code_tokenizer, source):
    """Which no regular expression describes."""
    constraint = Constraint("grammar", source)
    for count in range(6):
        for others in range(6):
            text = "a" * count + "c" + "b" * others
            found = accepts(grammars, code_tokenizer, constraint, text)
            assert found == (count == others), text


@pytest.mark.parametrize(
    "source", ["root ::= other", "start: other", 'root ::= "a', "x", "(" * 50_000, "root ::= \\"]
)
def test_wrong_grammars_are_refused(grammars, source):
    with pytest.raises(UserError, match="grammar is not allowed: "):
        grammars.check(Constraint("grammar", source))


def test_completions_follow_choices_and_grammars(requests, code_model, code_tokenizer):
    for fields, expected in (
        ({"guided_choice": ["yes!", "no"]}, "yes!|no"),
        ({"structured_outputs": {"grammar": LARK}}, "(a*)c(b*)"),
    ):
        found = decode(code_model, code_tokenizer, requests(**fields, n=4))
        ended = [done.text for done in found if done.finish_reason == "stop"]
        assert ended
        for text in ended:
            match = re.fullmatch(expected, text)
            assert match
            assert len({len(group) for group in match.groups()}) <= 1
