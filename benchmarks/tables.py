"""Write the figures and pictures of the documents from the results of the benchmarks.

    python -m benchmarks.tables

`benchmarks/results/NAME.json` is what `python -m benchmarks` printed. In a document, its figures
are between `<!-- benchmark NAME -->` and `<!-- end -->`, with a PART after NAME if a result has
several tables. Figures after `<!-- comparisons -->` come from several results. A test
compares the documents with the results.
"""

import re
import sys

from benchmarks import (
    decoding_tables,
    online_tables,
    peers_tables,
    quality_tables,
    train_serve_tables,
)
from benchmarks.comparisons import comparisons
from benchmarks.recorded import ROOT, Run, commits, processor, recorded

DOCUMENTS = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("data", "engine", "evidence", "gpu-check", "quality", "slurm", "training")
    ),
]
PLACE = re.compile(
    r"(<!-- benchmark (?P<part>(?P<name>\w+)[ \w]*) -->\n).*?(<!-- end -->)", re.DOTALL
)
TABLES = (
    decoding_tables.TABLES
    | online_tables.TABLES
    | peers_tables.TABLES
    | quality_tables.TABLES
    | train_serve_tables.TABLES
)
COMPARISONS = re.compile(r"(<!-- comparisons -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    """Rewrite every document whose figures differ, and draw the pictures."""
    from benchmarks.plots import draw_pictures

    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    draw_pictures(ROOT / "docs")
    return 0


def with_tables(text: str) -> str:
    """Return a document with the figures of the results."""
    results = recorded()

    def figures(place: re.Match[str]) -> str:
        result = results[place["name"]]
        return f"{place[1]}\n{TABLES[place['part']](result)}\n\n{made_on(result)}\n{place[4]}"

    def compared(place: re.Match[str]) -> str:
        return f"{place[1]}\n{comparisons(results)}\n\n{place[2]}"

    return COMPARISONS.sub(compared, PLACE.sub(figures, text))


def made_on(result: Run) -> str:
    """Return where and when a result was made, with the commits of all its runs."""
    machine = result["machine"]
    day = machine["date"].split("T")[0]
    on_gpu = any(run.get("device") == "cuda" for run in result.get("runs", []))
    where = machine["gpu"] if on_gpu else processor(machine)
    return f"({where}, torch {machine['torch']}, {day}, commit {', '.join(commits(result))})"


if __name__ == "__main__":
    sys.exit(main())
