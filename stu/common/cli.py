"""Command lines: options from dataclasses, errors on one line, and exit codes."""

import argparse
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NoReturn, get_type_hints

import docstring_parser
import jsonargparse

from stu.common.errors import UserError, requires_extra, settings_named
from stu.common.text import nearest

USER_ERROR, FAULT = 2, 3
"""Exit codes. Python's own code for any exception, 1, may mean something to the command."""
UNKNOWN = [
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.-]+)'"),
    re.compile(r"Option '(?P<key>[\w.-]+)' is not"),
]

_is_terminated = False
"""Whether SIGTERM has come during the command."""


def run_command(
    program: str, body: Callable[[], int], extra: str = "all", settings: type | None = None
) -> int:
    """Run the body of a command and return the exit code.

    It is what `body` returns, 2 after an error that the user can mend, printed on one line, 3 after
    a fault of the program, with a traceback, and 143 or 130 after SIGTERM or SIGINT, which raise an
    exception in `body` so that half-written files are removed. The code is 143 also where a library
    catches that of SIGTERM; a long body calls `exit_if_terminated` to end soon even then.

    extra: the optional dependencies, `pip install '.[EXTRA]'`, that the command needs.
    settings: the dataclass of the options, whose fields errors then name as options.
    """
    global _is_terminated
    _is_terminated = False
    signal.signal(signal.SIGTERM, _terminate)
    names = set(_field_names(settings)) if settings else set()

    def name(field: str) -> str:
        return option(field) if field in names else field

    try:
        with requires_extra(extra), settings_named(name):
            code = body()
        exit_if_terminated()
        return code
    except (UserError, OSError) as error:
        exit_if_terminated()
        if isinstance(error, UserError):
            error = error.renamed(name(error.field))
        print(f"{program}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        exit_if_terminated()
        traceback.print_exc()
        return FAULT


def is_live(console: Any) -> bool:
    """Return whether rich can redraw what it has shown on its `console`; where it cannot, it shows
    nothing before the end."""
    return bool(console.is_terminal and not console.is_dumb_terminal)


def exit_if_terminated() -> None:
    """Raise SystemExit if SIGTERM has come and a bare except, say of a module that was being
    imported, has caught the exception of its handler."""
    if _is_terminated:
        sys.exit(128 + signal.SIGTERM)


def _terminate(*_: object) -> None:
    global _is_terminated
    _is_terminated = True
    exit_if_terminated()


def option(field: str) -> str:
    """Return the option that sets a field, `--max-running` for `max_running`."""
    return f"--{field.replace('_', '-')}"


def _field_names(dataclass: type) -> Iterator[str]:
    """Yield the names of the fields of a dataclass and of dataclasses in it."""
    types = get_type_hints(dataclass)
    for field in fields(dataclass):
        yield field.name
        if is_dataclass(types[field.name]):
            yield from _field_names(types[field.name])


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Help in which types are plain words: `path`, and not `<class 'Path'>`."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        name = super()._get_type_str(action)
        return name and re.sub(r"<class '(\w+)'>", r"\1", name).replace("Path", "path")


class ArgumentParser(jsonargparse.ArgumentParser):
    """A jsonargparse parser with errors on one line and without abbreviated options.

    An abbreviation would silently take a mistyped name for another setting.

    Args:
        exits: Whether an error ends the process, as in a command. If not, it raises UserError.
    """

    def __init__(self, *args: Any, exits: bool = True, **kwargs: Any) -> None:
        self._exits = exits
        kwargs = {"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs}
        super().__init__(*args, print_config="--print-config", **kwargs)

    def add_settings(self, dataclass: type) -> None:
        """Add an option for each field of a dataclass, and of dataclasses in it, that has none.

        The docstring under a field becomes the help text. Options have hyphens where fields have
        underscores.
        """
        types = get_type_hints(dataclass)
        texts = {
            param.arg_name: " ".join((param.description or "").split())
            for param in docstring_parser.parse_from_object(dataclass).params
        }
        known = {action.dest for action in self._actions}
        for field in fields(dataclass):
            field_type, name = types[field.name], option(field.name)
            text = texts[field.name].replace("None:", "null:")  # as YAML and the command line say
            if field.name in known:
                continue
            if isinstance(field_type, type) and is_dataclass(field_type):
                self.add_settings(field_type)
            elif field.default is False:
                self.add_argument(name, action="store_true", help=text)
            elif field.default is MISSING:
                self.add_argument(name, type=field_type, required=True, help=text)
            else:
                self.add_argument(name, type=field_type, default=field.default, help=text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for pattern in UNKNOWN:
            if match := pattern.search(message):
                groups = match.groupdict()
                key = ".".join(filter(None, [groups.get("group"), groups["key"]]))
                message += nearest(key, self._setting_names())
        if not self._exits:
            raise UserError(message=message) from ex
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)

    def _setting_names(self) -> list[str]:
        return [
            name.removeprefix("--")
            for action in self._actions
            for name in action.option_strings
            if name.startswith("--")
        ]
