"""The picture of `benchmarks train`: how fast each way trains, and where its step's time goes."""

from pathlib import Path
from typing import Any

LABELS = {
    "stu": "STU",
    "stu_two_branch": "STU,\ntwo branches",
    "hybrid": "hybrid",
    "hybrid_two_branch": "hybrid,\ntwo branches",
    "attention": "attention",
    "attention_sdpa": "attention\nby torch",
    "attention_windowed": "attention\nin a window",
}
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---", "|||"]


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Two panels of the runs with the fewest threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = min(run["threads"] for run in runs)
    runs = [run for run in runs if run["threads"] == threads]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 4.6), layout="constrained", width_ratios=[3, 2]
    )
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        speeds = [run["ways"][name]["tokens_per_second"] for name in LABELS]
        places = [i + width * (number - (len(runs) - 1) / 2) for i in range(len(LABELS))]
        grey = str(0.85 - 0.5 * number / len(runs))
        label = f"{run['context']:,} tokens"
        bars = left.bar(places, speeds, width, color=grey, edgecolor="black", label=label)
        left.bar_label(bars, fmt="%.0f", fontsize=8)
    left.set_xticks(range(len(LABELS)), list(LABELS.values()), fontsize=8)
    left.set_ylabel("tokens per second")
    left.set_title("one optimizer step of one sequence", fontsize=10)
    left.legend(frameon=False)
    (profiled,) = (run for run in runs if "profiles" in run)
    layouts = list(profiled["profiles"])
    below = [0.0] * len(layouts)
    for number, group in enumerate(profiled["profiles"]["stu"]["shares"]):
        shares = [100 * profiled["profiles"][layout]["shares"][group] for layout in layouts]
        right.bar(
            [LABELS[layout] for layout in layouts],
            shares,
            0.6,
            bottom=below,
            color=str(1 - 0.05 * number),
            edgecolor="black",
            hatch=HATCHES[number],
            label=group.replace("_", " "),
        )
        below = [a + b for a, b in zip(below, shares, strict=True)]
    right.set_ylabel("percent of a step's time")
    right.set_title(f"{profiled['context']:,} tokens", fontsize=10)
    handles, labels = right.get_legend_handles_labels()
    right.legend(
        handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    size = profiled["ways"]["stu"]["parameters"] / 1e6
    figure.suptitle(
        f"Training in float32: D={profiled['width']}, {profiled['layers']} layers, "
        f"{size:.0f} million weights, {threads} thread(s)"
    )
    figure.savefig(file, dpi=140)
