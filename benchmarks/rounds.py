"""Several candidates timed one after the other, several times over.

A machine that others use is now faster and now slower; what is to be compared should meet the same
of it. A run's figures are the medians of its rounds.
"""

import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from tqdm import tqdm

from benchmarks import heap
from benchmarks.costs import Costs
from benchmarks.decode_subjects import Subject
from benchmarks.energy import UNAVAILABLE, joules_counter
from benchmarks.operations import operations
from benchmarks.rates import Rates, mean_rates, measured_rates
from benchmarks.samples import Sample, mean_watts, merged, sampled, summary

SHARE_OF_MEMORY = 0.75
"""Of what is free, that a cache may take: filters and their spectra take some GiB besides."""
GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """A cache or a peer, in one setting."""

    setting: dict[str, Any]
    """The head of its runs."""
    begin: Callable[[], tuple[Subject, Costs]]
    end: Callable[[], object]
    """Gives memory back that the subject does not own."""
    whole: bool = False
    """Every step is timed."""


@dataclass(frozen=True)
class Round:
    """Of a candidate, with one number of threads."""

    samples: list[Sample]
    rates: list[Rates]
    """Measured before and after."""
    watts: float | None
    """While it steps, where the machine tells."""
    operations: int
    """Of torch, in a step."""
    costs: Costs


def timed_runs(
    candidates: Sequence[Candidate],
    threads: Sequence[int],
    num_rounds: int,
    most_bytes: float,
    progress: "tqdm[Any]",
) -> list[dict[str, Any]]:
    """For each candidate and number of threads milliseconds of a step on average, and what they are
    spent on; or that its cache is of more bytes."""
    fitting = [its for its in candidates if its.setting["cache_bytes"] <= most_bytes]
    progress.update(num_rounds * (len(candidates) - len(fitting)))
    rounds: list[list[list[Round]]] = []
    for _ in range(num_rounds):
        rounds.append([])
        for candidate in fitting:
            rounds[-1].append(list(one_round(candidate, threads)))
            progress.update()
    runs: list[dict[str, Any]] = []
    of_candidate = zip(*rounds, strict=True)
    for candidate in candidates:
        setting = candidate.setting
        if candidate not in fitting:
            runs.append(
                setting | {"not_run": f"does not fit: {setting['cache_bytes'] / GIB:.1f} GiB"}
            )
            continue
        for number, its in zip(threads, zip(*next(of_candidate), strict=True), strict=True):
            runs.append(setting | {"threads": number} | of_rounds(its, setting))
    for run in runs:
        tqdm.write(str({name: shown(value) for name, value in run.items()}), file=sys.stderr)
    return runs


def one_round(candidate: Candidate, threads: Sequence[int]) -> Iterator[Round]:
    """With each number of threads."""
    gc.collect()  # the subject before this one, of many gigabytes
    torch.cuda.empty_cache()
    heap.make_room(candidate.setting["cache_bytes"])
    torch.set_num_threads(max(threads))
    subject, costs = candidate.begin()
    batch, new_tokens, device, dtype = (
        candidate.setting[name] for name in ("batch", "new_tokens", "device", "dtype")
    )
    counter = joules_counter(device)
    gc.collect()
    gc.freeze()  # or a step in a hundred waits for a collection of all that was ever imported
    for number in threads:
        torch.set_num_threads(number)
        for _ in range(subject.warm_up_steps):
            subject.step()
        before = measured_rates(batch, device, getattr(torch, dtype))
        if candidate.whole:
            # The first token comes with the prompt, and after the last the batch is gone.
            left = new_tokens - 3 - subject.warm_up_steps  # and one is left to count operations of
            samples = [Sample(1.0, subject.step()) for _ in range(left)]
        else:
            samples = sampled(subject, new_tokens)
        num_operations = operations(subject.step)
        watts = mean_watts(subject, new_tokens, counter) if counter else None
        rates = [before, measured_rates(batch, device, getattr(torch, dtype))]
        yield Round(samples, rates, watts, num_operations, costs)
    gc.unfreeze()
    candidate.end()


def of_rounds(rounds: Sequence[Round], setting: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run."""
    run = summary(merged([its.samples for its in rounds]))
    run["step_ms_by_round"] = [summary(its.samples)["step_ms"] for its in rounds]
    batch = setting["batch"]
    run["tokens_per_second"] = 1e3 * batch / run["step_ms"]
    watts = [its.watts for its in rounds if its.watts is not None]
    joules = statistics.fmean(watts) * run["step_ms"] / 1e3 if watts else None
    run["joules_per_token"] = UNAVAILABLE if joules is None else joules / batch
    weight_bytes = getattr(torch, setting["dtype"]).itemsize * setting["parameters"]
    run |= rounds[0].costs.report(weight_bytes, batch)
    run["operations_per_step"] = rounds[0].operations
    run["rates"] = asdict(mean_rates([rates for its in rounds for rates in its.rates]))
    return run


def most_cache_bytes(device: str) -> float:
    """Of the memory that is free now, once there are models."""
    gc.collect()
    heap.give_back()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return SHARE_OF_MEMORY * free


def shown(value: Any) -> Any:
    """To three digits."""
    if isinstance(value, dict):
        return {name: shown(its) for name, its in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value
