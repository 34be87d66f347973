"""Times of long runs, estimated from a sample of their steps.

A run of 32,768 tokens by direct sums takes hours. So only steps in the middle of each fifth of a
run are timed, and a few of each kind of flush; the time of the run is their sum, each weighted by
how often it occurs. A shared machine is faster at some times than at others, so candidates take
turns for several rounds, and the figures of a run are the medians of its rounds.
"""

import gc
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil
import torch
from tqdm import tqdm

from benchmarks.decoding.caches import Flush
from benchmarks.decoding.counting import report
from benchmarks.decoding.rates import Meter, Rates, mean_rates, median_rates, operations
from benchmarks.decoding.subjects import Subject
from benchmarks.peers.peer import FLOAT_BYTES
from benchmarks.process_memory import return_freed_memory

TIMED_STEPS = 6
"""Timed steps in the middle of a fifth, after one that is counted."""
PASSES = TIMED_STEPS // 2
"""Measurements of the machine's rates beside the steps of a fifth."""
PAGE_PAIR = 64
PLACES = [12, 53, 2, 38, 22]
"""First steps in pages of 64 positions, and so of 32: spread over them, and neither the timed steps
nor the one after them end a page."""
LEAST_NEW_TOKENS = len(PLACES) * PAGE_PAIR
SHARE_OF_MEMORY = 0.75
"""Share of the free memory that a cache may take; filters and spectra take a few GiB more."""
GIB = 2**30


@dataclass(frozen=True)
class Sample:
    """One kind of step."""

    weight: float
    """Number of steps of this kind in a run."""
    figures: dict[str, float]
    """Milliseconds of the `step`, and of its parts."""
    does: str = ""
    """Work of the step beyond decoding a token."""
    counts: Counter[str] = field(default_factory=Counter)
    """Counts of the work in such a step's operations."""


@dataclass(frozen=True)
class Candidate:
    """A cache or a peer, in one setting."""

    setting: dict[str, Any]
    """First fields of its run in the results."""
    begin: Callable[[], Subject]
    end: Callable[[], object] = lambda: None
    """Frees memory that the subject does not own."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of the batch."""
        return int(self.setting["cache_bytes"])


@dataclass(frozen=True)
class Round:
    """Measurements of a candidate in one round."""

    samples: list[Sample]
    rates: list[Rates]
    """Rates in the middle of each fifth of the run."""
    operations: int
    """Operations of torch in a step, if they were counted."""


def timed_runs(
    candidates: Sequence[Candidate], num_rounds: int, max_bytes: float, progress: "tqdm[Any]"
) -> list[dict[str, Any]]:
    """Return a run for each candidate, or a note that a cache is larger than `max_bytes`."""
    fitting = [i for i, candidate in enumerate(candidates) if candidate.cache_bytes <= max_bytes]
    progress.update(num_rounds * (len(candidates) - len(fitting)))
    rounds: dict[int, list[Round]] = {number: [] for number in fitting}
    for turn in range(num_rounds):
        for number in fitting:
            rounds[number].append(one_round(candidates[number], counts=turn == 0))
            progress.update()
    runs = []
    for number, candidate in enumerate(candidates):
        if number in rounds:
            run = candidate.setting | figures(rounds[number], candidate)
            tqdm.write(f"{run['cache']}: {run['step_ms']:.3g} ms a step", file=sys.stderr)
        else:
            size = candidate.cache_bytes / GIB
            run = candidate.setting | {"not_run": f"does not fit: {size:.1f} GiB"}
        runs.append(run)
    return runs


def one_round(candidate: Candidate, counts: bool) -> Round:
    """Measure a candidate once. counts: Count operations too, which are the same in each round."""
    return_freed_memory()
    setting = candidate.setting
    subject = candidate.begin()
    gc.collect()
    gc.freeze()  # without it, one step in a hundred waits for a collection of all modules
    meter, rates = Meter(setting["batch"]), list[Rates]()
    samples = sampled(subject, setting["new_tokens"], lambda: rates.append(meter.rates()), counts)
    num_operations = operations(subject.step) if counts else 0
    gc.unfreeze()
    candidate.end()
    by_place = [rates[i : i + PASSES] for i in range(0, len(rates), PASSES)]
    return Round(samples, [median_rates(place) for place in by_place], num_operations)


def sampled(
    subject: Subject,
    new_tokens: int,
    between: Callable[[], None] = lambda: None,
    counts_too: bool = True,
) -> list[Sample]:
    """Time steps in the middle of each fifth of a run, and some of each kind of flush.

    between: Called after every pair of steps in the middle of a fifth.
    counts_too: Count the operations of a step of each kind.
    """
    flushes = subject.flushes()
    num_plain = (new_tokens - sum(flush.count for flush in flushes)) / len(PLACES)
    visits = [(end, False, flush) for flush in flushes for end in flush.positions]
    visits += [(flush.counted_at, True, flush) for flush in flushes if counts_too]
    for number, place in enumerate(PLACES):
        middle = (2 * number + 1) * new_tokens // (2 * len(PLACES))
        first = middle - middle % PAGE_PAIR + place + 1
        visits.append((first, False, Flush("", [first], num_plain, first)))
    steps: dict[tuple[str, int], list[dict[str, float]]] = {}
    counts: dict[tuple[str, int], Counter[str]] = {}
    for end, counts_only, kind in sorted(visits, key=lambda visit: visit[:2]):
        key = kind.does, kind.counted_at
        subject.seek(end - 1)
        if counts_only or (counts_too and not kind.does):
            counts[key] = subject.count()
        elif not kind.does:
            subject.step()
        if not counts_only:
            timed = steps.setdefault(key, [])
            for number in range(1 if kind.does else TIMED_STEPS):
                timed.append(subject.step())
                if number % 2:
                    between()
    weights = {(kind.does, kind.counted_at): kind.count for _, _, kind in visits}
    return [
        Sample(weights[key], middle_step(timed), key[0], counts.get(key, Counter()))
        for key, timed in steps.items()
    ]


def middle_step(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the figures of the step with the median time, or the means of the middle two."""
    ordered = sorted(steps, key=lambda step: step["step"])
    middle = ordered[(len(steps) - 1) // 2 : len(steps) // 2 + 1]
    return {name: statistics.fmean(step[name] for step in middle) for name in steps[0]}


def merged(rounds: Sequence[list[Sample]]) -> list[Sample]:
    """Return the medians of the same samples in several rounds."""
    return [
        replace(several[0], figures=middle_step([sample.figures for sample in several]))
        for several in zip(*rounds, strict=True)
    ]


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Return the means and the longest step of a run."""
    total = sum(sample.weight for sample in samples)
    means = {
        name: sum(sample.weight * sample.figures[name] for sample in samples) / total
        for name in samples[0].figures
    }
    result: dict[str, Any] = {f"{name}_ms": mean for name, mean in means.items()}
    if "convolution" in means:
        result["convolution_share"] = means["convolution"] / means["step"]
    longest = max(samples, key=lambda sample: sample.figures["step"])
    result["largest_step_ms"] = longest.figures["step"]
    result["largest_step_does"] = longest.does or "nothing besides"
    return result


def mean_counts(samples: Sequence[Sample]) -> Counter[str]:
    """Return what the operations of a step do on average."""
    total = sum(sample.weight for sample in samples)
    counts: Counter[str] = Counter()
    for sample in samples:
        for name, count in sample.counts.items():
            counts[name] += sample.weight * count / total  # type: ignore[assignment]
    return counts


def figures(rounds: Sequence[Round], candidate: Candidate) -> dict[str, Any]:
    """Return the figures of a run."""
    setting = candidate.setting
    run = {"threads": torch.get_num_threads()} | summary(merged([turn.samples for turn in rounds]))
    run["step_ms_by_round"] = [summary(turn.samples)["step_ms"] for turn in rounds]
    run["tokens_per_second"] = 1e3 * setting["batch"] / run["step_ms"]
    number_bytes = 1 if setting.get("weights") == "int8" else FLOAT_BYTES
    weight_bytes = number_bytes * setting["parameters"]
    run |= report(mean_counts(rounds[0].samples), setting["batch"], weight_bytes)
    run["operations_per_step"] = rounds[0].operations
    by_place = zip(*(turn.rates for turn in rounds), strict=True)
    run["rates"] = asdict(mean_rates([median_rates(several) for several in by_place]))
    return run


def max_cache_bytes() -> float:
    """Return the share of the free memory that a cache may take, once there are models."""
    return_freed_memory()
    return SHARE_OF_MEMORY * float(psutil.virtual_memory().available)
