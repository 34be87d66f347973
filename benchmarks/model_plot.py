"""The picture of `benchmarks model`: predictions over measurements, and what they say elsewhere."""

import functools
from pathlib import Path
from typing import Any

from benchmarks.decode_plot import STYLES, plain_number

MARKERS = ["o", "s", "^", "D", "v"]
LINES = ["-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2))]
SHOWN = {"paged": "-", "epoched": "--", "naive": ":"}
"""Caches of the first panel, and their lines."""
GREY = "0.45"
PAYS = 1.1
"""As many times as fast as direct sums: a line beneath which little is gained."""


def plot(result: dict[str, Any], file: Path) -> None:
    """One panel of this machine, and one for each size on the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    elsewhere = result["extrapolated"]
    sizes = elsewhere["sizes"]
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8.6), layout="constrained")
    for axes in grid.flat:  # scales set ticks, so they come first
        axes.set_xscale("log")
        axes.set_yscale("log")
    first, *others = grid.flat
    against(first, result["curves"])
    for axes, (name, layouts) in zip(others, sizes.items(), strict=False):
        gains(axes, layouts["hybrid"]["cells"])
        parameters = layouts["hybrid"]["parameters"] / 1e9
        axes.set_title(f"{name} ({parameters:.1f} B) on {elsewhere['gpu']}: model", fontsize=10)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
        axes.xaxis.set_minor_locator(pyplot.NullLocator())
        label = functools.partial(plain_number, "125")
        axes.yaxis.set_major_formatter(label)
        axes.yaxis.set_minor_formatter(label)
    figure.savefig(file, dpi=140)


def against(axes: Any, curves: list[dict[str, Any]]) -> None:
    """Times of our caches at a small and a large batch: marks measured, lines predicted."""
    known = [its for its in curves if its["cache"] in SHOWN]
    least = min(its["threads"] for its in known)
    alike = {name: known[0][name] for name in ("result", "layout", "mlp_ratio")} | {
        "threads": least
    }
    known = [its for its in known if all(its[name] == alike[name] for name in alike)]
    batches = sorted({its["batch"] for its in known})
    shown = {batches[0], min(batches, key=lambda batch: abs(batch - 32))}
    for curve in known:
        if curve["batch"] not in shown:
            continue
        label, marker, _ = STYLES[curve["cache"]]
        line = SHOWN[curve["cache"]]
        colour = "black" if curve["batch"] == batches[0] else GREY
        marks = {
            "marker": marker,
            "color": colour,
            "markerfacecolor": colour if curve["cache"] == "paged" else "white",
        }
        points = curve["points"]
        lengths = [its["new_tokens"] for its in points]
        axes.plot(lengths, [its["predicted_ms"] for its in points], line, color=colour)
        axes.plot(lengths, [its["measured_ms"] for its in points], linestyle="", **marks)
        axes.plot([], [], line, label=f"{label}, batch {curve['batch']}", **marks)
    lengths = sorted({its["new_tokens"] for curve in known for its in curve["points"]})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("new tokens of each sequence")
    axes.set_ylabel("time of a step (ms)")
    axes.set_title("this machine: measured (marks) and predicted (lines)", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=2)


def gains(axes: Any, cells: list[dict[str, Any]]) -> None:
    """How many times as fast as direct sums, by length, a line for each batch."""
    lengths = sorted({its["new_tokens"] for its in cells})
    for batch, marker, line in zip(
        sorted({its["batch"] for its in cells}), MARKERS, LINES, strict=False
    ):
        its = [cell for cell in cells if cell["batch"] == batch]
        axes.plot(
            [cell["new_tokens"] for cell in its],
            [cell["times_as_fast"] for cell in its],
            linestyle=line,
            marker=marker,
            markerfacecolor="white",
            color="black",
            label=f"batch {batch}",
        )
        for cell in its:
            axes.plot(
                cell["new_tokens"],
                cell["times_as_fast"],
                marker,
                color="black",
                markerfacecolor="black" if cell["paged"]["fits"] else "white",
            )
    axes.axhline(PAYS, color=GREY, linewidth=0.8)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("new tokens of each sequence (hollow: caches do not fit)")
    axes.set_ylabel("direct sums' time over FutureFill's")
    axes.legend(fontsize=8, frameon=False)
