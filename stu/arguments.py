"""Command lines: errors are one clear line, name the nearest valid setting, and have a code."""

import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jsonargparse

from stu.config import nearest

UNKNOWN = [
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.-]+)'"),
    re.compile(r"Option '(?P<key>[\w.-]+)' is not"),
]


def run_command(program: str, body: Callable[[], int]) -> int:
    """The exit code of a command: what `body` returns, or 2 after an error that a user can mend.

    SIGTERM, as a cancelled job gets it, ends `body` with an exception, as Ctrl-C does, so that what
    is half written is removed: codes 143 and 130.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return body()
    except (ValueError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


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
