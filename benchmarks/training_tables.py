"""The tables of what training takes, from results of `benchmarks` (`benchmarks.tables`)."""

from collections.abc import Callable

from benchmarks.choice import Run, fewest_threads
from benchmarks.markdown import table


def memory(result: Run) -> str:
    """Planned and measured peaks."""
    rows = []
    for run in result["runs"]:
        kind = run["parallel"] if run["zero_stage"] is None else f"ZeRO {run['zero_stage']}"
        again = ", blocks computed again" if run["checkpoint_activations"] else ""
        rows.append(
            [
                f"{run['layout']}, mlp_ratio {run['mlp_ratio']}{again}",
                f"{run['ranks']}, {kind}",
                f"{run['seq_len']:,} x {run['micro_batch_size']}",
                *(f"{run[name]:.2f}" for name in ("planned_gib", "measured_gib")),
                f"{run['planned_over_measured']:.2f}",
            ]
        )
    head = ["model", "ranks", "tokens x micro-batch", "planned, GiB", "measured, GiB", "ratio"]
    return table(head, rows)


def sizes(result: Run) -> str:
    """What is planned for each size."""
    stages = ["ddp", "zero 1", "zero 2", "zero 3", "fsdp"]
    rows = []
    for size in result["sizes"]:
        gib = {(way["stage"], way["recomputes"]): way["gib"] for way in size["ways"]}
        best = size["best"]
        shares = (f"{size[f'{part}_share']:.1%}" for part in ("dense", "convolution", "attention"))
        again = ", again" if best["recomputes"] else ""
        rows.append(
            [
                f"{size['model'].split('-')[1]} ({size['parameters'] / 1e6:,.0f} M)",
                str(size["gpus"]),
                f"{size['gflops_per_token']:.1f} ({', '.join(shares)})",
                *(f"{gib[stage, False]:.0f} / {gib[stage, True]:.0f}" for stage in stages),
                f"{best['stage']}{again}, {best['micro_batch']}",
                f"{best['tokens_per_second']:,.0f}",
                f"{size['days']:.2f}",
            ]
        )
    head = ["model", "GPUs", "GFLOP a token (dense, FFTs, attention)", *stages]
    return table([*head, "way, micro-batch", "tokens/s", "days"], rows)


def train(result: Run) -> str:
    """Speeds by context, and where a step's time goes."""
    runs = fewest_threads(result["runs"])
    names = {
        "stu": "STU",
        "stu_two_branch": "STU, two branches",
        "hybrid": "hybrid",
        "hybrid_two_branch": "hybrid, two branches",
        "attention_sdpa": "attention",
        "attention_windowed": "attention in a window",
    }
    speeds = []
    for way, name in names.items():
        cells = []
        for run in runs:
            own = run["ways"][way]["tokens_per_second"]
            ratios = [
                f"{layout} {run['ratios'][f'{layout}_over_{over}']:.2f} times"
                for layout, over in compared(way)
            ]
            cells.append(f"{own:,.0f}" + (f" ({', '.join(ratios)})" if ratios else ""))
        speeds.append([name, *cells])
    head = ["tokens a second", *(f"{run['context']:,} tokens" for run in runs)]
    profiled = next(run for run in runs if "profiles" in run)
    profiles = profiled["profiles"]
    parts = [
        [part.replace("_", " "), *(f"{profiles[its]['shares'][part]:.0%}" for its in profiles)]
        for part in next(iter(profiles.values()))["shares"]
    ]
    shares = table([f"share of a step, {profiled['context']:,} tokens", *profiles], parts)
    return f"{table(head, speeds)}\n\n{shares}"


def compared(way: str) -> list[tuple[str, str]]:
    """Layouts that are as many times as fast as this way, and the way's name in a ratio."""
    if way.endswith("_two_branch"):
        return [(way.removesuffix("_two_branch"), "two_branch")]
    return [("stu", way), ("hybrid", way)] if way.startswith("attention") else []


def loss(result: Run) -> str:
    """Memory and time beside the plain loss."""
    head = ["targets x width", "memory, GiB", "of whole logits", "ratio", "seconds"]
    rows = [
        [
            f"{run['targets']:,} x {run['width']}",
            f"{run['chunked_gib']:.2f}",
            f"{run['plain_gib']:.2f}",
            f"{run['memory_ratio']:.1f}",
            f"{run['chunked_seconds']:.1f}",
            f"{run['plain_seconds']:.1f}",
            f"{run['speed_ratio']:.2f}",
        ]
        for run in fewest_threads(result["runs"])
    ]
    return table([*head, "of whole logits", "ratio"], rows)


def quality(result: Run) -> str:
    """What each mixer learned, and how soon."""
    rows = []
    for name, its in result["layouts"].items():
        reached = result["reached"]["layouts"][name]
        lowest, highest = its["lowest_bits_per_byte"], its["highest_bits_per_byte"]
        rows.append(
            [
                name,
                f"{its['parameters'] / 1e6:.2f}",
                f"{its['learning_rate']:g}",
                f"{its['mean_bits_per_byte']:.3f} ({lowest:.3f} to {highest:.3f})",
                f"{its['mean_seconds']:.0f}",
                f"{reached['mean_seconds']:.0f} ({reached['lowest_seconds']:.0f} to "
                f"{reached['highest_seconds']:.0f})",
            ]
        )
    worst = f"s to {result['reached']['bits_per_byte']:.3f} bits/byte, the worst run's last"
    head = ["mixer", "M weights", "learning rate", "bits/byte, mean and range of the seeds"]
    return table([*head, "s of training", worst], rows)


TABLES: dict[str, Callable[[Run], str]] = {
    "memory": memory,
    "sizes": sizes,
    "train": train,
    "loss": loss,
    "quality": quality,
}
