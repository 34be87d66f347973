"""Text that is left out: empty documents, and rows that cannot be read."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from stu.common.errors import UserError
from train.data.reading.document import BadInput

SKIPPED_FILE = "skipped.jsonl"
MOST_LISTED = 1000


class Skipped:
    """Counts of what was left out, and the first rows that could not be read."""

    def __init__(self) -> None:
        self.num_empty = 0
        """Documents without text."""
        self.num_bad = Counter[str]()
        """Rows, and rests of files, that could not be read, by kind."""
        self.listed: list[BadInput] = []

    def add(self, bad: BadInput) -> None:
        """Count a row, or the rest of a file, that could not be read."""
        self.num_bad[bad.kind] += 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append(bad)

    @property
    def examples(self) -> str:
        """The first rows that could not be read, for messages."""
        return "; ".join(map(str, self.listed[:3]))

    def save(self, folder: Path) -> None:
        """Write the list, unless it is empty, as JSON lines of file, place, kind and reason."""
        rows = [
            {"file": str(bad.path), "place": bad.place, "kind": bad.kind, "reason": bad.reason}
            for bad in self.listed
        ]
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / SKIPPED_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def join_lists(lists: Sequence[Path], target: Path) -> None:
    """Write the first rows of several lists as one list, if there are any lists."""
    if lists:
        lines = (line for path in lists for line in path.read_bytes().splitlines(keepends=True))
        target.write_bytes(b"".join(islice(lines, MOST_LISTED)))


def require_mostly_good(num_read: int, num_bad: Mapping[str, int], examples: object) -> None:
    """Raise UserError if more rows could not be read than could."""
    total = sum(num_bad.values())
    if total > num_read:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in num_bad.items())
        raise UserError(
            "SOURCE",
            message=f"{total:,} of {total + num_read:,} rows cannot be read ({kinds}), which is "
            f"too many to skip with --on-error skip: {examples}",
        )
