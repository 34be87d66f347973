"""Claims about speed and memory, with bounds.

Each figure comes from a result of a benchmark: for the README from the recorded one, for `make
evidence-quick` from a new one. Both must be within the claim's bound, which allows for other
machines. `CLAIMS` are about ours; `comparisons` compares ours with others.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.recorded import Run, decoded, fewest_threads

BATCH, LENGTH = 8, 8192
"""Batch and new tokens of the claims about decoding."""
COMPARED = ["llama", "mamba2", "rwkv", "s4"]
"""Models that ours is compared with."""
CURVES = ["ours", "continuous", "epoched", "flashinference", "naive", *COMPARED]


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
