"""Results of benchmarks, as claims, tables and pictures read them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""A whole result, or the figures of one of its settings."""
Columns = dict[str, Callable[[Any], str]]
"""Title and cell of each column. Titles differ; what follows a `#` in one is not shown."""
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def recorded(folder: Path = RESULTS) -> dict[str, Run]:
    """Return all results of a folder by the name of their file."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")
    }


def processor(machine: Run) -> str:
    """Return the name of a machine's processor, and the vector instructions that torch uses."""
    name = machine["processor"].replace("(R)", "").removesuffix(" Processor")
    return f"{name}, {machine['cpu_capability']}"


def fewest_threads(runs: list[Run]) -> list[Run]:
    """Return the runs with the lowest number of threads."""
    threads = [run["threads"] for run in runs if "threads" in run]
    return [run for run in runs if run.get("threads", min(threads)) == min(threads)]


def decoded(result: Run, batch: int, length: int, layout: str | None = None) -> dict[str, Run]:
    """Return the runs of `decode` in one setting, by cache or peer.

    layout: Layout of our model; by default that of the first run.
    """
    wanted = layout or result["runs"][0]["layout"], batch, length
    return {
        run["cache"]: run
        for run in fewest_threads(result["runs"])
        if (run["layout"], run["batch"], run["new_tokens"]) == wanted
    }


def settings(result: Run) -> list[tuple[int, int]]:
    """Return the batches and lengths of a result of `decode`."""
    return sorted({(run["batch"], run["new_tokens"]) for run in result["runs"]})


def table(items: Iterable[Any], columns: Columns) -> str:
    """Return a Markdown table with a row for each item."""
    head = [title.split("#")[0] for title in columns]
    rows = [[cell(item) for cell in columns.values()] for item in items]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def shown(figure: float, digits: int = 3) -> str:
    """Return a figure with this many digits; a larger one as a whole number."""
    return f"{figure:,.0f}" if figure >= 10**digits - 0.5 else f"{figure:.{digits}g}"


def commits(result: Run) -> list[str]:
    """Return the commits at which the runs of a result were made, in order and abbreviated."""
    runs = result.get("runs", []) + result.get("recall", [])
    made = [earlier["commit"] for earlier in result.get("earlier_machines", [])]
    made += [run["commit"] for run in runs if "commit" in run] or [result["machine"]["commit"]]
    return list(dict.fromkeys(commit[:7] for commit in made))
