"""A command line whose errors are one clear line and name the nearest valid setting."""

import re
import sys
from typing import Any, NoReturn

import jsonargparse

from stu.config import nearest

UNKNOWN = [
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.-]+)'"),
    re.compile(r"Option '(?P<key>[\w.-]+)' is not"),
]


class ArgumentParser(jsonargparse.ArgumentParser):
    """jsonargparse's, without its usage text in errors and without abbreviated names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation would take a mistyped name for another setting, silently.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for pattern in UNKNOWN:
            if match := pattern.search(message):
                groups = match.groupdict()
                key = ".".join(filter(None, [groups.get("group"), groups["key"]]))
                message += nearest(key, self._setting_names())
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def _setting_names(self) -> list[str]:
        return [
            name.removeprefix("--")
            for action in self._actions
            for name in action.option_strings
            if name.startswith("--")
        ]
