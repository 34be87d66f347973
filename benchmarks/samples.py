"""The time of a long run from some of its steps."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.decode_subjects import Subject

STEPS_AT_EACH = 3
LEAST_MS = 200
"""Of what is timed of each kind: short steps are timed more often."""
LEAST_MS_OF_JOULES = 3000
STEPS_LEFT = 3
"""Before a run's end, when the batch is gone."""
PAGE_PAIR = 64
PLACES = [16, 53, 3, 39, 25]
"""In pages of 64 positions, and so of 32: all over them, but none ends within the next steps."""


@dataclass(frozen=True)
class Sample:
    """A step."""

    weight: float
    """How many steps of a run it stands for."""
    figures: dict[str, float]
    """Milliseconds of it (`step`) and of its parts."""
    does: str = ""
    """Besides a step."""
    position: int | None = None
    """In new tokens, of one that does nothing besides."""


def sampled(subject: Subject, new_tokens: int) -> list[Sample]:
    """Steps in the middle of each fifth of a run, and one of each kind of flush."""
    subject.prepare_flushes()
    flushes = []
    for does, position, count in subject.flushes():
        figures = timed_at(subject, position - 1, 0, 1)
        flushes.append(Sample(float(count), figures, does))
    num_plain = new_tokens - sum(flush.weight for flush in flushes)
    steps = []
    for number, place in enumerate(PLACES):
        middle = (2 * number + 1) * new_tokens // (2 * len(PLACES))
        position = middle - middle % PAGE_PAIR + place
        position = max(0, min(position, new_tokens - STEPS_LEFT - STEPS_AT_EACH))
        figures = timed_at(subject, position, 1, STEPS_AT_EACH)
        steps.append(Sample(num_plain / len(PLACES), figures, position=position))
    return steps + flushes


def timed_at(subject: Subject, position: int, num_untimed: int, num_timed: int) -> dict[str, float]:
    """Steps from a position on, as often as it takes."""
    steps: list[dict[str, float]] = []
    while sum(step["step"] for step in steps) < LEAST_MS:
        subject.seek(position)
        for _ in range(num_untimed):
            subject.step()
        steps += [subject.step() for _ in range(num_timed)]
    return middle(steps)


def merged(rounds: Sequence[list[Sample]]) -> list[Sample]:
    """Of the same steps in several rounds, the middle of each one."""
    return [
        replace(its[0], figures=middle([sample.figures for sample in its]))
        for its in zip(*rounds, strict=True)
    ]


def middle(steps: list[dict[str, float]]) -> dict[str, float]:
    """The figures of the step that takes the median time, of two on average."""
    ordered = sorted(steps, key=lambda step: step["step"])
    its = ordered[(len(steps) - 1) // 2 : len(steps) // 2 + 1]
    return {name: statistics.fmean(step[name] for step in its) for name in steps[0]}


def mean_watts(subject: Subject, new_tokens: int, joules: Callable[[], float]) -> float:
    """Over steps on end from the middle of a run: a counter goes on in leaps of a tenth of a
    second, so that the joules of a single step may be those of what came before it."""
    num_steps, spent_ms = 0, 0.0
    subject.seek(new_tokens // 2)
    before = joules()
    while spent_ms < LEAST_MS_OF_JOULES and num_steps < new_tokens // 2 - STEPS_LEFT:
        spent_ms += subject.step()["step"]
        num_steps += 1
    return 1e3 * (joules() - before) / spent_ms


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Means, quantiles and the largest step of a run."""
    total = sum(sample.weight for sample in samples)
    means = {
        name: sum(sample.weight * sample.figures[name] for sample in samples) / total
        for name in samples[0].figures
    }
    result: dict[str, Any] = {f"{name}_ms": mean for name, mean in means.items()}
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
    return result
