"""Text that programs and users read: JSON on one line, hints about mistyped names."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from stu.common.errors import UserError

Json = dict[str, Any]
LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Characters that JSON leaves as they are and `str.splitlines`, on which many readers of
server-sent events and of JSONL rely, takes for the end of a line."""
MOST_LISTED_NAMES = 20


def json_line(value: Any) -> str:
    """Return `value` as JSON without any character that ends a line. Halves of surrogate pairs, as
    in names of files that are not UTF-8, are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    if not text.isascii():
        text = text.encode(errors="backslashreplace").decode()
    return escaped_line_ends(text)


def escaped_line_ends(text: str) -> str:
    """Return JSON without line breaks as JSON without any character that ends a line."""
    if not text.isascii():
        for character, escape in LINE_ENDS.items():
            text = text.replace(character, escape)
    return text


def nearest(key: str, known: Sequence[str]) -> str:
    """Return a hint to append to an error about an unknown `key`: the closest known name."""
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f": did you mean {close[0]!r}?"
    if len(known) <= MOST_LISTED_NAMES:
        return f": choose from {', '.join(known)}"
    return ": --help lists all names"


def require_unicode(name: str, text: str) -> None:
    """Raise UserError if UTF-8 cannot encode `text`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            name,
            fix=f"it has half of a surrogate pair at character {error.start}: write the whole "
            "character",
        ) from error
