"""The tables of what decoding takes, from results of `stu-bench` (`benchmarks.tables`)."""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.decode_plot import STYLES
from benchmarks.markdown import table

OURS = ["paged", "continuous", "epoched", "flashinference", "naive"]
PEERS = ["llama", "llama-dynamic", "mamba2", "rwkv", "s4"]
LENGTH, LONGER, BATCH = 8192, 32768, 8
"""Of which most tables tell."""


def steps(result: dict[str, Any]) -> str:
    """Milliseconds of a step of the engine with its cache and with direct sums."""
    rows = []
    for batch, length in sorted({(run["batch"], run["new_tokens"]) for run in result["runs"]}):
        runs = chosen(result, batch, length)
        if length not in (LENGTH, LONGER) or "step_ms" not in runs["paged"]:
            continue
        paged, others = runs["paged"], [runs["epoched"], runs["naive"]]
        convolutions = [paged, runs["naive"]]
        ratio = runs["naive"].get("convolution_over_paged")
        rows.append(
            [
                f"{batch}, {length:,}",
                *(milliseconds(run, "step_ms") for run in (paged, *others)),
                *(milliseconds(run, "convolution_ms") for run in convolutions),
                f"{ratio:.0f}" if ratio else "-",
            ]
        )
    head = ["batch, new tokens", "paged", "epoched", "direct sums"]
    return table([*head, "convolution alone, paged", "direct sums", "ratio"], rows)


def peers(result: dict[str, Any]) -> str:
    """Tokens a second and cache of all, by length, at one batch."""
    lengths = sorted({run["new_tokens"] for run in result["runs"]})
    rows = []
    for batch in (1, 32):
        for name in present(result, [*OURS, *PEERS]):
            runs = [chosen(result, batch, length)[name] for length in lengths]
            rows.append([STYLES[name][0], str(batch), *map(speed_and_cache, runs)])
    head = ["tokens a second (cache, MiB)", "batch"]
    return table([*head, *(f"{length:,} new" for length in lengths)], rows)


def costs(result: dict[str, Any]) -> str:
    """Multiply-adds, bytes and joules of a token."""
    rows = []
    for name in present(result, [*OURS, *PEERS]):
        run = chosen(result, BATCH, LENGTH)[name]
        if "step_ms" not in run:
            continue
        adds, moved = run["multiply_adds_per_token"], run["bytes_moved_per_token"]
        mixing = adds["total"] - adds["dense"]
        caches = moved["total"] - moved["weights"]
        joules = run["joules_per_token"]
        rows.append(
            [
                STYLES[name][0],
                f"{adds['dense'] / 1e6:.1f}",
                f"{mixing / 1e6:.2f}",
                f"{moved['weights'] / 1e6:.1f}",
                f"{caches / 1e6:.2f}",
                joules if isinstance(joules, str) else f"{joules:.3f}",
            ]
        )
    head = ["of a token", "M multiply-adds, dense", "mixing tokens", "MB moved, weights"]
    return table([*head, "caches and filters", "joules"], rows)


def flash_inference(result: dict[str, Any]) -> str:
    """Its schedule beside ours: cache, and time of the convolution."""
    rows = []
    for batch, length in sorted({(run["batch"], run["new_tokens"]) for run in result["runs"]}):
        runs = chosen(result, batch, length)
        if batch not in (1, BATCH) or any("step_ms" not in runs[name] for name in OURS[:4]):
            continue
        its, continuous, paged = (runs[x] for x in ("flashinference", "continuous", "paged"))
        rows.append(
            [
                f"{batch}, {length:,}",
                *(f"{run['cache_bytes'] / 2**20:.1f}" for run in (its, continuous, paged)),
                *(milliseconds(run, "convolution_ms") for run in (its, continuous, paged)),
            ]
        )
    names = ["Flash Inference", "FutureFill, continuous", "paged"]
    head = [f"cache of {names[0]}, MiB", *names[1:], f"convolution of {names[0]}, ms", *names[1:]]
    return table(["batch, new tokens", *head], rows)


def model(result: dict[str, Any]) -> str:
    """Largest errors of the curves."""
    batches = sorted({curve["batch"] for curve in result["curves"]})
    rows = []
    for name in [name for name in [*OURS, *PEERS] if name in result["largest_error"]]:
        by_batch = {
            curve["batch"]: curve["largest_error"]
            for curve in result["curves"]
            if curve["cache"] == name
        }
        cells = (f"{by_batch[batch]:.0%}" if batch in by_batch else "-" for batch in batches)
        rows.append([STYLES[name][0], *cells])
    return table(["largest error of a curve", *(f"batch {batch}" for batch in batches)], rows)


def gains(result: dict[str, Any]) -> str:
    """On the other machine, by how much FutureFill pays."""
    elsewhere = result["extrapolated"]
    rows = []
    for name, layouts in elsewhere["sizes"].items():
        for layout, its in layouts.items():
            cells = {(cell["batch"], cell["new_tokens"]): cell for cell in its["cells"]}
            lengths = sorted({length for _, length in cells})
            rows += [
                [
                    f"{name.split('-')[1]}, {layout}",
                    str(batch),
                    *(gain(cells[batch, length]) for length in lengths),
                ]
                for batch in (1, 8, 64)
            ]
    return table(["model", "batch", *(f"{length:,} new" for length in lengths)], rows)


def gain(cell: dict[str, Any]) -> str:
    """Of one batch and length; in brackets where the caches do not fit."""
    figure = f"{cell['times_as_fast']:.2f}"
    return figure if cell["paged"]["fits"] else f"({figure})"


def chosen(result: dict[str, Any], batch: int, length: int) -> dict[str, dict[str, Any]]:
    """By cache or peer, with the fewest threads, of the first layout."""
    first = result["runs"][0]
    its = [
        run
        for run in result["runs"]
        if (run["batch"], run["new_tokens"], run["layout"]) == (batch, length, first["layout"])
    ]
    return {run["cache"]: run for run in reversed(its)}


def present(result: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those that the result has."""
    there = {run["cache"] for run in result["runs"]}
    return [name for name in names if name in there]


def speed_and_cache(run: dict[str, Any]) -> str:
    """Or why there is none."""
    mib = f"{run['cache_bytes'] / 2**20:,.0f}"
    if "tokens_per_second" not in run:
        return f"does not fit ({mib})"
    return f"{run['tokens_per_second']:,.0f} ({mib})"


def milliseconds(run: dict[str, Any], name: str) -> str:
    """Or a dash where it was not run."""
    return f"{run[name]:.3g}" if name in run else "-"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "decode steps": steps,
    "decode peers": peers,
    "decode costs": costs,
    "decode flashinference": flash_inference,
    "model errors": model,
    "model gains": gains,
}
