"""Tables of our engine and server beside llama.cpp and vLLM, from the result of `peers`."""

from collections.abc import Callable
from functools import partial
from statistics import median

from benchmarks.recorded import Columns, Run, shown, table

LABELS = {
    "ours": "ours, float32",
    "ours_bf16": "ours, bfloat16",
    "ours_int8": "ours, int8",
    "llama_cpp_f32": "llama.cpp, F32",
    "llama_cpp_bf16": "llama.cpp, BF16",
    "llama_cpp_q8_0": "llama.cpp, Q8_0",
    "vllm": "vLLM, float32",
    "vllm_bf16": "vLLM, bfloat16",
    "vllm_int8": "vLLM, int8",
}


def decoding(result: Run) -> str:
    """Show tokens per second of each program, by context, at each batch."""
    runs = [run for run in result["runs"] if run["part"] == "decode"]
    contexts = sorted({run["context"] for run in runs})

    def speeds(batch: int, name: str) -> str:
        found = {
            run["context"]: f"{median(run['speed_by_round'].values()):,.0f}"
            for run in runs
            if (run["program"], run["batch"]) == (name, batch)
        }
        return " / ".join(found.get(context, "-") for context in contexts)

    title = f"tokens per second after {' / '.join(f'{context:,}' for context in contexts)} tokens"
    columns: Columns = {title: LABELS.__getitem__}
    for batch in sorted({run["batch"] for run in runs}):
        columns[f"batch {batch}"] = partial(speeds, batch)
    return table(present(result), columns)


def alone(result: Run) -> str:
    """Show what a single sequence takes, by context: its prompt's prefill, cache and process."""
    runs = [run for run in result["runs"] if run.get("batch") == 1]
    contexts = sorted({run["context"] for run in runs})

    def joined(figure: Callable[[Run], str], name: str) -> str:
        found = {run["context"]: figure(run) for run in runs if run["program"] == name}
        return " / ".join(found.get(context, "-") for context in contexts)

    title = f"a prompt of {' / '.join(f'{context:,}' for context in contexts)} tokens"
    columns: Columns = {
        title: LABELS.__getitem__,
        "prefill, tokens/s": partial(
            joined, lambda run: f"{run['context'] / run['prefill_seconds']:,.0f}"
        ),
        "cache, MiB": partial(joined, lambda run: shown(run["sequence_bytes"] / 2**20)),
        "resident memory, MiB": partial(joined, lambda run: f"{run['resident_mib']:,.0f}"),
    }
    return table(present(result), columns)


def serving(result: Run) -> str:
    """Show what servers do under many streams of mixed lengths."""
    runs = [run for run in result["runs"] if run["part"] == "serve"]
    columns: Columns = {
        "server": lambda run: LABELS[run["program"]],
        "concurrent streams": lambda run: str(run["clients"]),
        "new tokens/s": lambda run: f"{median(run['speed_by_round'].values()):,.0f}",
        "time to first token, median ms": lambda run: f"{run['p50_ttft_ms']:,.0f}",
        "inter-token latency, median ms": lambda run: f"{run['p50_itl_ms']:,.0f}",
        "resident memory, MiB": lambda run: f"{run['resident_mib']:,.0f}",
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
