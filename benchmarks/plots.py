"""The pictures of the documents, drawn from results by `python -m benchmarks.tables`."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import online_tables, quality_tables
from benchmarks.decoding_tables import LABELS
from benchmarks.recorded import Run, fewest_threads, recorded
from benchmarks.train_serve_tables import VARIANTS

STYLES = {
    "ours": ("o", "-"),
    "continuous": ("s", "-"),
    "epoched": ("D", "-"),
    "flashinference": ("^", "--"),
    "naive": ("v", "--"),
    "llama": ("P", ":"),
    "llama_grouped": ("X", ":"),
    "mamba2": ("*", "-."),
    "rwkv": ("x", "-."),
    "s4": ("h", "-."),
}
"""Marker and line of each cache or peer. FutureFill is black and the others are grey, so that they
can be told apart without colours."""
ONLINE_STYLES = {
    "naive": ("v", (0, (1, 1.5))),
    "epoched": ("D", (0, (7, 2))),
    "continuous": ("s", (0, (7, 2, 1, 2))),
    "pages": ("^", (0, (2.5, 1.5))),
    "state": ("o", "-"),
}
"""Marker and dashes of each method for one convolution."""
LAYOUT_STYLES = {"stu": ("o", "-"), "hybrid": ("s", (0, (7, 2))), "hyena": ("^", (0, (2.5, 1.5)))}
"""Marker and dashes of each layout that is compared with attention."""
LENGTH_DASHES = [(0, (1, 1.5)), (0, (2.5, 1.5)), (0, (7, 2, 1, 2)), (0, (7, 2)), "-"]
GREY, LARGE_BATCH, DPI = "0.45", 32, 140
MANY_LABELS = 300
"""Ratio of an axis' ends from which powers of ten are labels enough."""


def draw_pictures(folder: Path) -> None:
    """Draw all pictures into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    results = recorded()
    draw_decode(results["decode"], folder / "decode.png")
    draw_online(results["online"], folder / "futurefill.png")
    draw_train(results["train"], folder / "training-step.png")
    draw_quality(results["quality"], folder / "quality.png")


def draw_decode(result: Run, file: Path) -> None:
    """Draw speed against length at a small and a large batch, and memory against speed."""
    from matplotlib import pyplot, ticker

    timed = [run for run in fewest_threads(result["runs"]) if "step_ms" in run]
    runs = [run | {"cache_mib": run["cache_bytes"] / 2**20} for run in timed]
    batches = sorted({run["batch"] for run in runs})
    lengths = sorted({run["new_tokens"] for run in runs})
    large = min(batches, key=lambda batch: abs(batch - LARGE_BATCH))
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 5.2), layout="constrained")
    for axes, batch in zip(panels, (batches[0], large), strict=False):
        draw_lines(axes, [run for run in runs if run["batch"] == batch], "new_tokens")
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.set_xlabel("new tokens per sequence")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    counts = Counter(run["new_tokens"] for run in runs)
    length = max(lengths, key=lambda length: (counts[length], length))
    draw_lines(panels[2], [run for run in runs if run["new_tokens"] == length], "cache_mib")
    along = f"points of a line: batch {', '.join(map(str, batches))}"
    panels[2].set_title(f"{length:,} new tokens; {along}", fontsize=10)
    panels[2].set_xlabel("cache of the whole batch (MiB)")
    for axes in panels:
        axes.set_ylabel("tokens per second, all sequences")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    first = runs[0]
    figure.suptitle(
        f"Decoding after prompts of {first['prompt_tokens']:,} tokens: models of about "
        f"{first['parameters'] / 1e6:.1f} M parameters, D = {first['width']}, float32, "
        f"threads: {first['threads']}",
        fontsize=11,
    )
    figure.savefig(file, dpi=DPI)
    pyplot.close(figure)


def draw_online(result: Run, file: Path) -> None:
    """Draw time, memory and multiply-adds against length, and time against the epoch."""
    from matplotlib import pyplot, ticker

    runs, lengths = result["runs"], sorted({run["new_tokens"] for run in result["runs"]})
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
    panels = list(grid.flat)
    shown: dict[str, Callable[[Run], float]] = {
        "time per token (µs)": lambda run: 1e3 * run["step_ms"],
        "cache (MiB)": lambda run: run["cache_bytes"] / 2**20,
        "multiply-adds per token (thousands)": lambda run: run["multiply_adds_per_token"] / 1e3,
    }
    for axes, (title, figure_of) in zip(panels, shown.items(), strict=False):
        for name, (marker, dashes) in ONLINE_STYLES.items():
            own = [run for run in online_tables.lines(result) if run["cache"] == name]
            axes.plot(
                [run["new_tokens"] for run in own],
                [figure_of(run) for run in own],
                label=online_tables.LABELS[name],
                marker=marker,
                linestyle=dashes,
                color="black",
                markerfacecolor="black" if name == "state" else "white",
                linewidth=2.2 if name == "state" else 1.2,
            )
        axes.set_ylabel(title)
    for length, dashes in zip(lengths[::-1], LENGTH_DASHES[::-1], strict=False):
        own = online_tables.epochs(result, length)
        times = [1e3 * run["step_ms"] for run in own]
        panels[3].plot([run["epoch"] for run in own], times, color="black", linestyle=dashes)
        panels[3].annotate(f" {length:,}", (own[-1]["epoch"], times[-1]), va="center", fontsize=8)
        paper = next(run for run in own if run["is_paper_epoch"])
        panels[3].plot(paper["epoch"], 1e3 * paper["step_ms"], "D", color="black", mfc="white")
    panels[3].set_ylabel("time per token (µs), epoched FutureFill")
    of_longest = online_tables.epochs(result, lengths[-1])
    epochs = [run["epoch"] for run in of_longest if not run["is_paper_epoch"]]
    epochs = [epoch for epoch in epochs if 3 * epoch <= epochs[-1] or epoch == epochs[-1]]
    ticks = [(lengths, "tokens")] * 3 + [(epochs, "epoch (tokens); one line per length")]
    for axes, (places, title) in zip(panels, ticks, strict=True):
        axes.set_xlabel(title)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(functools.partial(plain_number, "1"))
        axes.set_xticks(places, [f"{place:,}" for place in places], fontsize=8)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"Decoding a single convolution: D = {runs[0]['width']}, batch 1, float32, "
        f"threads: {runs[0]['threads']}. Diamonds: the paper's epoch",
        fontsize=11,
    )
    figure.savefig(file, dpi=DPI)
    pyplot.close(figure)


def draw_lines(axes: Any, runs: list[Run], by: str) -> None:
    """Draw a line for each cache or peer, on logarithmic axes."""
    for name, (marker, line) in STYLES.items():
        points = sorted((run[by], run["tokens_per_second"]) for run in runs if run["cache"] == name)
        is_ours = name == "ours"
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            line,
            label=LABELS[name],
            marker=marker,
            color="black" if name in ("ours", "continuous", "epoched") else GREY,
            markerfacecolor="black" if is_ours else "white",
            markersize=8,
            linewidth=2.2 if is_ours else 1.1,
            zorder=3 if is_ours else 2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        label = functools.partial(plain_number, "1" if high / low > MANY_LABELS else "125")
        axis.set_major_formatter(label)
        axis.set_minor_formatter(label)


def plain_number(digits: str, value: float, _: int) -> str:
    """Return the label of a number that begins with one of these digits, or none."""
    return f"{value:,.5g}" if f"{value:e}"[0] in digits else ""


def draw_train(result: Run, file: Path) -> None:
    """Draw how fast each way trains."""
    from matplotlib import pyplot

    runs = fewest_threads(result["runs"])
    figure, axes = pyplot.subplots(figsize=(9, 4.6), layout="constrained")
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        speeds = [run["ways"][name]["tokens_per_second"] for name in VARIANTS]
        places = [i + width * (number - (len(runs) - 1) / 2) for i in range(len(VARIANTS))]
        grey = str(0.85 - 0.5 * number / len(runs))
        label = f"{run['context']:,} tokens"
        bars = axes.bar(places, speeds, width, color=grey, edgecolor="black", label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(
        range(len(VARIANTS)),
        [label.replace(", ", ",\n") for label in VARIANTS.values()],
        fontsize=8,
    )
    axes.set_ylabel("tokens per second")
    first = runs[0]
    size = first["ways"]["stu"]["parameters"] / 1e6
    axes.set_title(
        f"One optimizer step of one sequence in float32: D={first['width']}, {first['layers']} "
        f"layers, {size:.0f} million weights, threads: {first['threads']}",
        fontsize=10,
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=DPI)
    pyplot.close(figure)


def draw_quality(result: Run, file: Path) -> None:
    """Draw the loss less that of attention against the position, for each text."""
    from matplotlib import pyplot, ticker

    settings = quality_tables.longest(result)
    figure, panels = pyplot.subplots(
        1, len(settings), figsize=(11, 4.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, setting in zip(panels.flat, settings, strict=True):
        peer = quality_tables.of_positions(result, setting, quality_tables.PEER)
        for layout, (marker, dashes) in LAYOUT_STYLES.items():
            own = quality_tables.of_positions(result, setting, layout)
            # The last group has one position alone.
            places = [place for place in own if place in peer and place < setting[1]]
            axes.plot(
                places,
                [own[place] - peer[place] for place in places],
                label=quality_tables.LABELS[layout],
                marker=marker,
                linestyle=dashes,
                color="black",
                markerfacecolor="black" if layout == "stu" else "white",
            )
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_title(setting[0], fontsize=10)
        axes.set_xscale("log")
        ticks = [place for place in peer if place < setting[1]]
        axes.set_xticks(ticks, [f"{place:,}" for place in ticks], fontsize=8)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("number of preceding tokens (from this to twice as many)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
    panels[0, 0].set_ylabel("loss in nats, difference from attention")
    panels[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=DPI)
    pyplot.close(figure)
