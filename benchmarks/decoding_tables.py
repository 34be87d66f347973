"""The tables of what decoding takes, from results of `benchmarks` (`benchmarks.tables`)."""

from collections.abc import Callable, Iterable

from benchmarks.choice import Run, decoded, fewest_threads
from benchmarks.cli import CACHES, PEERS
from benchmarks.decode_plot import STYLES
from benchmarks.extrapolation import GPU
from benchmarks.markdown import table
from benchmarks.rates import of_gpu, step_parts

LENGTH, LONGER, BATCH = 8192, 32768, 8
"""Of which most tables tell."""


def steps(result: Run) -> str:
    """Milliseconds of a step of the engine with its cache and with others, and their caches."""
    rows = []
    for batch, length in settings(result):
        runs = decoded(result, batch, length)
        if length not in (LENGTH, LONGER):
            continue
        ours = [runs.get(name, {}) for name in ("paged", "epoched", "naive")]
        ratio = ours[2].get("convolution_over_paged")
        rows.append(
            [
                f"{batch}, {length:,}",
                *(milliseconds(run, "step_ms") for run in ours),
                *(milliseconds(run, "convolution_ms") for run in (ours[0], ours[2])),
                f"{ratio:.0f}" if ratio else "-",
                *(mib(run) for run in (ours[0], ours[2])),
            ]
        )
    head = ["batch, new tokens", "paged", "epoched", "direct sums"]
    head += ["convolution alone, paged", "direct sums", "ratio"]
    return table([*head, "cache, paged, MiB", "direct sums"], rows)


def peers(result: Run) -> str:
    """Tokens a second and cache of all, by length, at two batches."""
    lengths = sorted({run["new_tokens"] for run in result["runs"]})
    rows = []
    for batch in (1, 32):
        for name in present(result, [*CACHES, *PEERS]):
            runs = [decoded(result, batch, length).get(name) for length in lengths]
            rows.append([STYLES[name][0], str(batch), *map(speed_and_cache, runs)])
    head = ["tokens a second (cache, MiB)", "batch"]
    return table([*head, *(f"{length:,} new" for length in lengths)], rows)


def costs(result: Run) -> str:
    """Multiply-adds, bytes and joules of a token."""
    runs = decoded(result, BATCH, LENGTH)
    rows = []
    for name in present(result, [*CACHES, *PEERS]):
        run = runs.get(name, {})
        if "multiply_adds_per_token" not in run:
            continue
        adds, moved = run["multiply_adds_per_token"], run["bytes_moved_per_token"]
        joules = run["joules_per_token"]
        rows.append(
            [
                STYLES[name][0],
                f"{adds['dense'] / 1e6:.1f}",
                f"{(adds['total'] - adds['dense']) / 1e6:.2f}",
                f"{moved['weights'] / 1e6:.1f}",
                f"{(moved['total'] - moved['weights']) / 1e6:.2f}",
                joules if isinstance(joules, str) else f"{joules:.3f}",
            ]
        )
    head = ["of a token", "M multiply-adds, dense", "mixing tokens", "MB moved, weights"]
    return table([*head, "caches and filters", "joules"], rows)


def flash_inference(result: Run) -> str:
    """Tiles over prompt and generation beside ours: cache, and time of the convolution."""
    names = ["flashinference", "continuous", "paged"]
    rows = []
    for batch, length in settings(result):
        runs = [decoded(result, batch, length).get(name, {}) for name in names]
        if any("convolution_ms" not in run for run in runs):
            continue
        rows.append(
            [
                f"{runs[0]['prompt_tokens']:,}, {length:,}",
                str(batch),
                *map(mib, runs),
                *(milliseconds(run, "convolution_ms") for run in runs),
            ]
        )
    labels = [STYLES[name][0] for name in names]
    head = ["prompt, new tokens", "batch", *(f"{label}, MiB" for label in labels)]
    return table([*head, *(f"{label}, ms" for label in labels)], rows)


def gpu_steps(result: Run) -> str:
    """Milliseconds of a step, and of its convolution."""
    rows = []
    for name in present(result, [*CACHES, *PEERS]):
        runs = [decoded(result, *its).get(name, {}) for its in settings(result)]
        rows.append([STYLES[name][0], *map(gpu_step, runs)])
    head = [f"{batch}, {length:,}" for batch, length in settings(result)]
    return table(["batch, new tokens", *head], rows)


def gpu_step(run: Run) -> str:
    """Of one run; or that it does not fit."""
    if "step_ms" not in run:
        return "does not fit" if run else "-"
    alone = f" ({milliseconds(run, 'convolution_ms')})" if "convolution_ms" in run else ""
    return milliseconds(run, "step_ms") + alone


def launches(result: Run) -> str:
    """What a step takes, and what it would by the constants of the data sheet, if nothing had to be
    launched."""
    rates, rows = of_gpu(GPU), []
    for batch, length in settings(result):
        runs = decoded(result, batch, length)
        timed = [runs[name] for name in ("paged", "naive") if "step_ms" in runs.get(name, {})]
        if len(timed) < 2:
            continue
        parts = [step_parts(run, rates) for run in timed]
        row = [f"{batch}, {length:,}"]
        for run, its in zip(timed, parts, strict=True):
            row += [f"{run['step_ms']:.3g}", f"{1e3 * sum(its.values()):.3g}"]
            row += [str(run["operations_per_step"])]
        rows.append(row)
    head = ["batch, new tokens"]
    for name in ("paged", "naive"):
        head += [f"{STYLES[name][0]}, ms", "by the data sheet, ms", "operations"]
    return table(head, rows)


def shares(result: Run) -> str:
    """What FutureFill gains of a step, and what a convolution for nothing would."""
    rows = []
    for batch, length in settings(result):
        runs = decoded(result, batch, length)
        paged, naive = (runs.get(name, {}) for name in ("paged", "naive"))
        if "step_ms" not in paged or "step_ms" not in naive:
            continue
        rows.append(
            [
                f"{batch}, {length:,}",
                f"{naive['convolution_share']:.0%}",
                f"{paged['convolution_share']:.1%}",
                f"{naive['step_over_paged']:.2f} ({spread(naive['step_over_paged_by_round'])})",
                f"{1 / (1 - naive['convolution_share']):.2f}",
            ]
        )
    head = ["batch, new tokens", "convolution's share, direct sums", "paged"]
    head.append("times as fast (of the rounds)")
    return table([*head, "with a convolution that takes no time"], rows)


def spread(values: list[float]) -> str:
    """From the lowest to the highest."""
    return f"{min(values):.2f} to {max(values):.2f}"


def layouts(result: Run) -> str:
    """Milliseconds of a step and of its convolutions, by mixer."""
    names = ["paged", "continuous", "naive"]
    rows = []
    for layout in dict.fromkeys(run["layout"] for run in result["runs"]):
        for batch, length in settings(result):
            runs = [decoded(result, batch, length, layout).get(name, {}) for name in names]
            parts = ("step_ms", "convolution_ms")
            figures = [milliseconds(run, part) for part in parts for run in runs]
            rows.append([layout, f"{batch}, {length:,}", *figures])
    labels = [STYLES[name][0] for name in names]
    head = ["mixers", "batch, new tokens", *(f"{label}, ms" for label in labels)]
    return table([*head, *(f"convolution alone, {label}" for label in labels)], rows)


def model(result: Run) -> str:
    """Largest errors of the curves."""
    batches = sorted({curve["batch"] for curve in result["curves"]})
    worst: dict[tuple[str, str], dict[int, float]] = {}
    for curve in result["curves"]:
        errors = worst.setdefault((curve["layout"], curve["cache"]), {})
        batch = curve["batch"]
        errors[batch] = max(errors.get(batch, 0.0), curve["largest_error"])
    first, names = result["curves"][0]["layout"], [*CACHES, *PEERS]
    rows = [
        [STYLES[name][0] + ("" if layout == first else f", {layout}")]
        + [f"{errors[batch]:.0%}" if batch in errors else "-" for batch in batches]
        for (layout, name), errors in sorted(
            worst.items(), key=lambda its: (its[0][0] != first, its[0][0], names.index(its[0][1]))
        )
    ]
    return table(["largest error of a curve", *(f"batch {batch}" for batch in batches)], rows)


def convolutions(result: Run) -> str:
    """What the model says of convolutions alone over what they take, lowest and highest."""
    batches = sorted({curve["batch"] for curve in result["curves"]})
    found: dict[tuple[str, int], list[float]] = {}
    first = result["curves"][0]["layout"]
    for curve in (curve for curve in result["curves"] if curve["layout"] == first):
        for its in curve["points"]:
            if "convolution_ms" in its:
                ratio = its["predicted_convolution_ms"] / its["convolution_ms"]
                found.setdefault((curve["cache"], curve["batch"]), []).append(ratio)
    rows = [
        [STYLES[name][0]]
        + [spread(its) if (its := found.get((name, batch))) else "-" for batch in batches]
        for name in CACHES
    ]
    head = ["convolution alone: predicted over measured"]
    return table([*head, *(f"batch {batch}" for batch in batches)], rows)


def profile(result: Run) -> str:
    """What convolutions spend their time on, and what the model says of it."""
    rows = []
    for run in result["runs"]:
        predicted = run["predicted_ms"]
        moved = sum(its for name, its in predicted.items() if name != "operations")
        rows.append(
            [
                STYLES[run["cache"]][0],
                str(run["batch"]),
                f"{run['convolution_ms']:.2f}",
                f"{moved:.2f} + {predicted['operations']:.2f}",
                f"{run['of_flushes_ms'] / run['convolution_ms']:.0%}",
                f"{run['operations_per_step']:.0f}",
                *(f"{its / run['profiled_ms']:.0%}" for its in run["parts_ms"].values()),
            ]
        )
    head = ["convolution alone", "batch", "ms a step", "predicted, + operations", "in flushes"]
    return table([*head, "operations", *result["parts"]], rows)


def gains(result: Run) -> str:
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


def gain(cell: Run) -> str:
    """Of one batch and length: in square brackets where the paged cache does not fit, in round ones
    where that of direct sums does not either."""
    figure = f"{cell['times_as_fast']:.2f}"
    if cell["paged"]["fits"]:
        return figure
    return f"[{figure}]" if cell["naive"]["fits"] else f"({figure})"


def convolution(result: Run) -> str:
    """Convolutions alone."""
    run = fewest_threads(result["runs"])[0]
    rows = [
        [
            f"training, {its['length']:,} tokens (B=2, D=256), forward and backward",
            f"two branches, {its['two_branch_ms']:,.0f} ms",
            f"fused, {its['fused_ms']:,.0f} ms",
            f"{its['ratio']:.1f}",
        ]
        for its in run["training"]
    ]
    rows += [
        [
            f"decoding {its['length']:,} tokens, batch {its['batch']} (one STU layer, D=512)",
            f"direct sum, {its['naive_us_per_token']:,.0f} us a token",
            f"{its['continuous_us_per_token']:,.0f} us",
            f"{its['ratio']:.0f}",
        ]
        for its in run["decoding"]
    ]
    return table(["", "usual way", "stu", "ratio"], rows)


def settings(result: Run) -> list[tuple[int, int]]:
    """Batches and lengths."""
    return sorted({(run["batch"], run["new_tokens"]) for run in result["runs"]})


def present(result: Run, names: Iterable[str]) -> list[str]:
    """Those that the result has."""
    there = {run["cache"] for run in result["runs"]}
    return [name for name in names if name in there]


def speed_and_cache(run: Run | None) -> str:
    """Or why there is none."""
    if run is None:
        return "-"
    if "tokens_per_second" not in run:
        return f"does not fit ({mib(run)})"
    return f"{run['tokens_per_second']:,.0f} ({mib(run)})"


def mib(run: Run) -> str:
    """Of its cache."""
    if not run:
        return "-"
    size = run["cache_bytes"] / 2**20
    return f"{size:,.0f}" if size >= 10 else f"{size:.2g}"


def milliseconds(run: Run, name: str) -> str:
    """Or a dash where it was not run."""
    return f"{run[name]:.3g}" if name in run else "-"


TABLES: dict[str, Callable[[Run], str]] = {
    "decode steps": steps,
    "decode peers": peers,
    "decode costs": costs,
    "decode shares": shares,
    "decode flashinference": flash_inference,
    "prompts flashinference": flash_inference,
    "convolution": convolution,
    "h100 steps": gpu_steps,
    "h100 launches": launches,
    "layouts": layouts,
    "model errors": model,
    "model convolutions": convolutions,
    "profile": profile,
    "model gains": gains,
}
