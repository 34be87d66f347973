"""`python -m benchmarks model`: the time of decoding steps by counted costs and measured speeds.

    python -m benchmarks model --decode '[decode.json,layouts.json]'

A step multiplies with the dense weights, which are read meanwhile, once for the batch; it reads and
writes caches and filters, and multiply-adds with them hide behind that; where it goes over the past
of each channel, it waits for the beginning of each; it transforms tiles; and it calls hundreds of
operations of torch. The times of all of these add up.

No constant is fitted: operations are counted while they run (`counting`), and the machine's speeds
were measured beside each run (`rates`). For each curve, a cache at one batch and all lengths of one
result, the largest error is reported.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.decoding.rates import Rates, step_parts
from benchmarks.machine import describe
from stu.common.errors import UserError

CURVE = ["layout", "mlp_ratio", "cache", "batch", "threads"]
"""Figures that the runs of a curve have in common, beyond their result."""


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    decode: tuple[Path, ...]
    """Results of `python -m benchmarks decode`, for example [decode.json]."""


def measure(options: Options) -> dict[str, Any]:
    """Return predicted and measured times, and the largest errors."""
    measured = {file: read_json(file) for file in options.decode}
    curves: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file, result in measured.items():
        timed = [run for run in result["runs"] if "step_ms" in run]
        if not timed:
            raise UserError(message=f"{file}: no timed run; make it by python -m benchmarks decode")
        for run in timed:
            head = {"result": file.stem} | {name: run[name] for name in CURVE}
            curve = curves.setdefault(tuple(head.values()), head | {"points": []})
            curve["points"].append(point(run))
    largest: dict[str, float] = {}
    for curve in curves.values():
        curve["largest_error"] = max(abs(point["error"]) for point in curve["points"])
        cache = curve["cache"]
        largest[cache] = max(largest.get(cache, 0.0), curve["largest_error"])
    return {
        "machine": describe(),
        "measured_on": [result["machine"] for result in measured.values()],
        "curves": list(curves.values()),
        "largest_error": largest,
    }


def read_json(file: Path) -> Any:
    """Read a result. Raises UserError if it is not JSON, OSError if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(message=f"{file}: not JSON ({error})") from error


def point(run: dict[str, Any]) -> dict[str, Any]:
    """Return the measured and the predicted time of a run, and the parts of the latter."""
    parts = step_parts(run, Rates(**run["rates"]))
    predicted = 1e3 * sum(parts.values())
    return {
        "new_tokens": run["new_tokens"],
        "rates": run["rates"],
        "measured_ms": run["step_ms"],
        "predicted_ms": predicted,
        "error": predicted / run["step_ms"] - 1,
        "predicted_shares": {name: 1e3 * part / predicted for name, part in parts.items()},
    }
