"""`python -m benchmarks realisation`: states of a model's filters, and what they take to compute.

The filters are those of the tensordot form, rounded to float32 as models have them, and mixed by
random weights. Seconds are those of one processor, whatever else it does; memory is what the
process takes at most beyond what it had, the result included.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jsonargparse.typing import PositiveInt

from benchmarks.machine import describe
from benchmarks.process_memory import peak_gib
from stu.filters import hankel_eigenpairs
from stu.realisation import fitting_realisation

Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    max_seq_len: tuple[PositiveInt, ...] = (1024, 8192, 32768, 131072, 1048576)
    """Contexts, in tokens."""
    filters: PositiveInt = 24
    """Spectral filters."""
    width: PositiveInt = 1024
    """Channels of a layer."""
    layers: PositiveInt = 8
    """Layers that share the state's rates."""


def measure(options: Options) -> dict[str, Any]:
    """Return the rank of each context's state, its errors, and what it took."""
    return {"machine": describe(), "runs": [run(n, options) for n in options.max_seq_len]}


def run(length: int, options: Options) -> dict[str, Any]:
    """Compute the filters of a context and their state."""
    (values, vectors), costs = timed("filters", lambda: hankel_eigenpairs(length, options.filters))
    basis = torch.from_numpy(values**0.25 * vectors)[::2].float().double()  # [N, K]
    torch.manual_seed(0)
    shape = options.filters, options.width
    weights = [torch.randn(shape, dtype=torch.float64) for _ in range(options.layers)]
    (found, error), own = timed("state", lambda: fitting_realisation(basis, weights, torch.float32))
    of_filters = np.abs(found.errors).max(0) / basis.abs().amax(0).numpy()
    errors = {"filter_error": float(of_filters.max()), "channel_error": error}
    return {"max_seq_len": length, "rank": found.rank, **errors, **costs, **own}


def timed(name: str, call: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """Return what `call` returns, and the seconds and GiB that it took."""

    def clocked() -> tuple[Result, float]:
        start = time.process_time()
        result = call()
        return result, time.process_time() - start

    (result, seconds), gib = peak_gib(clocked)
    return result, {f"{name}_seconds": seconds, f"{name}_gib": gib}
