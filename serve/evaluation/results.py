"""Results of an evaluation: their JSON, their names in logs, and pictures of retrieval."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stu.common.files import new_file

NOT_IN_NAMES = re.compile(r"[^\w./-]")
"""Characters that not every logger allows in the name of a metric."""


@dataclass(frozen=True)
class Cell:
    """Result of the texts of one length and place."""

    length: int
    """Tokens of the texts."""
    depth: float
    """Place of the fact, from 0 to 1."""
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TaskResult:
    """Results of one task."""

    metrics: Mapping[str, float]
    num_examples: int
    cells: Sequence[Cell] = ()
    """Results by length and place, of a retrieval task."""
    version: Any = None
    """Version that lm-eval's task has."""
    num_fewshot: int | None = None
    """Examples that precede each question, of lm-eval's task."""
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON values, without what the task does not have. A metric that is
        infinite, or no number, is null."""
        finite = {
            name: value if math.isfinite(value) else None for name, value in self.metrics.items()
        }
        values = asdict(self) | {"metrics": finite}
        return {name: value for name, value in values.items() if value not in (None, (), [], {})}


Results = dict[str, TaskResult]
"""Results by the name of the task."""


def logged_metrics(results: Results) -> dict[str, float]:
    """Return all metrics by names for logs, such as `eval/needle/acc`."""
    return {
        NOT_IN_NAMES.sub("_", f"eval/{task}/{name}"): value
        for task, result in results.items()
        for name, value in result.metrics.items()
    }


def report(results: Results, **about: Any) -> dict[str, Any]:
    """Return what a file of results holds; about: its first fields."""
    return {**about, "results": {task: result.to_json() for task, result in results.items()}}


def write_report(path: Path, results: Results, **about: Any) -> list[Path]:
    """Write a file of results, and a picture of each retrieval task beside it: `NAME.TASK.png` for
    `NAME.json`, or for a `NAME` with another suffix. Returns their paths."""
    with new_file(path) as temporary:
        text = json.dumps(report(results, **about), indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    pictures = []
    stem = path.stem if path.suffix == ".json" else path.name
    for task, result in results.items():
        if result.cells:
            pictures.append(path.with_name(f"{stem}.{task}.png"))
            plot_cells(task, result.cells, pictures[-1])
    return [path, *pictures]


def table(results: Results) -> str:
    """Return the metrics as lines of text."""
    rows = [
        (task, name, f"{value:.4f}")
        for task, result in results.items()
        for name, value in result.metrics.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{task:<{widths[0]}}  {name:<{widths[1]}}  {value:>{widths[2]}}"
        for task, name, value in rows
    )


def plot_cells(task: str, cells: Sequence[Cell], path: Path) -> None:
    """Draw the share of right answers by length and place as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    by_place = {(cell.length, cell.depth): cell.metrics["acc"] for cell in cells}
    values = [[100 * by_place[length, depth] for length in lengths] for depth in depths]
    size = 1.6 + 0.75 * max(3, len(lengths)), 1.4 + 0.42 * max(3, len(depths))
    figure, axes = pyplot.subplots(figsize=size, dpi=120, layout="constrained")
    picture = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color = "white" if value > 55 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    axes.set(title=task, xlabel="tokens of the text", ylabel="place of the fact")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(picture, label="right answers, %")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
