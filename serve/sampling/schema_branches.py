"""Whether a value can follow two JSON schemas at once, and whether it can end."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

MOST_COMPARISONS = 20_000
DEEPEST = 8
"""Refs and properties in one another."""

Resolve = Callable[[object], dict[str, Any] | None]


def are_disjoint(schemas: Sequence[Any], resolve: Resolve) -> bool:
    """Whether it is sure that no value follows two of `schemas`; `resolve` finds what a `$ref`
    names."""
    budget = iter(range(MOST_COMPARISONS))
    return all(_are_disjoint(*pair, resolve, budget, 0) for pair in combinations(schemas, 2))


def endless_schemas(schemas: Sequence[dict[str, Any]], resolve: Resolve) -> set[int]:
    """The `id`s of those that no value follows, for it would have to hold itself; `schemas` has all
    that are used."""
    left = {id(schema): schema for schema in schemas}
    while ending := [its for its, schema in left.items() if _ends(schema, left, resolve)]:
        for its in ending:
            del left[its]
    return set(left)


def _ends(schema: dict[str, Any], endless: Mapping[int, object], resolve: Resolve) -> bool:
    """Whether a value can follow `schema` that needs none of `endless`."""

    def ends(inner: Any) -> bool:
        return id(inner) not in endless

    if "$ref" in schema and not ends(resolve(schema["$ref"])):
        return False
    for key, enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        options = schema.get(key)
        if isinstance(options, list) and options and not enough(map(ends, options)):
            return False
    properties, types = schema.get("properties"), _types(schema)
    if types == {"object"} and isinstance(properties, dict):
        return all(ends(properties.get(name)) for name in _names(schema))
    if types == {"array"} and schema.get("minItems", 0) not in (0, None):
        first = schema.get("prefixItems")
        return ends(first[0] if isinstance(first, list) and first else schema.get("items"))
    return True


def _are_disjoint(
    one: Any, other: Any, resolve: Resolve, budget: Iterator[int], depth: int
) -> bool:
    if one is False or other is False:
        return True
    if not isinstance(one, dict) or not isinstance(other, dict) or depth > DEEPEST:
        return False
    others = list(_parts(other, resolve, depth))
    return any(
        next(budget, None) is not None and _parts_are_disjoint(part, its, resolve, budget, depth)
        for part in _parts(one, resolve, depth)
        for its in others
    )


def _parts(schema: dict[str, Any], resolve: Resolve, depth: int) -> Iterator[dict[str, Any]]:
    """Schemas that all hold for a value that follows `schema`."""
    yield schema
    if depth > DEEPEST:
        return
    found = resolve(schema.get("$ref"))
    for inner in [found, *(schema["allOf"] if isinstance(schema.get("allOf"), list) else [])]:
        if isinstance(inner, dict):
            yield from _parts(inner, resolve, depth + 1)


def _parts_are_disjoint(
    one: dict[str, Any],
    other: dict[str, Any],
    resolve: Resolve,
    budget: Iterator[int],
    depth: int,
) -> bool:
    for part, that in ((one, other), (other, one)):
        for key in ("anyOf", "oneOf"):
            options = part.get(key)
            if isinstance(options, list) and all(
                _are_disjoint(its, that, resolve, budget, depth + 1) for its in options
            ):
                return True
    values, other_values = _values(one), _values(other)
    if values is not None and other_values is not None:
        return not values & other_values
    types, other_types = _types(one), _types(other)
    if types is None or other_types is None:
        return False
    if not any(_overlap(its, that) for its in types for that in other_types):
        return True
    if types != {"object"} or other_types != {"object"}:
        return False
    properties, other_properties = one.get("properties"), other.get("properties")
    if not isinstance(properties, dict) or not isinstance(other_properties, dict):
        return False
    required = {*_names(one), *_names(other)}
    return any(
        _are_disjoint(properties[name], other_properties[name], resolve, budget, depth + 1)
        for name in required & properties.keys() & other_properties.keys()
    )


def _names(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required")
    return [its for its in required if isinstance(its, str)] if isinstance(required, list) else []


def _values(schema: dict[str, Any]) -> set[str] | None:
    """The values that are allowed, as JSON, if they are listed and neither lists nor objects."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list) or any(isinstance(its, list | dict) for its in listed):
        return None
    # 1.0 and 1 are one value.
    whole = [int(its) if isinstance(its, float) and its == int(its) else its for its in listed]
    return {json.dumps(its) for its in whole}


def _types(schema: dict[str, Any]) -> set[str] | None:
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {str(its) for its in given}
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return {_type_of(its) for its in listed} if isinstance(listed, list) else None


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def _overlap(one: str, other: str) -> bool:
    numbers = {"integer", "number"}
    return one == other or {one, other} <= numbers
