"""The picture of `python -m benchmarks decode`: speed against length, and memory against speed."""

import functools
from pathlib import Path
from typing import Any

STYLES: dict[str, tuple[str, str, str]] = {
    "paged": ("FutureFill, paged (ours)", "o", "-"),
    "continuous": ("FutureFill, continuous", "s", "-"),
    "epoched": ("FutureFill, epoched", "D", "-"),
    "flashinference": ("tiles over prompt and generation", "^", "--"),
    "naive": ("direct sums", "v", "--"),
    "llama": ("Llama-like, preallocated", "P", ":"),
    "llama-dynamic": ("Llama-like, DynamicCache", "X", ":"),
    "mamba2": ("Mamba-2", "*", "-."),
    "rwkv": ("RWKV-4", "x", "-."),
    "s4": ("S4D", "h", "-."),
}
"""By cache or peer: its name, marker and line. Ours are black, others grey or hollow, so that they
can be told apart without colours."""
GREY = "0.45"
LARGE_BATCH = 32
MANY_LABELS = 300
"""Where an axis goes from one number to so many times it, powers of ten are labels enough."""


def plot(result: dict[str, Any], file: Path) -> None:
    """Three panels of the runs with the fewest threads, of the first layout and MLP."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = alike([run for run in result["runs"] if "tokens_per_second" in run])
    batches = sorted({run["batch"] for run in runs})
    large = min(batches, key=lambda batch: abs(batch - LARGE_BATCH))
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 5.2), layout="constrained")
    for axes, batch in zip(panels, (batches[0], large), strict=False):
        draw(axes, [run for run in runs if run["batch"] == batch], "new_tokens")
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.set_xlabel("new tokens of each sequence")
        lengths = sorted({run["new_tokens"] for run in runs})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_locator(pyplot.NullLocator())
    length = most_complete_length(runs)
    draw(panels[2], [run for run in runs if run["new_tokens"] == length], "cache_mib")
    panels[2].set_title(
        f"{length:,} new tokens; along a line, batch {', '.join(map(str, batches))}", fontsize=10
    )
    panels[2].set_xlabel("cache of the batch (MiB)")
    for axes in panels:
        axes.set_ylabel("tokens per second, all sequences")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    first = runs[0]
    figure.suptitle(
        f"Decoding after prompts of {first['prompt_tokens']:,} tokens: models of about "
        f"{first['parameters'] / 1e6:.1f} M parameters, D = {first['width']}, {first['dtype']}, "
        f"{first['threads']} thread(s)",
        fontsize=11,
    )
    figure.savefig(file, dpi=140)


def draw(axes: Any, runs: list[dict[str, Any]], by: str) -> None:
    """A line for each cache or peer, on logarithmic axes."""
    for name, (label, marker, line) in STYLES.items():
        its = [run for run in runs if run["cache"] == name]
        if not its:
            continue
        points = sorted((run[by], run["tokens_per_second"]) for run in its)
        x, y = zip(*points, strict=True)
        is_ours = name in ("paged", "continuous", "epoched")
        axes.plot(
            x,
            y,
            line,
            label=label,
            marker=marker,
            color="black" if is_ours else GREY,
            markerfacecolor="black" if name == "paged" else "white",
            markersize=8,
            linewidth=2.2 if name == "paged" else 1.1,
            zorder=3 if name == "paged" else 2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        label = functools.partial(plain_number, "1" if high / low > MANY_LABELS else "125")
        axis.set_major_formatter(label)
        axis.set_minor_formatter(label)


def plain_number(digits: str, value: float, _: int) -> str:
    """If it begins with one of these, or else no label."""
    return f"{value:,.5g}" if f"{value:e}"[0] in digits else ""


def alike(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of one layout, one MLP and the fewest threads."""
    first = runs[0]
    same = {name: first[name] for name in ("layout", "mlp_ratio")}
    same["threads"] = min(run["threads"] for run in runs)
    chosen = [run for run in runs if all(run[name] == same[name] for name in same)]
    return [run | {"cache_mib": run["cache_bytes"] / 2**20} for run in chosen]


def most_complete_length(runs: list[dict[str, Any]]) -> int:
    """The longest of the lengths of which most runs fit into memory."""
    counts: dict[int, int] = {}
    for run in runs:
        counts[run["new_tokens"]] = counts.get(run["new_tokens"], 0) + 1
    most = max(counts.values())
    return max(length for length, count in counts.items() if count == most)
