"""Turn the errors that pydantic finds in a body into words that name the field."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def body_error(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return a message and the name of the field at fault.

    errors: pydantic's, of which the first decides; its `loc` begins with the name of a field.
    """
    first, *others = errors
    place = [str(part) for part in first["loc"]]
    param = ".".join(place)
    if first["type"] == "extra_forbidden":
        return f"unknown field {json.dumps(param)}: leave it out", param
    if first["type"] == "missing":
        return f"field {json.dumps(param)} is missing", param
    if first["type"] == "value_error":
        return f"{param}: {first['ctx']['error']}", param
    # Of a field that may be one of several kinds there is an error for each of them.
    same = [error for error in others if error["loc"][:1] == first["loc"][:1]]
    param = place[0] if same else param
    reasons = dict.fromkeys(error["msg"] for error in [first, *same])
    return f"{param} is not allowed: {'; or '.join(reasons)}", param
