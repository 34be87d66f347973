"""Rows that could not be read and were left out: how many, of which kinds, and a list of them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from train.data.documents import BadInput

SKIPPED_FILE = "skipped.jsonl"
MOST_LISTED = 1000


class Skipped:
    """Counts what was left out, and remembers the first ones."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self.listed: list[BadInput] = []

    def add(self, bad: BadInput) -> None:
        """Count one."""
        self.counts[bad.kind] += 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append(bad)

    def save(self, folder: Path) -> None:
        """Write the list, if there is one, as JSON lines of file, place and reason."""
        rows = [
            {"file": str(bad.path), "place": bad.place, "kind": bad.kind, "reason": bad.reason}
            for bad in self.listed
        ]
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / SKIPPED_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def join_skipped(lists: Sequence[Path], target: Path) -> None:
    """Write one list of several, as long as it may be."""
    if not lists:
        return
    lines = (line for path in lists for line in path.read_bytes().splitlines(keepends=True))
    target.write_bytes(b"".join(islice(lines, MOST_LISTED)))


def require_mostly_good(num_read: int, counts: Mapping[str, int], where: object) -> None:
    """Raise ValueError if more rows were bad than not. where: what shows some of them."""
    num_bad = sum(counts.values())
    if num_bad > num_read:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
        raise ValueError(
            f"{num_bad:,} rows of {num_bad + num_read:,} cannot be read ({kinds}), which is most "
            f"of them, in spite of --on-error skip: {where}"
        )
