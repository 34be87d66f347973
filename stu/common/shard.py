"""How a command line names one of several runs that share an input."""

import re


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` as (i, n). Raises ValueError unless 0 <= i < n."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(
            f"shard={text!r} is not allowed: it must be i/n with 0 <= i < n, 0/8 to 7/8 for 8"
        )
    return int(match[1]), int(match[2])
