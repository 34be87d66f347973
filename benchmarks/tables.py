"""Writes the figures of the documents from what the benchmarks measured.

    python -m benchmarks.tables

`benchmarks/results/NAME.json` is what `benchmarks NAME` printed; in a document its figures stand
between `<!-- benchmark NAME -->` and `<!-- end -->`, or between `<!-- benchmark NAME PART -->` and
`<!-- end -->` where one result has several parts; those after `<!-- claims -->`
come from several. A test holds the documents to the results.
"""

import json
import re
import sys
from pathlib import Path

from benchmarks import decoding_tables, serving_tables, training_tables
from benchmarks.choice import Run
from benchmarks.claims import claims, recorded

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [
    "README.md",
    *(f"docs/{name}.md" for name in ("engine", "evidence", "slurm", "training")),
]
PLACE = re.compile(
    r"(<!-- benchmark (?P<part>(?P<name>\w+)[ \w]*) -->\n).*?(<!-- end -->)", re.DOTALL
)
CLAIMS = re.compile(r"(<!-- claims -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = training_tables.TABLES | decoding_tables.TABLES | serving_tables.TABLES


def main() -> int:
    """Rewrite every document whose figures differ."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def with_tables(text: str) -> str:
    """A document with its figures as the results have them."""

    def figures(place: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{place['name']}.json").read_text(encoding="utf-8"))
        its = TABLES[place["part"]](result)
        return f"{place[1]}\n{its}\n\n{made_on(result)}\n{place[4]}"

    def claimed(place: re.Match[str]) -> str:
        return f"{place[1]}\n{claims(recorded(RESULTS))}\n\n{place[2]}"

    return CLAIMS.sub(claimed, PLACE.sub(figures, text))


def made_on(result: Run) -> str:
    """Where and when a result was made."""
    machine = result["machine"]
    day, commit = machine["date"].split("T")[0], machine["commit"][:7]
    on_gpu = any(run.get("device") == "cuda" for run in result.get("runs", []))
    processor = machine["gpu" if on_gpu else "processor"]
    return f"({processor}, torch {machine['torch']}, {day}, commit {commit})"


if __name__ == "__main__":
    sys.exit(main())
