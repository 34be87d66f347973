"""Checks of JSON schemas: do two exclude each other, and can a finite value follow one?"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

MOST_COMPARISONS = 20_000
DEEPEST = 8
"""Deepest nesting of refs and properties that is compared."""

Resolve = Callable[[object], dict[str, Any] | None]


def are_disjoint(schemas: Sequence[Any], resolve: Resolve) -> bool:
    """Return whether it is certain that no value follows two of `schemas`.

    resolve: Returns the schema that a `$ref` names, or None.
    """
    budget = iter(range(MOST_COMPARISONS))
    return all(_are_disjoint(*pair, resolve, budget, 0) for pair in combinations(schemas, 2))


def endless_schemas(schemas: Sequence[dict[str, Any]], resolve: Resolve) -> set[int]:
    """Return the `id`s of the schemas that no value can follow, because it would contain itself.

    schemas: All schemas in use.
    """
    left = {id(schema): schema for schema in schemas}
    while ending := [key for key, schema in left.items() if _ends(schema, left, resolve)]:
        for key in ending:
            del left[key]
    return set(left)


def _ends(schema: dict[str, Any], endless: Mapping[int, object], resolve: Resolve) -> bool:
    """Return whether a value can follow `schema` without following one of `endless`."""

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
    left: Any, right: Any, resolve: Resolve, budget: Iterator[int], depth: int
) -> bool:
    if left is False or right is False:
        return True
    if not isinstance(left, dict) or not isinstance(right, dict) or depth > DEEPEST:
        return False
    right_parts = list(_parts(right, resolve, depth))
    return any(
        next(budget, None) is not None and _parts_are_disjoint(part, other, resolve, budget, depth)
        for part in _parts(left, resolve, depth)
        for other in right_parts
    )


def _parts(schema: dict[str, Any], resolve: Resolve, depth: int) -> Iterator[dict[str, Any]]:
    """Yield the schemas that a value must follow to follow `schema`."""
    yield schema
    if depth > DEEPEST:
        return
    found = resolve(schema.get("$ref"))
    for inner in [found, *(schema["allOf"] if isinstance(schema.get("allOf"), list) else [])]:
        if isinstance(inner, dict):
            yield from _parts(inner, resolve, depth + 1)


def _parts_are_disjoint(
    left: dict[str, Any],
    right: dict[str, Any],
    resolve: Resolve,
    budget: Iterator[int],
    depth: int,
) -> bool:
    for part, other in ((left, right), (right, left)):
        for key in ("anyOf", "oneOf"):
            options = part.get(key)
            if isinstance(options, list) and all(
                _are_disjoint(option, other, resolve, budget, depth + 1) for option in options
            ):
                return True
    left_values, right_values = _values(left), _values(right)
    if left_values is not None and right_values is not None:
        return not left_values & right_values
    left_types, right_types = _types(left), _types(right)
    if left_types is None or right_types is None:
        return False
    if not any(_overlap(kind, other) for kind in left_types for other in right_types):
        return True
    if left_types != {"object"} or right_types != {"object"}:
        return False
    properties, other_properties = left.get("properties"), right.get("properties")
    if not isinstance(properties, dict) or not isinstance(other_properties, dict):
        return False
    required = {*_names(left), *_names(right)}
    return any(
        _are_disjoint(properties[name], other_properties[name], resolve, budget, depth + 1)
        for name in required & properties.keys() & other_properties.keys()
    )


def _names(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required")
    return (
        [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    )


def _values(schema: dict[str, Any]) -> set[str] | None:
    """Return the allowed values as JSON, if they are listed and neither lists nor objects."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list) or any(isinstance(value, list | dict) for value in listed):
        return None
    return {json.dumps(_whole(value)) for value in listed}


def _whole(value: Any) -> Any:
    """Return 1 for 1.0, which JSON schemas take for the same value."""
    return int(value) if isinstance(value, float) and value == int(value) else value


def _types(schema: dict[str, Any]) -> set[str] | None:
    types = schema.get("type")
    if isinstance(types, str):
        return {types}
    if isinstance(types, list):
        return set(map(str, types))
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return set(map(_type_of, listed)) if isinstance(listed, list) else None


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def _overlap(kind: str, other: str) -> bool:
    return kind == other or {kind, other} <= {"integer", "number"}
