"""Tables of our engine and server beside llama.cpp and vLLM, from the result of `peers`."""

from collections.abc import Callable
from functools import partial

from benchmarks.recorded import Columns, Run, table

LABELS = {
    "ours": "ours, float32",
    "ours_bf16": "ours, bfloat16",
    "ours_int8": "ours, weights of 8 bits",
    "llama_cpp_f32": "llama.cpp, F32",
    "llama_cpp_bf16": "llama.cpp, BF16",
    "llama_cpp_q8_0": "llama.cpp, Q8_0",
    "vllm": "vLLM, float32",
    "vllm_bf16": "vLLM, bfloat16",
}


def decoding(result: Run) -> str:
    """Show tokens per second of each program, by context, at each batch."""
    runs = {
        (run["program"], run["batch"], run["context"]): run
        for run in result["runs"]
        if run["part"] == "decode"
    }

    def cell(context: int, row: tuple[int, str]) -> str:
        run = runs.get((row[1], row[0], context))
        return f"{run['tokens_per_second']:,.0f}" if run else "-"

    columns: Columns = {
        "tokens a second": lambda row: LABELS[row[1]],
        "batch": lambda row: str(row[0]),
    }
    for context in sorted({context for _, _, context in runs}):
        columns[f"after {context:,}"] = partial(cell, context)
    batches = sorted({batch for _, batch, _ in runs})
    return table([(batch, name) for batch in batches for name in present(result)], columns)


def alone(result: Run) -> str:
    """Show what a single sequence takes, by context: its prompt's prefill, cache and process."""
    runs = [run for run in result["runs"] if run.get("batch") == 1]
    columns: Columns = {
        "one sequence": lambda run: LABELS[run["program"]],
        "prompt": lambda run: f"{run['context']:,}",
        "prefill, tokens/s": lambda run: f"{run['context'] / run['prefill_seconds']:,.0f}",
        "cache, MiB": lambda run: f"{run['sequence_bytes'] / 2**20:,.1f}",
        "process, MiB": lambda run: f"{run['resident_mib']:,.0f}",
    }
    return table(runs, columns)


def serving(result: Run) -> str:
    """Show what servers do under many streams of mixed lengths."""
    runs = [run for run in result["runs"] if run["part"] == "serve"]
    columns: Columns = {
        "server": lambda run: LABELS[run["program"]],
        "streams": lambda run: str(run["clients"]),
        "new tokens/s": lambda run: f"{run['output_throughput']:,.0f}",
        "first token, median ms": lambda run: f"{run['p50_ttft_ms']:,.0f}",
        "between tokens, median ms": lambda run: f"{run['p50_itl_ms']:,.0f}",
        "processes, MiB": lambda run: f"{run['resident_mib']:,.0f}",
    }
    return table(runs, columns)


def present(result: Run) -> list[str]:
    """Return the programs of a result, in the order of the labels."""
    there = {run["program"] for run in result["runs"]}
    return [name for name in LABELS if name in there]


TABLES: dict[str, Callable[[Run], str]] = {
    "peers decoding": decoding,
    "peers alone": alone,
    "peers serving": serving,
}
