"""The tables of what mixers learn from the same tokens."""

import math
from collections.abc import Callable
from functools import partial
from statistics import fmean, stdev
from typing import Any

from benchmarks.recorded import Columns, Run, table

LABELS = {"stu": "STU", "hybrid": "hybrid", "hyena": "Hyena", "rope": "attention, RoPE"}
"""Layouts, in the order of tables and legends; the last one is what others are compared with."""
PEER = "rope"
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95% quantiles of Student's t by the number of differences."""
Setting = tuple[str, int, str]
"""Text, context and optimizer."""


def setting_of(run: Run) -> Setting:
    """Return the setting that a model was trained in."""
    return run["text"], run["context"], run["optimizer"]


def settings(result: Run) -> list[Setting]:
    """Return the settings that models were trained in."""
    found = {setting_of(run) for run in result["runs"]}
    return sorted(found, key=lambda one: (one[2], one[0], one[1]))


def by_seed(result: Run, setting: Setting, layout: str) -> dict[int, Run]:
    """Return the runs of a layout in a setting, by seed."""
    return {
        run["seed"]: run
        for run in result["runs"]
        if (setting_of(run), run["layout"]) == (setting, layout)
    }


def difference(mine: dict[int, Run], peers: dict[int, Run]) -> tuple[float, float]:
    """Return the mean difference in bits per byte of runs with the same seeds, thus the same order
    of the data, and half of its 95% interval; infinity for one seed."""
    seeds = mine.keys() & peers.keys()
    each = [mine[seed]["bits_per_byte"] - peers[seed]["bits_per_byte"] for seed in sorted(seeds)]
    if len(each) < 2:
        return fmean(each), math.inf
    return fmean(each), T_95[len(each)] * stdev(each) / math.sqrt(len(each))


def compared(mine: dict[int, Run], others: dict[int, Run]) -> str:
    """Return the mean difference of runs with its 95% interval, and say so if it is not
    significant. Empty without a common seed."""
    if not mine.keys() & others.keys():
        return ""
    mean, half = difference(mine, others)
    if half == math.inf:
        return f"{mean:+.3f}, one seed"
    return f"{mean:+.3f} ± {half:.3f}{'' if abs(mean) > half else ', not significant'}"


def bits_per_byte(runs: dict[int, Run]) -> list[float]:
    """Return the bits per byte of each run."""
    return [run["bits_per_byte"] for run in runs.values()]


def losses(result: Run) -> str:
    """Show bits per byte of AdamW's models, and the difference from attention."""
    shown = [setting for setting in settings(result) if setting[2] == "adamw"]
    seeds = {
        (setting, layout): len(by_seed(result, setting, layout))
        for setting in shown
        for layout in LABELS
    }

    def cell(setting: Setting, layout: str) -> str:
        runs = by_seed(result, setting, layout)
        if not runs:
            return "-"
        mean = f"{fmean(bits_per_byte(runs)):.3f}"
        peers = {} if layout == PEER else by_seed(result, setting, PEER)
        return f"{mean} ({verdict})" if (verdict := compared(runs, peers)) else mean

    def title(setting: Setting) -> str:
        text, context, _ = setting
        fewest = min(filter(None, (seeds[setting, layout] for layout in LABELS)))
        most = max(seeds.values())
        return f"{text}, {context:,}{'' if fewest == most else f', {fewest} of {most} seeds'}"

    columns: Columns = {"bits per byte (difference from attention)": LABELS.__getitem__}
    columns |= {title(setting): partial(cell, setting) for setting in shown}
    return table(LABELS, columns)


def optimizers(result: Run) -> str:
    """Show bits per byte of AdamW's models and of Muon's, and the difference."""
    first = next(setting for setting in settings(result) if setting[2] == "adamw")

    def runs(optimizer: str, layout: str) -> dict[int, Run]:
        return by_seed(result, (*first[:2], optimizer), layout)

    def cell(optimizer: str, layout: str) -> str:
        bits = bits_per_byte(runs(optimizer, layout))
        return f"{fmean(bits):.3f} ({min(bits):.3f} to {max(bits):.3f})" if bits else "-"

    return table(
        LABELS,
        {
            "bits per byte (range of seeds)": LABELS.__getitem__,
            "AdamW": partial(cell, "adamw"),
            "Muon": partial(cell, "muon"),
            "difference": lambda layout: compared(runs("muon", layout), runs("adamw", layout)),
        },
    )


def of_positions(result: Run, setting: Setting, layout: str) -> dict[int, float]:
    """Return the mean nats of targets with as many tokens before them as each number or more, but
    less than the next one. Empty without a run."""
    all_nats = [run["loss_by_position"] for run in by_seed(result, setting, layout).values()]
    return {int(place): fmean(nats[place] for nats in all_nats) for place in (all_nats or [{}])[0]}


def longest(result: Run) -> list[Setting]:
    """Return the settings with the longest context and AdamW."""
    context = max(run["context"] for run in result["runs"])
    return [setting for setting in settings(result) if setting[1:] == (context, "adamw")]


def recall(result: Run) -> str:
    """Show the share of right answers of each task, at the best learning rate of the first seed."""

    def cell(task: str, layout: str) -> str:
        runs = [run for run in result["recall"] if (run["task"], run["layout"]) == (task, layout)]
        if not runs:
            return "-"
        rate = max((run for run in runs if run["seed"] == 0), key=lambda run: run["right"])
        chosen = [run for run in runs if run["learning_rate"] == rate["learning_rate"]]
        return ", ".join(f"{run['right']:.0%}" for run in chosen)

    def parameters(layout: str) -> str:
        sizes = {run["parameters"] for run in result["recall"] if run["layout"] == layout}
        return ", ".join(f"{size:,}" for size in sizes) or "-"

    tasks = sorted({run["task"] for run in result["recall"]})
    columns: Columns = {"accuracy, by seed": LABELS.__getitem__, "parameters": parameters}
    columns |= {task: partial(cell, task) for task in tasks}
    return table(LABELS, columns)


def rates(result: Run) -> str:
    """Show the learning rates that were tried with each text and context."""
    bits = {
        (setting_of(run), run["layout"], run["learning_rate"]): run["bits_per_byte"]
        for run in result["tried"]
    }
    rows = [
        (setting, layout) for setting in settings({"runs": result["tried"]}) for layout in LABELS
    ]

    def cell(rate: float, row: tuple[Setting, str]) -> str:
        found = bits.get((*row, rate))
        return "" if found is None else f"{found:.3f}"

    columns: Columns = {
        "bits per byte at a learning rate of": lambda row: LABELS[row[1]],
        "text, context": lambda row: f"{row[0][0]}, {row[0][1]:,}",
    }
    columns |= {f"{rate:g}": partial(cell, rate) for rate in sorted({rate for _, _, rate in bits})}
    return table(rows, columns)


TABLES: dict[str, Callable[[Any], str]] = {
    "quality losses": losses,
    "quality optimizers": optimizers,
    "quality recall": recall,
    "quality rates": rates,
}
