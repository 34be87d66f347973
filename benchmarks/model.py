"""`python -m benchmarks model`: what a step should take, by counted costs and measured rates.

    python -m benchmarks decode --output decode.json
    python -m benchmarks model decode.json layouts.json --plot model.png

A step multiplies with the dense weights, which are read once for the whole batch meanwhile; it
reads and writes the caches and filters that the algorithm asks for, behind which multiply-adds with
what is read hide; where it goes over each channel's past, it waits for the beginning of each; it
transforms tiles; and it calls hundreds of operations of torch. All of it adds up. The constants are
bytes read, multiply-adds of products (with as many rows as the batch has, and with one row, as a
sequence's keys meet), streams of memory begun, multiply-adds of FFTs, and operations, a second
each, measured beside each run (`benchmarks.rates`). No constant is fitted: bytes and multiply-adds
are those of `benchmarks.costs` and `benchmarks.convolution_costs`, operations are counted. For each
curve, a cache at one batch and all lengths of one result, the largest error is told; and of our
caches beside it, what the convolution alone should take and takes. Then the same formula, with
constants of a data sheet, says what other machines and larger models would do
(`benchmarks.extrapolation`).
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.extrapolation import extrapolated
from benchmarks.machine import describe
from benchmarks.rates import Rates, step_parts

CURVE = ["layout", "mlp_ratio", "cache", "batch", "threads"]
"""What a curve has in common, besides the result that it is from."""
CONVOLUTION = ["caches", "streams", "ffts"]
"""Parts of a step that are the convolution's where nothing else mixes; its operations are among
those of the whole step."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Predicted over measured, for each run and the worst of each curve; and other machines."""
    if args.plot and args.this_machine:
        raise ValueError("--plot shows other machines too: leave --this-machine out")
    measured = [read_json(file) for file in args.decode]
    curves: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file, its in zip(args.decode, measured, strict=True):
        for run in (run for run in its["runs"] if "step_ms" in run):
            head = {"result": file.stem} | {name: run[name] for name in CURVE}
            curve = curves.setdefault(tuple(head.values()), head | {"points": []})
            curve["points"].append(point(run, Rates(**run["rates"])))
        if not any(head[0] == file.stem for head in curves):
            raise ValueError(
                f"{file}: no timed run; make it by python -m benchmarks decode --output {file}"
            )
    for curve in curves.values():
        curve["largest_error"] = max(abs(its["error"]) for its in curve["points"])
    result = {
        "machine": describe(),
        "measured_on": [its["machine"] for its in measured],
        "curves": list(curves.values()),
        "largest_error": largest_errors(curves.values()),
    }
    if not args.this_machine:
        result["extrapolated"] = extrapolated()
    if args.plot:
        from benchmarks.model_plot import plot

        plot(result, args.plot)
    return result


def read_json(file: Path) -> Any:
    """Raises ValueError if it is none, OSError if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error


def point(run: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """A run's time, what it should be, and what that is made of."""
    parts = step_parts(run, rates)
    predicted = 1e3 * sum(parts.values())
    alone = {}
    if "convolution_ms" in run and not run["multiply_adds_per_token"]["attention"]:
        alone = {
            "convolution_ms": run["convolution_ms"],
            "predicted_convolution_ms": 1e3 * sum(parts[name] for name in CONVOLUTION),
        }
    return alone | {
        "new_tokens": run["new_tokens"],
        "rates": run["rates"],
        "measured_ms": run["step_ms"],
        "predicted_ms": predicted,
        "error": predicted / run["step_ms"] - 1,
        "predicted_shares": {name: 1e3 * its / predicted for name, its in parts.items()},
    }


def largest_errors(curves: Iterable[dict[str, Any]]) -> dict[str, float]:
    """By cache, of all its curves."""
    largest: dict[str, float] = {}
    for curve in curves:
        largest[curve["cache"]] = max(largest.get(curve["cache"], 0.0), curve["largest_error"])
    return largest
