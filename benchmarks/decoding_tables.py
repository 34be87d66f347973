"""Tables of time and memory of decoding, each from one result."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from benchmarks.recorded import Columns, Run, decoded, settings, shown, table

LABELS = {
    "ours": "ours",
    "ours_int8": "ours, int8",
    "continuous": "FutureFill, continuous",
    "epoched": "FutureFill, epoched",
    "flashinference": "tiles from the first prompt token",
    "naive": "direct sums",
    "llama": "Llama-like",
    "llama_grouped": "Llama-like, 4 KV heads",
    "mamba2": "Mamba-2",
    "rwkv": "RWKV-4",
    "s4": "S4D",
}
"""Caches, then peers, in the order of tables and legends."""
SCHEDULES = {"continuous", "epoched", "flashinference"}
"""Other schedules of our model's convolutions (`online_tables` compares such)."""
Runs = dict[str, Run]
"""Runs in one setting, by cache or peer."""


def decode_peers(result: Run) -> str:
    """Show tokens per second and cache of each model, by length, at two batches."""

    def cell(length: int, row: tuple[int, str]) -> str:
        run = decoded(result, row[0], length).get(row[1])
        if run is None:
            return "-"
        speed = f"{run['tokens_per_second']:,.0f}" if "step_ms" in run else "does not fit"
        return f"{speed} ({mib(run)})"

    columns: Columns = {
        "tokens per second (cache, MiB)": lambda row: LABELS[row[1]],
        "batch": lambda row: str(row[0]),
    }
    for length in sorted({run["new_tokens"] for run in result["runs"]}):
        columns[f"{length:,} new tokens"] = partial(cell, length)
    return table([(batch, name) for batch in (1, 32) for name in models(result)], columns)


def decode_costs(result: Run) -> str:
    """Show multiply-adds and bytes of a token."""
    runs = decoded(result, 8, 8192)

    def apart(counts: str, kind: str, run: Run) -> str:
        return f"{(run[counts]['total'] - run[counts][kind]) / 1e6:.2f}"

    adds, moved = "multiply_adds_per_token", "bytes_moved_per_token"
    columns: Columns = {
        "per token": lambda run: LABELS[run["cache"]],
        "multiply-adds (M), dense layers": lambda run: f"{run[adds]['dense'] / 1e6:.1f}",
        "token mixing": partial(apart, adds, "dense"),
        "MB moved, weights": lambda run: f"{run[moved]['weights'] / 1e6:.1f}",
        "caches and filters": partial(apart, moved, "weights"),
    }
    return table([runs[name] for name in models(result) if adds in runs.get(name, {})], columns)


def decode_shares(result: Run) -> str:
    """Show the gain of our cache in a step, and that of a convolution that takes no time, at the
    smallest batch and the largest."""

    def gain(runs: Runs) -> str:
        rounds = runs["naive"]["step_over_ours_by_round"]
        return f"{runs['naive']['step_over_ours']:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"

    def bound(runs: Runs) -> str:
        return f"{1 / (1 - runs['naive']['convolution_share']):.2f}"

    columns: Columns = {
        "batch, new tokens": batch_and_length,
        "share of the convolution, direct sums": lambda runs: (
            f"{runs['naive']['convolution_share']:.0%}"
        ),
        "ours": lambda runs: f"{runs['ours']['convolution_share']:.1%}",
        "speedup (range over rounds)": gain,
        "speedup if the convolution were free": bound,
    }
    rows = timed(result, ["ours", "naive"])
    batches = [runs["ours"]["batch"] for runs in rows]
    ends = min(batches), max(batches)
    return table([runs for runs in rows if runs["ours"]["batch"] in ends], columns)


def int8_steps(result: Run) -> str:
    """Show milliseconds of a step with weights in float32 and in int8."""
    columns: Columns = {
        "batch": lambda runs: str(runs["ours"]["batch"]),
        "float32, ms": partial(ms, "ours", "step_ms"),
        "int8, ms": partial(ms, "ours_int8", "step_ms"),
        "speedup": lambda runs: f"{1 / runs['ours_int8']['step_over_ours']:.2f}",
    }
    return table(timed(result, ["ours", "ours_int8"]), columns)


def model_errors(result: Run) -> str:
    """Show how far the cost model is from the measured steps of each cache and model, at most."""
    errors = result["largest_error"]
    columns: Columns = {
        "cache or model": LABELS.__getitem__,
        "largest error": lambda name: f"{errors[name]:.1%}",
    }
    return table([name for name in LABELS if name in errors], columns)


def layouts(result: Run) -> str:
    """Show milliseconds of a step and of its convolutions, by mixer."""
    names = ["ours", "continuous", "naive"]
    columns: Columns = {
        "mixers": lambda runs: next(iter(runs.values()))["layout"],
        "batch, new tokens": batch_and_length,
    }
    columns |= {f"{LABELS[name]}, ms": partial(ms, name, "step_ms") for name in names}
    for name in names:
        columns[f"convolution only, {LABELS[name]}, ms"] = partial(ms, name, "convolution_ms")
    layouts = dict.fromkeys(run["layout"] for run in result["runs"])
    pairs = settings(result)
    return table([decoded(result, *pair, name) for name in layouts for pair in pairs], columns)


def gpu_steps(result: Run) -> str:
    """Show milliseconds of a step on a GPU, and of its convolution."""

    def cell(pair: tuple[int, int], name: str) -> str:
        runs = decoded(result, *pair)
        if "step_ms" not in runs.get(name, {}):
            return "does not fit" if name in runs else "-"
        return f"{ms(name, 'step_ms', runs)} ({ms(name, 'convolution_ms', runs)})"

    columns: Columns = {"batch, new tokens": LABELS.__getitem__}
    columns |= {f"{pair[0]}, {pair[1]:,}": partial(cell, pair) for pair in settings(result)}
    return table(present(result), columns)


def gpu_launches(result: Run) -> str:
    """Show milliseconds of a step, and the operations that it consists of."""

    def operations(name: str, runs: Runs) -> str:
        return str(runs[name]["operations_per_step"])

    columns: Columns = {"batch, new tokens": batch_and_length}
    for name in ("ours", "naive"):
        columns[f"{LABELS[name]}, ms"] = partial(ms, name, "step_ms")
        columns[f"operations#{name}"] = partial(operations, name)
    return table(timed(result, ["ours", "naive"]), columns)


def present(result: Run) -> list[str]:
    """Return the caches and peers of a result of `decode`, in the order of the labels."""
    there = {run["cache"] for run in result["runs"]}
    return [name for name in LABELS if name in there]


def models(result: Run) -> list[str]:
    """Return the peers of a result, and the slowest and the fastest cache of our model."""
    return [name for name in present(result) if name not in SCHEDULES]


def kernels(result: Run) -> str:
    """Show the resources of kernels in bfloat16."""
    shown: dict[tuple[str, str], dict[str, Run]] = {}
    for run in result["runs"]:
        shown.setdefault((run["kernel"], run["dtype"]), {})[run["gpu"]] = run
    rows = [by_gpu for (_, dtype), by_gpu in shown.items() if dtype == "bf16"]
    columns: Columns = {
        "kernel": lambda row: f"`{row['H100']['kernel']}`",
        "warps": lambda row: str(row["H100"]["warps"]),
        "shared memory, bytes": lambda row: f"{row['H100']['shared_bytes']:,}",
    }
    for gpu in rows[0]:  # a GPU without floats of 8 bits has no kernel for them
        columns[f"registers, {gpu}"] = registers_on(gpu)
    columns["spilled bytes"] = lambda row: str(max(run["spilled_bytes"] for run in row.values()))
    return table(rows, columns)


def realisation(result: Run) -> str:
    """Show states of filters, and what filters and states take to compute."""
    columns: Columns = {
        "`max_seq_len`": lambda run: f"{run['max_seq_len']:,}",
        "rank": lambda run: str(run["rank"]),
        "error of a filter": lambda run: f"{run['filter_error']:.1e}",
        "error of random channels": lambda run: f"{run['channel_error']:.1e}",
    }
    for name in ("state", "filters"):
        columns[f"{name}, seconds"] = partial(digits, f"{name}_seconds")
        columns[f"{name}, GiB"] = partial(digits, f"{name}_gib")
    return table(result["runs"], columns)


def digits(name: str, run: Run) -> str:
    """Return a figure of a run with two digits, or as a whole number."""
    return shown(run[name], 2)


def registers_on(gpu: str) -> Callable[[Any], str]:
    """Return the function that shows a kernel's registers on a GPU."""
    return lambda row: str(row[gpu]["registers"]) if gpu in row else "-"


def timed(result: Run, names: Iterable[str]) -> list[Runs]:
    """Return the settings in which all of these caches were timed."""
    rows = (decoded(result, *pair) for pair in settings(result))
    return [runs for runs in rows if all("step_ms" in runs.get(name, {}) for name in names)]


def batch_and_length(runs: Runs) -> str:
    """Return batch and new tokens of a setting."""
    run = next(iter(runs.values()))
    return f"{run['batch']}, {run['new_tokens']:,}"


def ms(name: str, part: str, runs: Runs) -> str:
    """Return milliseconds, or a dash for what was not run."""
    return shown(runs[name][part]) if part in runs.get(name, {}) else "-"


def mib(run: Run) -> str:
    """Return the size of a run's cache."""
    return shown(run["cache_bytes"] / 2**20, 2)


TABLES: dict[str, Callable[[Run], str]] = {
    "decode peers": decode_peers,
    "decode costs": decode_costs,
    "model": model_errors,
    "decode shares": decode_shares,
    "layouts": layouts,
    "int8 steps": int8_steps,
    "kernels": kernels,
    "realisation": realisation,
    "h100 steps": gpu_steps,
    "h100 launches": gpu_launches,
}
