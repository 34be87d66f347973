"""Command lines: errors are one clear line, name the nearest valid setting, and have a code."""

import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NoReturn, get_type_hints

import docstring_parser
import jsonargparse

from stu.common.text import nearest

UNKNOWN = [
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.-]+)'"),
    re.compile(r"Option '(?P<key>[\w.-]+)' is not"),
]


def run_command(program: str, body: Callable[[], int]) -> int:
    """The exit code of a command: what `body` returns, 2 after an error that a user can mend, or 3
    after a fault of the program (Python's own 1 may mean something to the command).

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
    except Exception:
        traceback.print_exc()
        return 3


class ArgumentParser(jsonargparse.ArgumentParser):
    """jsonargparse's, without its usage text in errors and without abbreviated names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation would take a mistyped name for another setting, silently.
        super().__init__(*args, allow_abbrev=False, print_config="--print-config", **kwargs)

    def add_settings(self, dataclass: type) -> None:
        """An option for each field of a dataclass, and of those in it, that has none yet; what
        stands under the field is the help."""
        types = get_type_hints(dataclass)
        texts = {
            its.arg_name: " ".join((its.description or "").split())
            for its in docstring_parser.parse_from_object(dataclass).params
        }
        known = {action.dest for action in self._actions}
        for field in fields(dataclass):
            its_type, option = types[field.name], f"--{field.name.replace('_', '-')}"
            text = texts[field.name].replace("None:", "null:")  # as YAML and the command line say
            if field.name in known:
                continue
            if isinstance(its_type, type) and is_dataclass(its_type):
                self.add_settings(its_type)
            elif field.default is False:
                self.add_argument(option, action="store_true", help=text)
            elif field.default is MISSING:
                self.add_argument(option, type=its_type, required=True, help=text)
            else:
                self.add_argument(option, type=its_type, default=field.default, help=text)

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
