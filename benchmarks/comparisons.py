"""The README's table: ours beside the best of others in what a user does.

Each ratio is a claim with a bound, as those of `claims` are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter
from statistics import fmean, median

from benchmarks import decoding_tables, peers_tables, quality_tables, train_serve_tables
from benchmarks.claims import BATCH, LENGTH, Claim, first
from benchmarks.recorded import Columns, Run, commits, decoded, processor, shown, table

CONTEXT = 2048
"""Prompt tokens of comparisons with programs."""
LABELS = (
    quality_tables.LABELS
    | decoding_tables.LABELS
    | peers_tables.LABELS
    | train_serve_tables.VARIANTS
)
FORMATS = {
    32: ("ours", "llama_cpp_f32", "vllm"),
    16: ("ours_bf16", "llama_cpp_bf16", "vllm_bf16"),
    8: ("ours_int8", "llama_cpp_q8_0", "vllm_int8"),
}
"""Programs by the bits of their weights."""
PROGRAMS = tuple(chain(*FORMATS.values()))
FASTEST = "llama_cpp_q8_0", "vllm_int8"
"""The fastest format of each peer with many sequences."""
SLOWER = ("vllm",)
"""Programs that others of as many bits are ahead of, which `make evidence-quick` leaves out."""
RECURRENT = "mamba2", "rwkv", "s4"
TRAINED = "stu_two_branch", "attention_sdpa", "attention_windowed"
"""Ways to train that ours is compared with."""
OURS = "ours", "ours_bf16", "ours_int8", "stu", "hybrid"
"""Names of ours in results; all others are peers."""
Figures = Callable[[Run], Mapping[str, Mapping[str, float]]]
"""Takes the figures of ours and of others from a result, by round."""


@dataclass(frozen=True)
class Comparison:
    """Ours beside the best of others in what a user does."""

    text: str
    benchmark: str
    figures: Figures
    at_least: float
    """Bound of the ratio."""
    peers: tuple[str, ...]
    """Peers one of which is the best; without any of them, the best is not known."""
    less_is_better: bool = False

    def missing(self, result: Run) -> list[str]:
        """Return the peers that a result lacks."""
        found = self.figures(result)
        return [name for name in self.peers if name not in found]

    def best(self, result: Run, ours: bool) -> tuple[float, str]:
        """Return median figure and name of the best of ours, or of the others. Raises KeyError
        without any of ours, IndexError without others."""
        figures = self.figures(result).items()
        found = [(median(own.values()), name) for name, own in figures if (name in OURS) == ours]
        if ours and not found:
            raise KeyError(self.text)
        return sorted(found, reverse=not self.less_is_better)[0]

    def ratio(self, result: Run) -> float:
        """Return how many times as good ours is as the best other. Raises KeyError, IndexError."""
        (own, _), (other, _) = (self.best(result, ours) for ours in (True, False))
        return self._ratio(own, other)

    def ratios(self, result: Run) -> list[float]:
        """Return the ratio of each round in which both were measured."""
        figures = self.figures(result)
        own, other = (figures[self.best(result, ours)[1]] for ours in (True, False))
        return [self._ratio(own[turn], other[turn]) for turn in own.keys() & other.keys()]

    def _ratio(self, own: float, other: float) -> float:
        return other / own if self.less_is_better else own / other

    def claim(self) -> Claim:
        """Return the claim about the ratio."""
        return Claim(
            f"{self.text}: ratio to the best peer", self.benchmark, self.ratio, self.at_least
        )


def programs(
    part: str,
    names: Sequence[str],
    figures: Callable[[Run], Mapping[str, float]] = itemgetter("speed_by_round"),
    **setting: int,
) -> Figures:
    """Return a function that takes a figure of some programs from a result of `peers`."""
    wanted = {"part": part, **setting}.items()
    return lambda result: {
        run["program"]: figures(run)
        for run in result["runs"]
        if run["program"] in names and wanted <= run.items()
    }


def recurrent(figures: Callable[[Run], Sequence[float]], batch: int) -> Figures:
    """Return a function that takes a figure of ours and of models without attention from a result
    of `decode`."""
    return lambda result: {
        name: numbered(figures(run))
        for name, run in decoded(result, batch, LENGTH).items()
        if name in ("ours", *RECURRENT) and "not_run" not in run
    }


def speeds(run: Run) -> list[float]:
    """Return tokens per second of each round."""
    return [1e3 * run["batch"] / step_ms for step_ms in run["step_ms_by_round"]]


def numbered(figures: Sequence[float]) -> dict[str, float]:
    """Return figures by round."""
    return {str(turn): figure for turn, figure in enumerate(figures)}


def trained(result: Run) -> dict[str, dict[str, float]]:
    """Return tokens per second of ways to train."""
    ways = first(result)["ways"]
    return {name: numbered([float(ways[name]["tokens_per_second"])]) for name in ("stu", *TRAINED)}


def learned(result: Run) -> dict[str, dict[str, float]]:
    """Return the mean bits per byte of each layout on code, at a context of 512."""
    setting = "code", 512, "adamw"
    bits = {
        layout: quality_tables.bits_per_byte(quality_tables.by_seed(result, setting, layout))
        for layout in quality_tables.LABELS
    }
    return {layout: numbered([fmean(values)]) for layout, values in bits.items() if values}


COMPARISONS = [
    *(
        Comparison(
            f"decode 1 sequence at a context of {CONTEXT:,}, {bits}-bit weights, tokens/s",
            "peers",
            programs("decode", names, batch=1, context=CONTEXT),
            0.9,
            tuple(name for name in names[1:] if name not in SLOWER),
        )
        for bits, names in FORMATS.items()
    ),
    Comparison(
        f"decode 32 sequences at a context of {CONTEXT:,}, best format of each, tokens/s",
        "peers",
        programs("decode", PROGRAMS, batch=32, context=CONTEXT),
        1.5,
        FASTEST,
    ),
    Comparison(
        f"prefill a prompt of {CONTEXT:,} tokens, best format of each, tokens/s",
        "peers",
        programs(
            "decode",
            PROGRAMS,
            lambda run: numbered([run["context"] / run["prefill_seconds"]]),
            batch=1,
            context=CONTEXT,
        ),
        0.9,
        FASTEST,
    ),
    Comparison(
        "serve 64 streams of mixed lengths, best format of each, tokens/s",
        "peers",
        programs("serve", PROGRAMS, clients=64),
        0.9,
        ("vllm_int8",),
    ),
    Comparison(
        f"decode {BATCH} sequences of {LENGTH:,} tokens, peers without attention, tokens/s",
        "decode",
        recurrent(speeds, BATCH),
        0.8,
        RECURRENT,
    ),
    Comparison(
        "cache of one of these sequences, MiB (less is better)",
        "decode",
        recurrent(lambda run: [run["cache_bytes"] / BATCH / 2**20], BATCH),
        0.02,
        RECURRENT,
        less_is_better=True,
    ),
    Comparison("train on sequences of 2,048 tokens, tokens/s", "train", trained, 1.0, TRAINED),
    Comparison(
        "bits per byte of code after the same tokens, context 512 (less is better)",
        "quality",
        learned,
        0.97,
        ("hyena", "rope"),
        less_is_better=True,
    ),
]


def comparisons(results: Mapping[str, Run]) -> str:
    """Return the table of the README."""

    def cell(ours: bool, row: Comparison) -> str:
        figure, name = row.best(results[row.benchmark], ours)
        return f"{shown(figure)}, {LABELS[name]}".replace(", ours", "").replace(", STU", "")

    def made(row: Comparison) -> str:
        result = results[row.benchmark]
        machine, all_commits = result["machine"], commits(result)
        between = " to ".join(dict.fromkeys([all_commits[0], all_commits[-1]]))
        return f"{processor(machine)}, {machine['date'].split('T')[0]}, {between}"

    columns: Columns = {
        "task": lambda row: row.text,
        "stu": partial(cell, True),
        "best peer": partial(cell, False),
        "ratio": lambda row: times(row, results[row.benchmark]),
        "`python -m benchmarks`": lambda row: f"`{row.benchmark}`, {made(row)}",
    }
    return table(COMPARISONS, columns)


def times(row: Comparison, result: Run) -> str:
    """Return the ratio of ours to the best peer with its range over rounds, and say so if the peer
    is better."""
    ratio, each = row.ratio(result), row.ratios(result)
    notes = [f"{shown(min(each))} to {shown(max(each))}"] if len(each) > 1 else []
    notes += ["peer is better"] if round(ratio, 3) < 1 else []
    return f"{shown(ratio)} ({', '.join(notes)})" if notes else shown(ratio)
