"""The time of a long run from some of its steps."""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.decode_subjects import Subject

POSITIONS, STEPS_AT_EACH = 5, 9
PAGE_PAIR, BEFORE_PAGE_END = 64, 26


@dataclass(frozen=True)
class Sample:
    """A step."""

    weight: float
    """How many steps of a run it stands for."""
    figures: dict[str, float]
    """Milliseconds of it (`step`) and of its parts, and perhaps joules."""
    does: str = ""
    """Besides a step."""
    position: int | None = None
    """In new tokens, of one that does nothing besides."""


def sampled(subject: Subject, new_tokens: int, beside: Callable[[], None]) -> list[Sample]:
    """Steps spread over a run, and one of each kind of flush. `beside` is called as often as steps
    are looked at: a machine that others use is now faster and now slower."""
    flushes = []
    for does, position, count in subject.flushes():
        for _ in range(2):  # the first prepares the transforms of the filters
            subject.seek(position - 1)
            figures = subject.step()
        flushes.append(Sample(float(count), figures, does))
    num_plain = new_tokens - sum(flush.weight for flush in flushes)
    spread = range(0, max(1, new_tokens - PAGE_PAIR), max(1, new_tokens // POSITIONS))
    steps = []
    for number, start in enumerate(spread):
        # All over a page of 32 positions, but none ends within the next steps.
        position = start - start % PAGE_PAIR + 5 * number % BEFORE_PAGE_END
        subject.seek(position)
        subject.step()
        figures = medians([subject.step() for _ in range(STEPS_AT_EACH)])
        beside()
        steps.append(Sample(num_plain / len(spread), figures, position=position))
    return steps + flushes


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Means, quantiles and the largest step of a run."""
    total = sum(sample.weight for sample in samples)
    means = {
        name: sum(sample.weight * sample.figures[name] for sample in samples) / total
        for name in samples[0].figures
    }
    result: dict[str, Any] = {
        f"{name}_ms": mean for name, mean in means.items() if name != "joules"
    }
    for part in means.keys() & {"convolution", "outside"}:
        result[f"{part}_share"] = means[part] / means["step"]
    ordered = sorted(samples, key=lambda its: its.figures["step"])
    for name, share in {"median": 0.5, "p99": 0.99}.items():
        reached = itertools.accumulate(sample.weight for sample in ordered)
        place = next(i for i, sofar in enumerate(reached) if sofar >= share * total)
        result[f"{name}_step_ms"] = ordered[place].figures["step"]
    result["p99_over_median"] = result["p99_step_ms"] / result["median_step_ms"]
    result["largest_step_ms"] = ordered[-1].figures["step"]
    result["largest_step_does"] = ordered[-1].does or "nothing besides"
    result["step_ms_by_position"] = {
        its.position: its.figures["step"] for its in samples if its.position is not None
    }
    result["step_ms_by_flush"] = {its.does: its.figures["step"] for its in samples if its.does}
    if "joules" in means:
        result["joules_per_step"] = means["joules"]
    return result
