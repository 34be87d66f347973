"""Runs of a result that tables and claims are about."""

from typing import Any

Run = dict[str, Any]


def fewest_threads(runs: list[Run]) -> list[Run]:
    """Those with as many threads as the run with the fewest, in their order."""
    least = min(run["threads"] for run in runs)
    return [run for run in runs if run["threads"] == least]


def decoded(result: Run, batch: int, length: int, layout: str | None = None) -> dict[str, Run]:
    """Of `benchmarks decode`, those of its first model, or of another layout, with the fewest
    threads, or what was not run, by cache or peer."""
    first = result["runs"][0]
    least = min(run.get("threads", 1) for run in result["runs"])
    wanted = layout or first["layout"], first["mlp_ratio"], batch, length, least
    return {
        run["cache"]: run
        for run in result["runs"]
        if wanted
        == (
            run["layout"],
            run["mlp_ratio"],
            run["batch"],
            run["new_tokens"],
            run.get("threads", least),
        )
    }
