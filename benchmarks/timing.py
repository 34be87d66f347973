"""Times of calls: of a single one, and medians of several that take turns."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call, including the work that it starts on a GPU."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait until a GPU, if torch uses one, has finished its work."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def median_seconds(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each call, after a first one to warm up. Calls take turns, so
    that a busy machine slows all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(timed(call))
    return {name: statistics.median(times) for name, times in taken.items()}
