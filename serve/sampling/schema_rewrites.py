"""Rewritings of single JSON schemas for llguidance.

Each allows a subset of the texts that the schema allows, so every text that ends is valid.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import llguidance

from stu.common.errors import UserError

Schema = dict[str, Any]

IN_PLACE = ("anyOf", "oneOf", "allOf")
"""Keywords whose schemas apply to the same value."""
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
MOST_INTEGER = 2**63 - 1024
"""The largest 64-bit integer that a double holds: llguidance keeps bounds as doubles."""

_YEAR = r"([1-9]\d{3}|0[1-9]\d{2}|00[1-9]\d|000[1-9])"
_LEAP_YEAR = r"(\d{2}(0[48]|[2468][048]|[13579][26])|([2468][048]|0[48]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    rf"|02-(0[1-9]|1\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_WORD, _LABEL = "[A-Za-z0-9_%+-]{1,20}", "[A-Za-z0-9]{1,20}(-[A-Za-z0-9]{1,20}){0,2}"
STRICTER_FORMATS = {
    "date-time": f"^{_DATE}T{_TIME}$",
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "email": rf"^{_WORD}(\.{_WORD}){{0,2}}@({_LABEL}\.){{1,3}}[A-Za-z]{{2,20}}$",
}
"""Patterns for formats that llguidance takes too widely for most libraries to read: with leap
seconds, 29 February in any year, and parts of an address of any length."""
PATTERNS = {
    **STRICTER_FORMATS,
    "uuid": "^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$",
}
"""Formats that names of properties may have."""
FORMATS = {"duration", "hostname", "ipv4", "ipv6", "uuid", "uri"}
"""Formats of llguidance that are used unchanged. All others are annotations."""
DURATION = "^P([0-9]{1,4}[A-Z]T?|T)+$"
DECIMAL = "^(?!^[-+.]*$)"
"""Beginning of pydantic's pattern for the strings of a Decimal, which may be numbers as well."""


def refused(place: str, reason: str) -> UserError:
    """Return the error for a keyword at `place`."""
    return UserError("json_schema", message=f"json_schema is not allowed: at {place}, {reason}")


UNSUPPORTED: dict[str, Callable[[Schema, Any], bool]] = {
    "uniqueItems": lambda schema, value: value is False or schema.get("maxItems") in (0, 1),
    "propertyNames": lambda _, value: (
        value is True
        or (isinstance(value, dict) and all(pair == ("type", "string") for pair in value.items()))
    ),
    "unevaluatedProperties": lambda _, value: value is True or value == {},
    "unevaluatedItems": lambda _, value: value is True or value == {},
    "contains": lambda schema, _: schema.get("minContains") == 0 and "maxContains" not in schema,
    "minContains": lambda schema, _: "contains" not in schema,
    "maxContains": lambda schema, _: "contains" not in schema,
    "dependentRequired": lambda _, value: value == {},
    "dependentSchemas": lambda _, value: value == {},
    "dependencies": lambda _, value: value == {},
    "if": lambda schema, _: "then" not in schema and "else" not in schema,
    "then": lambda schema, _: "if" not in schema,
    "else": lambda schema, _: "if" not in schema,
    "not": lambda _, value: value is False,
    "$dynamicRef": lambda _, __: False,
    "$recursiveRef": lambda _, __: False,
}
"""Keywords that llguidance does not follow, with a check for whether they restrict nothing."""


def drop_void(schema: Schema) -> None:
    """Drop unsupported keywords that restrict nothing."""
    for key, is_void in UNSUPPORTED.items():
        if key in schema and is_void(schema, schema[key]):
            del schema[key]
    if schema.get("unevaluatedProperties") is False and not schema.keys() & {"$ref", *IN_PLACE}:
        del schema["unevaluatedProperties"]
        schema.setdefault("additionalProperties", False)


def rewrite_names(schema: Schema) -> None:
    """Rewrite propertyNames with a list or a pattern as the properties that it allows."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict) or "patternProperties" in schema:
        return
    values = schema.get("additionalProperties", True)
    properties = schema.get("properties", {})
    kinds = names.keys() - {"type", "title", "description"}
    listed = names.get("enum")
    if kinds == {"enum"} and isinstance(listed, list) and isinstance(properties, dict):
        texts = [name for name in listed if isinstance(name, str)]
        if len(json.dumps(values)) * len(texts) > 2**16 or not properties.keys() <= set(texts):
            return
        # Copies, because each is rewritten by itself.
        made = {name: json.loads(json.dumps(values)) for name in texts}
        schema |= {"properties": {**made, **properties}, "additionalProperties": False}
    elif kinds == {"pattern"} and not properties and isinstance(names["pattern"], str):
        schema |= {"patternProperties": {names["pattern"]: values}, "additionalProperties": False}
    elif kinds == {"format"} and not properties and names["format"] in [*PATTERNS]:
        pattern = PATTERNS[names["format"]]
        schema |= {"patternProperties": {pattern: values}, "additionalProperties": False}
    else:
        return
    del schema["propertyNames"]


def rewrite_format(schema: Schema) -> None:
    """Drop a format that is an annotation, and restrict one that allows too much."""
    name = schema.get("format")
    if not isinstance(name, str):
        return
    types = schema.get("type", "string")
    if types != "string" and not (isinstance(types, list) and "string" in types):
        del schema["format"]
        return
    pattern = DURATION if name == "duration" else STRICTER_FORMATS.get(name)
    if name not in FORMATS:
        del schema["format"]
    if pattern is None:
        return
    if "pattern" not in schema:
        schema["pattern"] = pattern
    else:
        parts = schema.get("allOf", [])
        schema["allOf"] = [*parts, {"pattern": pattern}] if isinstance(parts, list) else parts


def clamp_bounds(schema: Schema, place: str) -> None:
    """Clamp bounds of numbers to those that llguidance accepts: others end the process."""
    for keys, sign in ((_LOWER, 1), (_UPPER, -1)):
        for key in keys:
            bound = schema.get(key)
            if isinstance(bound, bool) or not isinstance(bound, int | float):
                continue
            if bound * sign > MOST_INTEGER:
                raise refused(place, f"no number of 64 bits is within {key}={bound}")
            schema[key] = max(bound * sign, -MOST_INTEGER) * sign


def rewrite_integer(schema: Schema, place: str, definitions: Schema) -> None:
    """Limit integers to 64 bits, as readers do, with bounds that llguidance stores exactly.

    Equal schemas share one of `definitions`, because each range takes time to compile.
    """
    types = schema.get("type")
    listed = types if isinstance(types, list) else [types]
    if "integer" not in listed or "number" in listed or schema.keys() & {"const", "enum"}:
        return
    bounds = (*_LOWER, *_UPPER)
    least, above, most, below = limits = [schema.get(key) for key in bounds]
    if not all(bound is None or isinstance(bound, int | float) for bound in limits):
        return
    low, high = -MOST_INTEGER, MOST_INTEGER
    if least is not None:  # exclusive bounds were booleans in draft 4
        low = max(low, math.ceil(least) if above is not True else math.floor(least) + 1)
    if above is not None and not isinstance(above, bool):
        low = max(low, math.floor(above) + 1)
    if most is not None:
        high = min(high, math.floor(most) if below is not True else math.ceil(most) - 1)
    if below is not None and not isinstance(below, bool):
        high = min(high, math.ceil(below) - 1)
    if types != "integer" and not schema.keys() & set(bounds):
        return
    if low > high:
        shown = {key: schema[key] for key in bounds if key in schema}
        raise refused(place, f"no integer of 64 bits is within {json.dumps(shown)}")
    for key in bounds:
        schema.pop(key, None)
    schema |= {"minimum": _double(low, math.inf), "maximum": _double(high, -math.inf)}
    annotations = {"title", "description", "default", "examples", "format"}
    if schema.keys() - annotations == {"type", "minimum", "maximum"}:
        name = f"integer:{schema['minimum']}:{schema['maximum']}"
        definitions[name] = {key: schema[key] for key in ("type", "minimum", "maximum")}
        schema.clear()
        schema["$ref"] = f"#/$defs/{name}"


def _double(value: int, direction: float) -> int:
    """Return `value` if a double holds it, else the next integer in `direction` that one holds."""
    found = float(value)
    while (int(found) < value) if direction > 0 else (int(found) > value):
        found = math.nextafter(found, direction)
    return int(found)


def drop_decimal_strings(schema: Schema) -> None:
    """Drop pydantic's string form of a Decimal, whose pattern looks ahead."""
    options = schema.get("anyOf")
    if not isinstance(options, list) or not all(isinstance(option, dict) for option in options):
        return
    if any(option.get("type") == "number" for option in options):
        schema["anyOf"] = [
            option for option in options if not str(option.get("pattern", "")).startswith(DECIMAL)
        ]


def drop_patterns(schema: Schema) -> None:
    """Drop patterns that llguidance cannot follow. Properties with such names have any names."""
    if not _can_follow(schema.get("pattern")):
        del schema["pattern"]
    properties = schema.get("patternProperties")
    if not isinstance(properties, dict):
        return
    dropped = [properties.pop(name) for name in [*properties] if not _can_follow(name)]
    if dropped and schema.get("additionalProperties", False) is False:
        schema["additionalProperties"] = {"anyOf": dropped}


def _can_follow(pattern: Any) -> bool:
    """Return whether llguidance knows all of a pattern; it refuses what is no string by name."""
    if not isinstance(pattern, str):
        return True
    matcher, schema = llguidance.LLMatcher, {"type": "string", "pattern": pattern}
    return not matcher.validate_grammar(matcher.grammar_from_json_schema(schema))
