"""Errors that the user can mend."""

import json
from typing import Any, Final

UNSET: Final[Any] = object()


class UserError(ValueError):
    """Something that the user can mend: exit code 2, HTTP 400, or an error row.

    Args:
        field: Name of the setting, field or file, as the user writes it.
        value: The value that was refused. The message leaves it out if it is `UNSET`.
        allowed: What is allowed, to follow "it must be".
        fix: What to do, in the imperative.
        message: The whole message, where the other parts do not make a good sentence.
        code: OpenAI's error code, where it has one for this error.
    """

    def __init__(
        self,
        field: str = "",
        value: object = UNSET,
        allowed: str = "",
        fix: str = "",
        *,
        message: str = "",
        code: str | None = None,
    ) -> None:
        self.field, self.value, self.allowed, self.fix, self.code = field, value, allowed, fix, code
        name = field if value is UNSET else f"{field}={show(value)}"
        parts = [f"it must be {allowed}" if allowed else "", fix]
        super().__init__(
            message or f"{name} is not allowed: {'; '.join(part for part in parts if part)}"
        )


def show(value: object, most_characters: int = 60) -> str:
    """Return `value` as JSON, cut off after `most_characters`; a value that JSON has no form for is
    written as by `repr`."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= most_characters else text[:most_characters] + "..."
