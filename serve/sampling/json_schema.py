"""JSON schemas, rewritten for llguidance.

llguidance refuses some schemas that could be followed, follows some with texts that never end or
that clients cannot read, and does not say which part of a schema it refuses.
"""

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import unquote

from serve.sampling.schema_branches import are_disjoint, endless_schemas
from serve.sampling.schema_rewrites import (
    IN_PLACE,
    MOST_INTEGER,
    UNSUPPORTED,
    Schema,
    clamp_bounds,
    drop_decimal_strings,
    drop_patterns,
    drop_void,
    refused,
    rewrite_format,
    rewrite_integer,
    rewrite_names,
)

MOST_OPTIONAL = 1000
"""Optional properties of one object: the time of a token's mask grows with their square."""
MOST_MULTIPLE = 10_000
"""Least common multiple of all multipleOf, without decimal points: compiling time grows with it."""
KNOWN_DRAFT = re.compile(
    r"https?://json-schema\.org/(draft-0[4-7]|draft/2019-09|draft/2020-12)/schema#?"
)

_ONE = ("items", "additionalItems", "additionalProperties")
_LISTS = ("items", "prefixItems", "anyOf", "oneOf", "allOf")
_MAPS = ("properties", "patternProperties")
_OBJECT = {"properties", "patternProperties", "additionalProperties", "required"}


class Node(NamedTuple):
    """A schema within the schema."""

    schema: Schema
    place: str
    """JSON pointer to the schema, as the fragment of a URI."""


def prepare(schema: Schema) -> Schema:
    """Rewrite `schema` in place and return it. Raises UserError naming keyword and place."""
    _check_numbers(schema)
    draft = schema.get("$schema")
    if isinstance(draft, str) and not KNOWN_DRAFT.fullmatch(draft):
        del schema["$schema"]
    guidance = schema.get("x-guidance", {})
    if not isinstance(guidance, dict):
        raise refused("#/x-guidance", f"{guidance!r} is not an object")
    is_lenient = guidance.get("lenient") is True
    for node in _nodes(schema):
        drop_void(node.schema)
        rewrite_names(node.schema)
        drop_decimal_strings(node.schema)
        if is_lenient:
            drop_patterns(node.schema)
    nodes = list(_nodes(schema))
    integers: Schema = {}
    multiple = 1
    for node in nodes:
        if not is_lenient:
            _refuse_unsupported(node)
        rewrite_format(node.schema)
        clamp_bounds(*node)
        rewrite_integer(*node, integers)
        multiple = math.lcm(multiple, _coefficient(node.schema.get("multipleOf")))
        if multiple > MOST_MULTIPLE:
            raise refused(
                node.place,
                f"multipleOf={node.schema['multipleOf']} takes too long to follow: the least "
                f"common multiple of all, without decimal points, must be {MOST_MULTIPLE} at most",
            )
    if integers:
        definitions = schema.get("$defs")
        schema["$defs"] = {**(definitions if isinstance(definitions, dict) else {}), **integers}
    for node in nodes:
        _rewrite_one_of(node.schema, schema)
    endless = endless_schemas([node.schema for node in nodes], lambda ref: target(ref, schema))
    if id(schema) in endless:
        place = max((node.place for node in nodes if id(node.schema) in endless), key=len)
        raise refused(place, "every value would hold another one of its kind, without end")
    for node in nodes:
        if id(node.schema) in endless:  # values take another branch
            node.schema.clear()
            node.schema["enum"] = []
    joined = _joined(schema, nodes)
    widths: dict[int, int] = {}
    for node in nodes:
        if id(node.schema) not in joined:
            _close(node.schema)
        if _width(node.schema, schema, widths) > MOST_OPTIONAL:
            raise refused(
                node.place,
                f"properties has more than {MOST_OPTIONAL} that may be left out: make them "
                "required, or divide the object",
            )
    return schema


def children(node: Node) -> Iterator[Node]:
    """Yield the schemas directly within a schema, without definitions."""
    schema, place = node
    for key in _ONE:
        if isinstance(schema.get(key), dict):
            yield Node(schema[key], f"{place}/{key}")
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            for index, inner in enumerate(schema[key]):
                if isinstance(inner, dict):
                    yield Node(inner, f"{place}/{key}/{index}")
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            for name, inner in schema[key].items():
                if isinstance(inner, dict):
                    yield Node(inner, f"{place}/{key}/{_escaped(name)}")


def target(ref: object, root: Schema) -> Schema | None:
    """Return the schema that a `$ref` names by a JSON pointer, or None."""
    if not isinstance(ref, str) or not re.match("#(/|$)", ref):
        return None
    found: Any = root
    for part in unquote(ref[1:]).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif (
            isinstance(found, list) and re.fullmatch("[0-9]{1,9}", part) and int(part) < len(found)
        ):
            found = found[int(part)]
        else:
            return None
    return found if isinstance(found, dict) else None


def _nodes(root: Schema) -> Iterator[Node]:
    """Yield all schemas that are used, each once."""
    seen: set[int] = set()
    left = [Node(root, "#")]
    while left:
        node = left.pop()
        if id(node.schema) in seen:
            continue
        seen.add(id(node.schema))
        yield node
        inner = list(children(node))
        if "$ref" in node.schema:
            ref = node.schema["$ref"]
            found = target(ref, root)
            if found is not None:
                inner.append(Node(found, ref))
            else:  # by an anchor or address: any definition
                for key in ("$defs", "definitions"):
                    definitions = root.get(key)
                    names = definitions if isinstance(definitions, dict) else {}
                    inner += [
                        Node(inner_schema, f"#/{key}/{_escaped(name)}")
                        for name, inner_schema in names.items()
                        if isinstance(inner_schema, dict)
                    ]
        left += reversed(inner)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _check_numbers(root: Schema) -> None:
    """Refuse numbers that llguidance would read as others."""
    left: list[tuple[Any, str, bool]] = [(root, "#", False)]
    while left:
        value, place, is_literal = left.pop()
        if isinstance(value, dict):
            left += [
                (inner, f"{place}/{_escaped(key)}", is_literal or key in ("const", "enum"))
                for key, inner in value.items()
            ]
        elif isinstance(value, list):
            left += [(inner, f"{place}/{index}", is_literal) for index, inner in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise refused(place, "the number is not finite, or beyond 1.8e308")
        elif isinstance(value, int) and abs(value) > 2**1023:
            raise refused(place, "the integer is beyond 9e307")
        elif (
            is_literal
            and isinstance(value, int)
            and (float(value) != value or abs(value) > MOST_INTEGER)
        ):
            raise refused(
                place, "no double holds the integer exactly: give it as a string, or nearer to 0"
            )


def _refuse_unsupported(node: Node) -> None:
    for key in node.schema:
        if key in UNSUPPORTED:
            raise refused(
                node.place,
                f"{key} cannot be followed: leave it out, and check the answer for it, or put "
                '"x-guidance": {"lenient": true} in the schema to have such keywords ignored',
            )


def _coefficient(multiple: Any) -> int:
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or multiple <= 0:
        return 1
    number = Decimal(repr(multiple)).normalize()
    return int(number.scaleb(max(0, -int(number.as_tuple().exponent))))


def _rewrite_one_of(schema: Schema, root: Schema) -> None:
    """Rewrite oneOf as anyOf if no value follows two of its options."""
    options = schema.get("oneOf")
    if not isinstance(options, list) or "anyOf" in schema:
        return
    if not are_disjoint(options, lambda ref: target(ref, root)):
        return
    items = list(schema.items())
    schema.clear()  # the order of keywords is that of properties
    schema.update({"anyOf" if key == "oneOf" else key: value for key, value in items})


def _joined(root: Schema, nodes: list[Node]) -> set[int]:
    """Return the `id`s of schemas that may hold for a value together with others."""
    joined: set[int] = set()
    for schema, _ in nodes:
        all_of = schema.get("allOf")
        num_parts = len(schema.keys() & {"$ref", "anyOf", "oneOf"}) + bool(schema.keys() & _OBJECT)
        num_parts += len(all_of) if isinstance(all_of, list) else 0
        if num_parts < 2:
            continue
        left = [schema]
        while left:
            part = left.pop()
            if id(part) not in joined:
                joined.add(id(part))
                left += [inner.schema for inner in children(Node(part, ""))]
                found = target(part.get("$ref"), root)
                left += [found] if found is not None else []
    return joined


def _close(schema: Schema) -> None:
    """Allow only the listed properties, if the schema does not say."""
    listed = schema.get("properties", {}), schema.get("patternProperties", {})
    required = schema.get("required", [])
    if not all(isinstance(properties, dict) for properties in listed) or not any(listed):
        return
    if schema.keys() & {"additionalProperties", "minProperties"}:
        return
    if isinstance(required, list) and all(
        isinstance(name, str) and name in listed[0] for name in required
    ):
        schema["additionalProperties"] = False


def _width(schema: Schema, root: Schema, known: dict[int, int]) -> int:
    """Return how many optional properties may come next where a value of `schema` begins."""
    if id(schema) in known:
        return known[id(schema)]
    known[id(schema)] = 0  # for a schema within itself
    properties, required = schema.get("properties"), schema.get("required")
    width = 0
    if isinstance(properties, dict):
        needed = set(map(str, required)) if isinstance(required, list) else set()
        width = len(properties.keys() - needed)
    lists = [schema[key] for key in IN_PLACE if isinstance(schema.get(key), list)]
    inner = [option for options in lists for option in options]
    for option in [*inner, target(schema.get("$ref"), root)]:
        if isinstance(option, dict):
            width += _width(option, root, known)
    known[id(schema)] = width
    return width
