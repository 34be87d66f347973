"""JSON that stays on one line, whatever its readers take for the end of a line."""

import json
from typing import Any

LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""`str.splitlines`, on which many readers of server-sent events and of JSONL files rely, splits at
these as well. JSON itself escapes those below U+0020."""


def json_line(value: Any) -> str:
    """Return `value` as JSON without any character that ends a line."""
    text = json.dumps(value, ensure_ascii=False)
    if not text.isascii():
        for character, escape in LINE_ENDS.items():
            text = text.replace(character, escape)
    return text
