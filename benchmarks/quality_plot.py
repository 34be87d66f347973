"""The picture of `python -m benchmarks quality`."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot

STYLES = {
    "hybrid": ("Flash-STU, hybrid", "-", "o"),
    "stu": ("STU", "--", "s"),
    "hyena": ("Hyena", ":", "^"),
    "attention": ("attention", "-.", "D"),
}


def plot(result: dict[str, Any], path: Path) -> None:
    """Bits per byte against tokens and against seconds: means over the seeds, and their range."""
    figure, panels = pyplot.subplots(
        1, 2, figsize=(11, 4), dpi=140, sharey=True, layout="constrained"
    )
    for layout, its in result["layouts"].items():
        name, line, marker = STYLES[layout]
        bits = np.array([run["bits_per_byte"] for run in its["runs"]])
        seconds = np.mean([run["seconds"] for run in its["runs"]], axis=0)
        steps = np.array(its["runs"][0]["steps"])
        tokens = steps * result["tokens"] / steps[-1] / 1e6
        mean = bits.mean(axis=0)
        spread = np.stack([mean - bits.min(axis=0), bits.max(axis=0) - mean])
        for panel, values in zip(panels, (tokens, seconds), strict=True):
            panel.errorbar(
                values,
                mean,
                yerr=spread,
                color="black",
                linestyle=line,
                marker=marker,
                markerfacecolor="white",
                capsize=2,
                linewidth=1,
                label=name,
            )
    gzip = result["gzip_bits_per_byte"]
    for panel, label in zip(
        panels, ("million tokens of training", "seconds of training, 1 thread"), strict=True
    ):
        panel.axhline(gzip, color="gray", linewidth=1)
        panel.text(
            1, gzip, " gzip", color="gray", va="center", transform=panel.get_yaxis_transform()
        )
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation, bits per byte")
    panels[0].legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
