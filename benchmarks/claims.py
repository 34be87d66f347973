"""Claims about speed and memory, with bounds.

The README compares ours with the best of others in `COMPARISONS`; `CLAIMS` are about ours. Each
figure comes from a result of a benchmark: for the README from the recorded one, for `make
evidence-quick` from a new one. Both must be within the claim's bound, which allows for other
machines.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import fmean

from benchmarks import decoding_tables, peers_tables, quality_tables, train_serve_tables
from benchmarks.recorded import Columns, Run, decoded, fewest_threads, table

BATCH, LENGTH = 8, 8192
"""Batch and new tokens of the claims about decoding."""
CONTEXT = 2048
"""Prompt tokens of comparisons with programs."""
COMPARED = ["llama", "mamba2", "rwkv", "s4"]
"""Models that ours is compared with."""
CURVES = ["ours", "continuous", "epoched", "flashinference", "naive", *COMPARED]
LABELS = (
    quality_tables.LABELS
    | decoding_tables.LABELS
    | peers_tables.LABELS
    | train_serve_tables.VARIANTS
)
FORMATS = {
    32: ("ours", "llama_cpp_f32", "vllm"),
    16: ("ours_bf16", "llama_cpp_bf16", "vllm_bf16"),
    8: ("ours_int8", "llama_cpp_q8_0"),
}
"""Programs by the bits of their weights."""
PROGRAMS = tuple(chain(*FORMATS.values()))
OURS = "ours", "ours_bf16", "ours_int8", "stu", "hybrid"
"""Names of ours in results; all others are peers."""
Figures = Callable[[Run], Mapping[str, float]]
"""Takes the figures of ours and of others from a result."""


@dataclass(frozen=True)
class Claim:
    """A figure and its bound."""

    text: str
    benchmark: str
    figure: Callable[[Run], float]
    """Takes the figure from a result. Raises KeyError if it is not there."""
    at_least: float | None = None
    at_most: float | None = None

    def bound(self) -> str:
        """Return the bound in words."""
        if self.at_most is None:
            return f"at least {self.at_least:g}"
        return f"at most {self.at_most:g}"

    def holds(self, figure: float) -> bool:
        """Return whether a figure is within the bound."""
        above = self.at_least is None or figure >= self.at_least
        return above and (self.at_most is None or figure <= self.at_most)


@dataclass(frozen=True)
class Comparison:
    """Ours beside the best of others in what a user does."""

    text: str
    benchmark: str
    figures: Figures
    at_least: float
    """Bound of the ratio."""
    less_is_better: bool = False

    def best(self, result: Run, ours: bool) -> tuple[float, str]:
        """Return figure and name of the best of ours, or of the others. Raises KeyError without
        any of ours, IndexError without others."""
        figures = self.figures(result)
        found = [(own, name) for name, own in figures.items() if (name in OURS) == ours]
        if ours and not found:
            raise KeyError(self.text)
        return sorted(found, reverse=not self.less_is_better)[0]

    def ratio(self, result: Run) -> float:
        """Return how many times as good ours is. Raises KeyError without any of ours, IndexError
        without others."""
        (own, _), (other, _) = (self.best(result, ours) for ours in (True, False))
        return other / own if self.less_is_better else own / other

    def claim(self) -> Claim:
        """Return the claim about the ratio."""
        return Claim(
            f"{self.text}: ratio to the best peer", self.benchmark, self.ratio, self.at_least
        )


def first(result: Run) -> Run:
    """Return the first run with the lowest number of threads."""
    return fewest_threads(result["runs"])[0]


def ratio(cache: str, name: str) -> Callable[[Run], float]:
    """Return a function that takes a ratio to our cache from a result of `decode`."""
    return lambda result: float(decoded(result, BATCH, LENGTH)[cache][name])


CLAIMS = [
    Claim(
        f"decoding {BATCH} x {LENGTH:,} tokens, convolution only: speedup over direct sums",
        "decode",
        ratio("naive", "convolution_over_ours"),
        at_least=15,
    ),
    Claim(
        "the same, whole step: speedup over direct sums",
        "decode",
        ratio("naive", "step_over_ours"),
        at_least=1.25,
    ),
    Claim(
        "the same, convolution only: speedup over epoched FutureFill",
        "decode",
        ratio("epoched", "convolution_over_ours"),
        at_least=2,
    ),
    Claim(
        "cost model of decoding: largest error over five caches and four models",
        "model",
        lambda result: max(result["largest_error"][name] for name in CURVES),
        at_most=0.2,
    ),
    Claim(
        "training at 2,048 tokens, convolution only: speedup over two branches",
        "convolution",
        lambda result: first(result)["training"][0]["ratio"],
        at_least=3,
    ),
    Claim(
        "loss at a vocabulary of 200,064: memory of full logits over ours",
        "loss",
        lambda result: min(run["memory_ratio"] for run in result["runs"]),
        at_least=5,
    ),
    Claim(
        "the same: speed over that with full logits",
        "loss",
        lambda result: min(run["speed_ratio"] for run in result["runs"]),
        at_least=0.9,
    ),
    Claim(
        "stu-plan: largest relative error of planned memory",
        "memory",
        lambda result: max(abs(run["planned_over_measured"] - 1) for run in result["runs"]),
        at_most=0.1,
    ),
    Claim(
        "serving 64 streams: overhead as a share of the engine's speed",
        "load",
        lambda result: first(result)["overhead_share"],
        at_most=0.15,
    ),
]


def programs(
    part: str, names: Sequence[str], figure: Callable[[Run], float], **setting: int
) -> Figures:
    """Return a function that takes a figure of some programs from a result of `peers`."""
    wanted = {"part": part, **setting}.items()
    return lambda result: {
        run["program"]: figure(run)
        for run in result["runs"]
        if run["program"] in names and wanted <= run.items()
    }


def recurrent(figure: Callable[[Run], float], batch: int) -> Figures:
    """Return a function that takes a figure of ours and of models without attention from a result
    of `decode`."""
    names = "ours", "mamba2", "rwkv", "s4"
    return lambda result: {
        name: figure(run) for name, run in decoded(result, batch, LENGTH).items() if name in names
    }


def speed(run: Run) -> float:
    """Return tokens per second."""
    return float(run["tokens_per_second"])


def trained(result: Run) -> dict[str, float]:
    """Return tokens per second of ways to train."""
    ways = first(result)["ways"]
    names = "stu", "stu_two_branch", "attention_sdpa", "attention_windowed"
    return {name: speed(ways[name]) for name in names}


def learned(result: Run) -> dict[str, float]:
    """Return the mean bits per byte of each layout in the setting that rates were tuned in."""
    setting = "code", 512, "adamw"
    bits = {
        layout: quality_tables.bits_per_byte(quality_tables.by_seed(result, setting, layout))
        for layout in quality_tables.LABELS
    }
    return {layout: fmean(values) for layout, values in bits.items() if values}


COMPARISONS = [
    *(
        Comparison(
            f"decode 1 sequence at a context of {CONTEXT:,}, {bits}-bit weights, tokens/s",
            "peers",
            programs("decode", names, speed, batch=1, context=CONTEXT),
            0.9,
        )
        for bits, names in FORMATS.items()
    ),
    Comparison(
        f"decode 32 sequences at a context of {CONTEXT:,}, best format of each, tokens/s",
        "peers",
        programs("decode", PROGRAMS, speed, batch=32, context=CONTEXT),
        1.5,
    ),
    Comparison(
        f"prefill a prompt of {CONTEXT:,} tokens, best format of each, tokens/s",
        "peers",
        programs(
            "decode", PROGRAMS, lambda run: run["context"] / run["prefill_seconds"],
            batch=1, context=CONTEXT,
        ),
        0.9,
    ),
    Comparison(
        "serve 64 streams of mixed lengths, best format of each, tokens/s",
        "peers",
        programs("serve", PROGRAMS, lambda run: float(run["output_throughput"]), clients=64),
        1.5,
    ),
    Comparison(
        f"decode {BATCH} sequences of {LENGTH:,} tokens, peers without attention, tokens/s",
        "decode",
        recurrent(speed, BATCH),
        0.8,
    ),
    Comparison(
        "cache of one of these sequences, MiB (less is better)",
        "decode",
        recurrent(lambda run: run["cache_bytes"] / BATCH / 2**20, BATCH),
        0.02,
        less_is_better=True,
    ),
    Comparison("train on sequences of 2,048 tokens, tokens/s", "train", trained, 1.0),
    Comparison(
        "bits per byte of code after the same tokens, context 512 (less is better)",
        "quality",
        learned,
        0.97,
        less_is_better=True,
    ),
]  # fmt: skip


def comparisons(results: Mapping[str, Run]) -> str:
    """Return the table of the README."""

    def cell(ours: bool, row: Comparison) -> str:
        figure, name = row.best(results[row.benchmark], ours)
        return f"{shown(figure)}, {LABELS[name]}".replace(", ours", "").replace(", STU", "")

    def made(row: Comparison) -> str:
        machine = results[row.benchmark]["machine"]
        return f"{machine['date'].split('T')[0]}, {machine['commit'][:7]}"

    columns: Columns = {
        "task": lambda row: row.text,
        "stu": partial(cell, True),
        "best peer": partial(cell, False),
        "ratio": lambda row: times(row, results[row.benchmark]),
        "`python -m benchmarks`": lambda row: f"`{row.benchmark}`, {made(row)}",
    }
    return table(COMPARISONS, columns)


def times(row: Comparison, result: Run) -> str:
    """Return the ratio of ours to the best peer, and say so if the peer is better."""
    ratio = row.ratio(result)
    return f"{shown(ratio)} (peer is better)" if round(ratio, 3) < 1 else shown(ratio)


def shown(figure: float) -> str:
    """Return a figure with three digits."""
    return f"{figure:,.0f}" if figure >= 999.5 else f"{figure:.3g}"
