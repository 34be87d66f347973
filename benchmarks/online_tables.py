"""The table of one long convolution, decoded by each method."""

from collections.abc import Callable
from typing import Any

from benchmarks.decoding_tables import mib
from benchmarks.recorded import Columns, Run, table

LABELS = {
    "naive": "direct sums",
    "epoched": "FutureFill, epoched",
    "continuous": "FutureFill, continuous",
    "pages": "FutureFill in pages (the engine's)",
    "state": "spectral state (the engine's)",
}
"""Methods, in the order of tables and legends."""
SHOWN = 2048
"""Length that the table shows besides the longest one, if it was decoded."""


def lines(result: Run) -> list[Run]:
    """Return the runs by method and length, those with epochs once: with the paper's epoch."""
    runs = [run for run in result["runs"] if run.get("is_paper_epoch", True)]
    return sorted(runs, key=lambda run: (list(LABELS).index(run["cache"]), run["new_tokens"]))


def epochs(result: Run, length: int) -> list[Run]:
    """Return the runs of a length with epochs, the shortest epoch first."""
    runs = [run for run in result["runs"] if "epoch" in run and run["new_tokens"] == length]
    return sorted(runs, key=lambda run: run["epoch"])


def online(result: Run) -> str:
    """Show time, memory and multiply-adds of a token by method, at two lengths; of the epochs,
    the paper's and the one that takes the least time."""
    lengths = sorted({run["new_tokens"] for run in result["runs"]})
    lengths = sorted({SHOWN, lengths[-1]} & {*lengths})
    rows: list[tuple[str, list[Run]]] = []
    for name, label in LABELS.items():
        own = {run["new_tokens"]: run for run in lines(result) if run["cache"] == name}
        suffix = ", paper's epoch" if name == "epoched" else ""
        rows.append((label + suffix, [own[length] for length in lengths]))
        if name == "epoched":
            several = [epochs(result, length) for length in lengths]
            best = [min(runs, key=lambda run: run["step_ms"]) for runs in several]
            tokens = ", ".join(f"{run['epoch']:,}" for run in best)
            rows.append((f"{label}, fastest epoch: {tokens}", best))

    def figures(figure: Callable[[Run], str]) -> Callable[[tuple[str, list[Run]]], str]:
        return lambda row: " / ".join(map(figure, row[1]))

    columns: Columns = {
        f"{' / '.join(f'{length:,}' for length in lengths)} tokens": lambda row: row[0],
        "time per token, µs": figures(lambda run: f"{1e3 * run['step_ms']:,.0f}"),
        "longest step, µs": figures(lambda run: f"{1e3 * run['largest_step_ms']:,.0f}"),
        "cache, MiB": figures(mib),
        "multiply-adds per token, thousands": figures(
            lambda run: f"{run['multiply_adds_per_token'] / 1e3:,.0f}"
        ),
    }
    return table(rows, columns)


TABLES: dict[str, Callable[[Any], str]] = {"online": online}
