"""What the README claims of speed and memory, and how far each claim goes.

A claim's figure is taken from a result of `benchmarks`: for the README from the recorded one
(`benchmarks/results`), for `make evidence-quick` from one that is made anew. Both must be within
the claim's bound, which allows for other machines.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.choice import Run, decoded, fewest_threads
from benchmarks.cli import CACHES
from benchmarks.markdown import table

BATCH, LENGTH = 8, 8192
"""Of the decoding claims: long enough for convolutions to count, short enough to measure soon."""
COMPARED = ["llama", "mamba2", "rwkv", "s4"]
"""Models that ours is compared with."""


@dataclass(frozen=True)
class Claim:
    """One figure."""

    text: str
    """What it is."""
    benchmark: str
    figure: Callable[[Run], float]
    at_least: float | None = None
    at_most: float | None = None

    def bound(self) -> str:
        """In words."""
        return (
            f"at least {self.at_least:g}" if self.at_most is None else f"at most {self.at_most:g}"
        )

    def holds(self, figure: float) -> bool:
        """Whether it is within the bound."""
        above = self.at_least is None or figure >= self.at_least
        return above and (self.at_most is None or figure <= self.at_most)


CLAIMS = [
    Claim(
        f"decoding {BATCH} x {LENGTH:,} tokens, convolution alone: time of direct sums over ours",
        "decode",
        lambda its: decoded(its, BATCH, LENGTH)["naive"]["convolution_over_paged"],
        at_least=15,
    ),
    Claim(
        "the same, whole step",
        "decode",
        lambda its: decoded(its, BATCH, LENGTH)["naive"]["step_over_paged"],
        at_least=1.25,
    ),
    Claim(
        "the same, convolution alone: epoched FutureFill over ours",
        "decode",
        lambda its: decoded(its, BATCH, LENGTH)["epoched"]["convolution_over_paged"],
        at_least=2,
    ),
    Claim(
        "cost model of decoding: largest error of any curve, of five caches and four models",
        "model",
        lambda its: max(its["largest_error"][name] for name in [*CACHES, *COMPARED]),
        at_most=0.2,
    ),
    Claim(
        "training at 2,048 tokens, convolution alone: two branches over ours",
        "convolution",
        lambda its: fewest_threads(its["runs"])[0]["training"][0]["ratio"],
        at_least=3,
    ),
    Claim(
        "training at 2,048 tokens, whole step: the two-branch model's time over ours",
        "train",
        lambda its: fewest_threads(its["runs"])[0]["ratios"]["stu_over_two_branch"],
        at_least=1.2,
    ),
    Claim(
        "loss at a vocabulary of 200,064: memory of whole logits over ours",
        "loss",
        lambda its: min(run["memory_ratio"] for run in its["runs"]),
        at_least=5,
    ),
    Claim(
        "the same, its speed over that with whole logits",
        "loss",
        lambda its: min(run["speed_ratio"] for run in its["runs"]),
        at_least=0.9,
    ),
    Claim(
        "stu-plan: how far planned memory is from measured, at most",
        "memory",
        lambda its: max(abs(run["planned_over_measured"] - 1) for run in its["runs"]),
        at_most=0.1,
    ),
    Claim(
        "serving 64 streams: share of the engine's speed that is lost",
        "load",
        lambda its: fewest_threads(its["runs"])[0]["overhead_share"],
        at_most=0.15,
    ),
]


def claims(results: Mapping[str, Run]) -> str:
    """The table of the README."""
    rows = []
    for claim in CLAIMS:
        result = results[claim.benchmark]
        day, commit = result["machine"]["date"].split("T")[0], result["machine"]["commit"][:7]
        made = f"{claim.benchmark}, {day}, {commit}"
        rows.append([claim.text, shown(claim.figure(result)), claim.bound(), made])
    return table(["claim", "measured", "holds if", "by `benchmarks`, on, at"], rows)


def shown(figure: float) -> str:
    """To three digits."""
    return f"{figure:.3g}"


def recorded(folder: Path) -> dict[str, Run]:
    """All results of a folder, by benchmark."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")
    }
