"""The tables of what serving takes, from results of `benchmarks` (`benchmarks.tables`)."""

from collections.abc import Callable

from benchmarks.choice import Run, fewest_threads
from benchmarks.markdown import table


def load(result: Run) -> str:
    """The server under many clients, and the engine alone."""
    rows = []
    for run in result["runs"]:
        closed, opened = run["closed_loop"], run["open_loop"]
        rows.append(
            [
                str(run["threads"]),
                f"{closed['output_throughput']:,.0f}",
                f"{run['engine_only_tokens_per_second']:,.0f}",
                f"{run['overhead_share']:.0%}",
                f"{closed['p50_itl_ms']:.0f}, {closed['p99_itl_ms']:.0f}",
                f"{opened['p50_ttft_ms']:.0f}, {opened['p99_ttft_ms']:.0f} ({opened['rate']:.1f})",
                f"{run['short_prompts']['max_steps_until_first_byte']}",
                f"{run['seconds_to_ready']:.1f}",
                f"{run['resident_mib'] / 1024:.1f}",
            ]
        )
    head = ["threads", "tokens/s over HTTP", "engine alone", "lost", "between tokens, ms: p50, p99"]
    head += ["first token, ms: p50, p99 (at so many requests/s)"]
    head += ["steps until a short prompt's first token, at most", "ready after s", "GiB"]
    return table(head, rows)


def invariance(result: Run) -> str:
    """How many prompts change with their company, and at what speed they do not."""
    rows = [
        [
            "yes" if run["batch_invariant"] else "no",
            str(run["greedy_prompts_changed"]),
            str(run["temperature_1_prompts_changed"]),
            f"{run['greedy_tokens_per_second']:,.0f}",
            f"{run['temperature_1_tokens_per_second']:,.0f}",
        ]
        for run in fewest_threads(result["runs"])
    ]
    head = ["`--batch-invariant`", "changed, greedy", "at temperature 1", "tokens/s, greedy"]
    return table([*head, "at temperature 1"], rows)


def soak(result: Run) -> str:
    """Resident memory under random traffic."""
    samples = result["samples"]
    first, last = samples[1], samples[-1]  # the first of all is of the beginning
    row = [
        f"{last['seconds']:,}",
        f"{last['steps']:,}",
        f"{last['new_tokens']:,}",
        f"{last['preemptions']:,}",
        f"{first['resident_mib']:,.0f}",
        f"{last['resident_mib']:,.0f}",
        f"{result['largest_resident_mib']:,.0f}",
        f"{result['besides_mib']:,.0f}",
    ]
    head = ["seconds", "steps", "new tokens", "set back", "resident MiB, after a minute"]
    return table([*head, "at the end", "at most", "besides all that is known"], [row])


TABLES: dict[str, Callable[[Run], str]] = {"load": load, "invariance": invariance, "soak": soak}
