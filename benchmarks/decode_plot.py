"""The picture of `stu-bench decode`: where a step's time goes, and how it grows with the run."""

from pathlib import Path
from typing import Any

COLOURS = {"paged": "#0b6e4f", "epoched": "#e08e0b", "naive": "#b3261e"}


def plot(result: dict[str, Any], file: Path) -> None:
    """Two panels of the longest STU-only runs with the smallest MLP and fewest threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = longest(result["runs"])
    batches = sorted({run["batch"] for run in runs})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    caches = [name for name in COLOURS if any(run["cache"] == name for run in runs)]
    for run in runs:
        place = batches.index(run["batch"]) + 0.26 * (caches.index(run["cache"]) - 1)
        model = run["step_ms"] - run["convolution_ms"] - run["outside_ms"]
        colour, below = COLOURS[run["cache"]], 0.0
        for part, alpha in ((model, 0.3), (run["outside_ms"], 0.6), (run["convolution_ms"], 1)):
            left.bar(place, part, 0.24, bottom=below, color=colour, alpha=alpha)
            below += part
        left.text(place, below, f"{below:.0f}", ha="center", va="bottom", fontsize=8)
    left.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    left.set_ylabel("milliseconds per step, mean over the run")
    left.set_title("pale: the model's products; full: convolution", fontsize=10)
    for run in runs:
        if run["batch"] == max(batches):
            by_position = run["step_ms_by_position"]
            x = [int(position) for position in by_position]
            right.plot(
                x, list(by_position.values()), color=COLOURS[run["cache"]], label=run["cache"]
            )
    right.set_xlabel("new tokens so far")
    right.set_ylabel("milliseconds per step without a flush")
    right.set_title(f"batch {max(batches)}, along the run", fontsize=10)
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    shape = runs[0]
    figure.suptitle(
        f"Decoding {shape['new_tokens']:,} tokens, {shape['layout']} layout, D=512, 8 layers, "
        f"mlp_ratio {shape['mlp_ratio']}, {shape['threads']} thread(s)"
    )
    figure.savefig(file, dpi=140)


def longest(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one shape of model and one length, the one that shows the caches most."""
    layout = "stu" if any(run["layout"] == "stu" for run in runs) else "hybrid"
    most = {
        "layout": layout,
        "mlp_ratio": min(run["mlp_ratio"] for run in runs),
        "new_tokens": max(run["new_tokens"] for run in runs),
        "threads": min(run["threads"] for run in runs),
    }
    return [run for run in runs if all(run[name] == value for name, value in most.items())]
