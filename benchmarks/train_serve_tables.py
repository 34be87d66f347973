"""Tables of time and memory of training and serving, each from one result."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter

from benchmarks.recorded import Columns, Run, fewest_threads, shown, table

VARIANTS = {
    "stu": "STU",
    "stu_two_branch": "STU, two branches",
    "hybrid": "hybrid",
    "hybrid_two_branch": "hybrid, two branches",
    "attention_sdpa": "attention",
    "attention_windowed": "sliding-window attention",
}
"""Names of the variants in tables and pictures."""


def convolution(result: Run) -> str:
    """Show the convolution in training."""
    columns: Columns = {
        "forward and backward (B=2, D=256)": lambda row: f"{row['length']:,} tokens",
        "two branches, ms": lambda row: f"{row['two_branch_ms']:,.0f}",
        "fused, ms": lambda row: f"{row['fused_ms']:,.0f}",
        "ratio": lambda row: f"{row['ratio']:.1f}",
    }
    return table(fewest_threads(result["runs"])[0]["training"], columns)


def train(result: Run) -> str:
    """Show the speed of training by context."""

    def cell(run: Run, variant: str) -> str:
        compared: list[tuple[str, str]] = []
        if variant.endswith("_two_branch"):
            compared = [(variant.removesuffix("_two_branch"), "two_branch")]
        elif variant.startswith("attention"):
            compared = [("stu", variant), ("hybrid", variant)]
        ratios = [f"{VARIANTS[a]} {run['ratios'][f'{a}_over_{b}']:.2f}x" for a, b in compared]
        speed = f"{run['ways'][variant]['tokens_per_second']:,.0f}"
        return speed + (f" ({', '.join(ratios)})" if ratios else "")

    columns: Columns = {"tokens per second": VARIANTS.__getitem__}
    for run in fewest_threads(result["runs"]):
        columns[f"{run['context']:,} tokens"] = partial(cell, run)
    return table(VARIANTS, columns)


def tokenizers(result: Run) -> str:
    """Show the speed of each tokenizer beside that of its library."""
    library = "library_mb_per_second"
    columns: Columns = {
        "tokenizer": lambda run: run["tokenizer"],
        "vocabulary size": lambda run: f"{run['vocab_size']:,}",
        "bytes per token": lambda run: f"{run['bytes_per_token']:.2f}",
        "MB/s": lambda run: f"{run['ours_mb_per_second']:.1f}",
        "library, MB/s": lambda run: f"{run[library]:.1f}" if library in run else "",
    }
    return table(result["runs"], columns)


def documents(result: Run) -> str:
    """Show the cost of keeping documents apart, against together."""
    columns: Columns = {
        "model": lambda run: run["model"],
        "together, s": lambda run: f"{run['together_seconds']:.2f}",
        "apart / together": lambda run: f"{run['apart_ratio']:.2f}",
        "apart / together, one document per sample": lambda run: f"{run['one_a_row_ratio']:.2f}",
    }
    return table(result["runs"], columns)


def loss(result: Run) -> str:
    """Show memory and time of our loss and of a loss with whole logits."""
    columns: Columns = {
        "targets x width": lambda run: f"{run['targets']:,} x {run['width']}",
        "ours, GiB": lambda run: f"{run['chunked_gib']:.2f}",
        "full logits, GiB": lambda run: f"{run['plain_gib']:.2f}",
        "ratio": lambda run: f"{run['memory_ratio']:.1f}",
        "ours, s": lambda run: f"{run['chunked_seconds']:.1f}",
        "full logits, s": lambda run: f"{run['plain_seconds']:.1f}",
        "ratio#2": lambda run: f"{run['speed_ratio']:.2f}",
    }
    return table(fewest_threads(result["runs"]), columns)


def memory(result: Run) -> str:
    """Show planned and measured memory of training runs."""

    def model(run: Run) -> str:
        again = ", checkpointed activations" if run["checkpoint_activations"] else ""
        return f"{run['layout']}, mlp_ratio {run['mlp_ratio']}{again}"

    def ranks(run: Run) -> str:
        zero = f"ZeRO {run['zero_stage']}"
        return f"{run['ranks']}, {run['parallel'] if run['zero_stage'] is None else zero}"

    columns: Columns = {
        "model": model,
        "ranks": ranks,
        "tokens x micro-batch": lambda run: f"{run['seq_len']:,} x {run['micro_batch_size']}",
        "planned, GiB": lambda run: f"{run['planned_gib']:.2f}",
        "measured, GiB": lambda run: f"{run['measured_gib']:.2f}",
        "ratio": lambda run: f"{run['planned_over_measured']:.2f}",
    }
    return table(result["runs"], columns)


def load(result: Run) -> str:
    """Show the server under many clients, and the engine alone."""

    def quantiles(name: str, loop: Run) -> str:
        return f"{loop[f'p50_{name}_ms']:.0f}, {loop[f'p99_{name}_ms']:.0f}"

    def of_rounds(shares: list[float]) -> str:
        return f"{min(shares):z.0%} to {max(shares):z.0%}"

    columns: Columns = {
        "threads": lambda run: str(run["threads"]),
        "tokens/s over HTTP": lambda run: f"{run['closed_loop']['output_throughput']:,.0f}",
        "engine alone": lambda run: f"{run['engine_only_tokens_per_second']:,.0f}",
        "overhead (of rounds)": lambda run: (
            f"{run['overhead_share']:z.0%} ({of_rounds(run['overhead_shares'])})"
        ),
        "inter-token latency, ms: p50, p99": lambda run: quantiles("itl", run["closed_loop"]),
        "time to first token, ms: p50, p99 (requests/s)": lambda run: (
            f"{quantiles('ttft', run['open_loop'])} ({run['open_loop']['rate']:.1f})"
        ),
        "startup, s": lambda run: f"{run['seconds_to_ready']:.1f}",
        "memory, GiB": lambda run: f"{run['resident_mib'] / 1024:.1f}",
    }
    return table(result["runs"], columns)


def invariance(result: Run) -> str:
    """Show how many prompts change with the batch, and what avoiding that costs."""
    columns: Columns = {
        "`--batch-invariant`": lambda run: "yes" if run["batch_invariant"] else "no",
        "changed prompts, greedy": lambda run: str(run["greedy_prompts_changed"]),
        "at temperature 1": lambda run: str(run["temperature_1_prompts_changed"]),
        "tokens/s, greedy": lambda run: f"{run['greedy_tokens_per_second']:,.0f}",
        "at temperature 1#2": lambda run: f"{run['temperature_1_tokens_per_second']:,.0f}",
    }
    return table(fewest_threads(result["runs"]), columns)


def step(result: Run) -> str:
    """Show what a step of the engine spends beside the model's forward pass."""
    columns: Columns = {
        "weights": lambda run: {"float": "float32", "int8": "int8"}[run["weights"]],
        "sampling": lambda run: str(run["choice"]),
        "model, ms": lambda run: shown(run["model_ms"]),
        "caches, ms": lambda run: shown(run["caches_ms"], 2),
        "rest, ms": lambda run: shown(run["rest_ms"], 2),
        "share of rest": lambda run: f"{run['rest_share']:.1%}",
    }
    return table(result["runs"], columns)


def speculation(result: Run) -> str:
    """Show the speed with guesses over that without, and how many guesses were right."""
    columns: Columns = {
        "text": lambda run: str(run["text"]),
        "batch": lambda run: str(run["batch"]),
        "tokens/s": lambda run: shown(run["plain_tokens_per_second"]),
        "with speculation": lambda run: shown(run["speculate_tokens_per_second"]),
        "speedup": lambda run: f"{run['speedup']:.2f}",
        "draft tokens": lambda run: str(run["draft_tokens"]),
        "accepted": lambda run: str(run["accepted_tokens"]),
    }
    return table(result["runs"], columns)


def prefixes(result: Run) -> str:
    """Show requests whose beginning is remembered, and the same ones without that."""
    (run,) = fewest_threads(result["runs"])
    *_, turn = run["chat"]["turns"]
    system, chat = run["system"], run["chat"]
    rows = [
        [
            f"turn {len(chat['turns'])} of a chat, {turn['prompt_tokens']:,} tokens",
            "time to first token, ms",
            f"{1e3 * turn['seconds']:,.0f}",
            f"{1e3 * chat['plain_seconds']:,.0f}",
            f"{chat['speedup']:.0f}",
        ],
        [
            f"{system['requests']:.0f} requests, shared prefix of {system['system_tokens']:,.0f}",
            "requests per second",
            f"{system['requests_per_second']:.1f}",
            f"{system['plain_requests_per_second']:.2f}",
            f"{system['speedup']:.0f}",
        ],
    ]
    titles = ["", "figure", "prefix cache", "without", "speedup"]
    return table(rows, {title: itemgetter(place) for place, title in enumerate(titles)})


def long_prompt(result: Run) -> str:
    """Show a long prompt beside requests that decode, and alone."""
    columns: Columns = {
        "prompt tokens (per step)": lambda run: (
            f"{run['prompt_tokens']:,.0f} ({run['tokens_per_step']:.0f})"
        ),
        "rows": lambda run: f"{run['rows']:.0f}",
        "step, ms": lambda run: f"{run['step_ms']:.0f}",
        "chunk alone, ms": lambda run: f"{run['chunk_ms']:.0f}",
        "longest gap, ms": lambda run: f"{run['longest_gap_ms']:.0f}",
        "beyond the chunk, steps": lambda run: f"{run['steps_beyond_chunk']:.1f}",
        "in chunks, s": lambda run: f"{run['chunked_seconds']:.1f}",
        "whole, s": lambda run: f"{run['whole_seconds']:.1f}",
        "ratio": lambda run: f"{run['chunked_over_whole']:.2f}",
    }
    return table([run["long"] for run in fewest_threads(result["runs"])], columns)


TABLES: dict[str, Callable[[Run], str]] = {
    "convolution": convolution,
    "train": train,
    "loss": loss,
    "documents": documents,
    "memory": memory,
    "tokenizers": tokenizers,
    "load": load,
    "invariance": invariance,
    "step": step,
    "speculation": speculation,
    "prefixes": prefixes,
    "prefixes long": long_prompt,
}
