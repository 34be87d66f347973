"""Random texts that the grammar of a JSON schema allows, against an independent validator."""

import enum
import json
import math
import random
import re
import uuid
from datetime import date, datetime, time, timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Literal, Optional

import jsonschema_rs
import pytest
from pydantic import BaseModel, Field, PositiveInt, create_model

from serve.openai.response_format import WhiteSpace, constraint_of
from serve.sampling.grammar import Grammars
from serve.sampling_params import Constraint
from stu.common.errors import UserError

TOKENS = 200
STRING = re.compile(r'"([^"\\]|\\.)*"')


@pytest.fixture(scope="module")
def grammars(code_tokenizer):
    return Grammars(code_tokenizer)


def write(grammars, tokenizer, schema, count=30):
    """Return random texts that the schema allows and that end within TOKENS."""
    constraint = Constraint("json_schema", json.dumps(schema))
    grammars.check(constraint)
    texts = []
    for seed in range(count):
        choose, matcher, tokens = random.Random(seed), grammars.matcher(constraint), []
        while len(tokens) < TOKENS:
            allowed = matcher.allowed(tokenizer.vocab_size).nonzero()[:, 0].tolist()
            assert allowed, matcher.error
            assert not matcher.error
            token = choose.choice(allowed)
            if token == tokenizer.eos_id:
                texts.append(b"".join(map(tokenizer.token_bytes, tokens)).decode())
                break
            matcher.append(token)
            tokens.append(token)
    return texts


BOOL, NULL, SMALL = {"type": "boolean"}, {"type": "null"}, {"type": "integer", "maximum": 99}
PROPERTIES = {"kind": {"const": "a"}, "n": SMALL}
TAGGED = {"a": {"type": "object", "properties": PROPERTIES, "required": ["kind"]}}


def optional(count, values=None):
    values = values or {"type": "integer"}
    return {"type": "object", "properties": {f"field_{at}": values for at in range(count)}}


# Schemas whose texts all end.
SCHEMAS = {
    "unbounded integer": {"type": "integer"},
    "64 bits": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "bounds that no double holds": {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 3},
    "bounds of 64 bits": {"allOf": [{"type": "integer"}, {"minimum": -(2**63), "maximum": 2**63}]},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 1.5, "exclusiveMaximum": 4},
    "nullable integer": {"type": ["integer", "null"], "minimum": 0, "maximum": 2**60},
    "seven hundred optional": optional(700),
    "a thousand optional": optional(1000, BOOL),
    "type at the end": {"properties": {"a": BOOL}, "required": ["a"], "type": "object"},
    "name of a keyword": {
        "type": "object",
        "properties": {"uniqueItems": BOOL, "not": NULL, "$ref": NULL, 'größe 😀"\\/~': BOOL},
        "required": ["uniqueItems", "not", "$ref", 'größe 😀"\\/~'],
    },
    "unknown keywords": {"type": "boolean", "nullable": True, "x-order": 3, "example": [1, {}]},
    "unknown format": {"type": "string", "format": "path", "maxLength": 5},
    "known and unknown draft": {"$schema": "http://localhost/schema", "type": "boolean"},
    "format of no string": {"type": "boolean", "format": "date"},
    "format and pattern": {"type": "string", "format": "date", "pattern": "^2024"},
    "date or null": {"type": ["string", "null"], "format": "date"},
    "email": {"type": "string", "format": "email"},
    "void keywords": {"type": "array", "items": BOOL, "maxItems": 1, "uniqueItems": True}
    | {"unevaluatedItems": {}, "minContains": 2, "then": False},
    "names of zod's record": {"type": "object", "additionalProperties": SMALL}
    | {"propertyNames": {"type": "string", "enum": ["a", "b"]}, "required": ["a", "b"]},
    "closed without additionalProperties": {"type": "object", "properties": {"a": NULL}}
    | {"unevaluatedProperties": False},
    "allOf of one": {"allOf": [{"$ref": "#/$defs/a"}], "$defs": TAGGED},
    "ref with siblings": {"type": "object", "required": ["x"], "$defs": TAGGED}
    | {"properties": {"x": {"$ref": "#/$defs/a", "description": "an a"}}},
    "ref by anchor": {
        "$ref": "#here",
        "$defs": {"x": {"$anchor": "here", "type": "string", "format": "path", "maxLength": 3}},
    },
    "a branch without end": {
        "anyOf": [NULL, {"$ref": "#/$defs/e"}],
        "$defs": {
            "e": {"type": "object", "properties": {"e": {"$ref": "#/$defs/e"}}, "required": ["e"]}
        },
    },
    "tuple": {"type": "array", "prefixItems": [BOOL, SMALL], "items": False, "minItems": 2},
    "tuple of an older draft": {"$schema": "http://json-schema.org/draft-07/schema#"}
    | {"type": "array", "items": [BOOL, NULL], "additionalItems": False},
    "const and enum": {"enum": ["é", 2.0, None, {"a": [1.5, True]}, 2**53]},
    "own white space": {"x-guidance": {"whitespace_pattern": " "}, "type": "array", "maxItems": 1}
    | {"items": NULL},
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_text_ends_and_is_valid(grammars, code_tokenizer, schema):
    texts = write(grammars, code_tokenizer, schema)
    known = {**schema, "$schema": schema.get("$schema", "").replace("http://localhost/schema", "")}
    if not known["$schema"]:
        del known["$schema"]
    validator = jsonschema_rs.validator_for(known, validate_formats=True)
    for text in texts:
        validator.validate(json.loads(text))
    assert len(texts) >= 29, "at most one is longer than TOKENS"
    if "x-guidance" not in schema:
        assert not any(re.search(r"\s", STRING.sub("", text)) for text in texts)


# Schemas whose texts may be longer than TOKENS.
OPEN = {
    "anything": {},
    "any object": {"type": "object"},
    "properties of any name": {"type": "object", "additionalProperties": BOOL},
    "inheritance": {
        "allOf": [
            {"$ref": "#/$defs/a"},
            {"type": "object", "properties": {"more": BOOL}, "required": ["more"]},
        ],
        "$defs": TAGGED,
    },
    "required beyond the listed": {"$ref": "#/$defs/a", "required": ["z"], "$defs": TAGGED},
    "a recursion": {
        "type": "object",
        "properties": {"n": SMALL, "next": {"anyOf": [NULL, {"$ref": "#"}]}},
        "required": ["n", "next"],
    },
}


@pytest.mark.parametrize("schema", OPEN.values(), ids=OPEN)
def test_texts_that_end_are_valid(grammars, code_tokenizer, schema):
    texts = write(grammars, code_tokenizer, schema)
    validator = jsonschema_rs.validator_for(schema)
    assert texts
    for text in texts:
        if "e" not in text.lower():  # 1e999 is JSON, and no double
            validator.validate(json.loads(text))


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    owner: Optional["Dog"] = None


PYDANTIC = {
    "optional": int | None,
    "literal": Literal["a", 3, None],
    "enum": Color,
    "nested": Cat,
    "nested list": Annotated[list[Cat], Field(max_length=2)],
    "union": Cat | Dog | None,
    "tagged union": Annotated[Cat | Dog, Field(discriminator="kind")],
    "datetime": datetime,
    "date": date,
    "time": time,
    "timedelta": timedelta,
    "UUID": uuid.UUID,
    "positive": PositiveInt,
    "dict of patterns": dict[Annotated[str, Field(pattern="^[a-z]$")], int],
    "dict of UUIDs": dict[uuid.UUID, bool],
    "dict of names": dict[Literal["a", "b"], int],
    "list": Annotated[list[int], Field(min_length=1, max_length=3)],
    "tuple": tuple[int, bool, Color],
    "address": IPv4Address | IPv6Address,
    "short": Annotated[str, Field(max_length=8)],
    "pattern": Annotated[str, Field(pattern=r"^\d{3}-[A-Z]{1,4}$")],
    "multiple": Annotated[int, Field(multiple_of=5, ge=0)],
    "default": (int, 3),
}


@pytest.mark.parametrize("kind", PYDANTIC.values(), ids=PYDANTIC)
def test_pydantic_reads_texts_of_its_own_schemas(grammars, code_tokenizer, kind):
    model = create_model("Model", field=kind if isinstance(kind, tuple) else (kind, ...))
    texts = write(grammars, code_tokenizer, model.model_json_schema())
    assert len(texts) >= 25
    for text in texts:
        model.model_validate_json(text)


def within(schema):
    return {"type": "object", "properties": {"a/b": schema}, "required": ["a/b"]}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            within({"items": {"uniqueItems": True}}),
            "at #/properties/a~1b/items, uniqueItems",
        ),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"not": NULL}}}, "at #/$defs/a, not cannot"),
        ({"if": NULL, "then": False}, "at #, if cannot"),
        ({"contains": NULL}, "at #, contains cannot"),
        ({"dependentRequired": {"a": ["b"]}}, "at #, dependentRequired cannot"),
        ({"propertyNames": {"maxLength": 3}}, "at #, propertyNames cannot"),
        (
            {"allOf": [{"type": "object"}], "unevaluatedProperties": False},
            "at #, unevaluatedProperties",
        ),
        (within({"oneOf": [{"type": "number"}, SMALL]}), "at #/properties/a~1b, oneOf"),
        (
            {"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"items": {"pattern": "(?=a)"}}}},
            "at #/$defs/a/items, regex",
        ),
        ({"anyOf": [NULL, within({"type": "any"})]}, "at #/anyOf/1/properties/a~1b, Invalid type"),
        (within({"$ref": "#/$defs/no"}), "at #/properties/a~1b, Pointer '/$defs/no'"),
        (within({"$ref": "#"}), "at #/properties/a~1b, every value would hold"),
        (within({"maximum": 10**400}), "at #/properties/a~1b/maximum, the integer is beyond"),
        (within({"maximum": math.inf}), "at #/properties/a~1b/maximum, the number is not finite"),
        ({"enum": [1, 2**53 + 1]}, "at #/enum/1, no double holds the integer exactly"),
        ({"type": "integer", "minimum": 10**30}, "at #, no number of 64 bits is within minimum=1"),
        ({"const": -(2**63)}, "at #/const, no double holds"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "at #, no integer of 64 bits is within"),
        ({"maximum": -1e300}, "at #, no number of 64 bits is within maximum=-1e+300"),
        ({"type": "integer", "multipleOf": 86400000}, "at #, multipleOf=86400000 takes too long"),
        (within(optional(1001, BOOL)), "at #/properties/a~1b, properties has more than 1000"),
        ({"x-guidance": {"nope": 1}}, "unknown field `nope`"),
        ({"x-guidance": 3}, "at #/x-guidance, 3 is not an object"),
        (False, "schema is false"),
    ],
)
def test_unsupported_schemas_are_refused_with_the_place(grammars, schema, message):
    with pytest.raises(UserError, match="json_schema is not allowed") as caught:
        grammars.check(Constraint("json_schema", json.dumps(schema)))
    assert message in str(caught.value)


def test_lenient_schema_ignores_unsupported_keywords(grammars, code_tokenizer):
    schema = {"x-guidance": {"lenient": True}, "type": "array", "items": NULL, "uniqueItems": True}
    assert any(len(json.loads(text)) > 1 for text in write(grammars, code_tokenizer, schema))


@pytest.mark.parametrize("json_whitespace", ["compact", "flexible"])
def test_flexible_white_space_ends(grammars, code_tokenizer, json_whitespace):
    """Even if white space is chosen wherever it is allowed. A schema's own setting prevails."""
    schema = {"type": "array", "items": NULL, "minItems": 2, "maxItems": 2}
    blank = {
        token
        for token in range(code_tokenizer.vocab_size)
        if code_tokenizer.token_bytes(token).isspace()
    }

    def write_blanks(schema, most):
        constraint = constraint_of(
            {"type": "json_object", "schema": schema}, WhiteSpace.of_server(json_whitespace)
        )
        matcher, tokens = grammars.matcher(constraint), []
        while len(tokens) < most:
            allowed = matcher.allowed(code_tokenizer.vocab_size).nonzero()[:, 0].tolist()
            token = next(filter(blank.__contains__, allowed), allowed[0])
            if token == code_tokenizer.eos_id:
                break
            matcher.append(token)
            tokens.append(token)
        return b"".join(map(code_tokenizer.token_bytes, tokens)).decode()

    text = write_blanks(schema, 300)
    assert json.loads(text) == [None, None]
    assert any(map(str.isspace, text)) == (json_whitespace == "flexible")
    own = {"x-guidance": {"whitespace_flexible": json_whitespace == "compact"}, **schema}
    assert any(map(str.isspace, write_blanks(own, 300))) == (json_whitespace == "compact")
