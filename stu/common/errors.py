"""Errors that the user can mend."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, Final


class _Unset(Enum):
    UNSET = "unset"


UNSET: Final = _Unset.UNSET
OUR_PACKAGES = ("stu", "train", "serve")
_naming: ContextVar[Callable[[str], str]] = ContextVar("naming", default=str)


class UserError(Exception):
    """Something that the user can mend: exit code 2, HTTP 400, or an error row.

    Args:
        field: Name of the setting, field or file, as the user writes it.
        value: The value that was refused. The message leaves it out if it is `UNSET`. Give it
            beside `message` if that quotes what the user wrote: logs then leave the message out.
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
        self._message = message
        super().__init__(message or self._composed(value))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), str(self), self.__dict__)

    def renamed(self, field: str) -> "UserError":
        """Return the same error about a field with another name."""
        return UserError(
            field, self.value, self.allowed, self.fix, message=self._message, code=self.code
        )

    def without_value(self) -> str:
        """Return the message without what the user wrote, for logs."""
        return self._composed(UNSET) if self.value is not UNSET else str(self)

    def _composed(self, value: object) -> str:
        name = self.field if value is UNSET else f"{self.field}={show(value)}"
        reasons = [f"it must be {self.allowed}" if self.allowed else "", self.fix]
        reason = "; ".join(filter(None, reasons))
        return f"{name} is not allowed" + (f": {reason}" if reason else "")


def _restore(kind: type[UserError], message: str, attributes: dict[str, Any]) -> UserError:
    """Return an error that another process raised: its constructor may take other arguments."""
    error = kind.__new__(kind, message)
    error.__dict__.update(attributes)
    return error


def show(value: object, most_characters: int = 60) -> str:
    """Return `value` as JSON, cut off after `most_characters`; a value that JSON has no form for is
    written as by `repr`. Large and deeply nested values take no longer than small ones."""
    text = ""
    for part in json.JSONEncoder(default=repr).iterencode(value):
        text += part
        if len(text) > most_characters:
            return text[:most_characters] + "..."
    return text


def setting_name(field: str) -> str:
    """Return the name of a setting for a message: its field's, or its option's in a command."""
    return _naming.get()(field)


@contextmanager
def settings_named(name: Callable[[str], str]) -> Iterator[None]:
    """Let `setting_name` return `name(field)` in the block."""
    token = _naming.set(name)
    try:
        yield
    finally:
        _naming.reset(token)


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Raise UserError that names the extra if the block imports a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", *OUR_PACKAGES):
            raise
        message = f"{package} is not installed: {how_to_install(extra)}"
        raise UserError(message=message) from error


def how_to_install(extra: str) -> str:
    """Return how to install an extra; the `stu` of a package index may be another project."""
    return f"run pip install '.[{extra}]' in the checkout of stu"
