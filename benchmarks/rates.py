"""What a machine does in a second: the three constants of the cost model (`benchmarks.model`).

Each is measured, or taken from a data sheet with the share of it that `train.costs` assumes.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from serve.packing import ROWS_AT_ONCE, packed_product
from train.costs import FFT_SHARE, GPUS, PRODUCT_SHARE

REPEATS = 7
LARGE = 2**27
"""Numbers: half a gigabyte, more than any processor's caches hold."""
IN, OUT = 512, 2048
FFT_LENGTH, FFT_ROWS = 4096, 64
"""A quarter of a million numbers at once, as `stu.futurefill` transforms them."""


@dataclass(frozen=True)
class Rates:
    """Of one machine, with some number of threads."""

    bytes: float
    """Read a second, as decoding mostly does: a copy would count its target's lines as well, which
    it reads before it writes to them."""
    products: float
    """Multiply-adds a second of matrices with the rows of a batch."""
    ffts: float
    """Multiply-adds a second of real FFTs, of which one of length n counts n log2 n."""


def measured_rates() -> Rates:
    """Of this machine, with torch's present number of threads; takes a few seconds."""
    vector, other = torch.ones(LARGE), torch.ones(LARGE)
    num_bytes = 2 * vector.numel() * vector.element_size()
    rows, signals = torch.randn(ROWS_AT_ONCE, IN), torch.randn(FFT_ROWS, FFT_LENGTH)
    product = packed_product(torch.randn(OUT, IN))
    transforms = 2 * FFT_ROWS * FFT_LENGTH * math.log2(FFT_LENGTH)
    with torch.inference_mode():
        return Rates(
            bytes=num_bytes / seconds(lambda: torch.dot(vector, other), 1),
            products=ROWS_AT_ONCE * IN * OUT / seconds(lambda: product(rows), 100),
            ffts=transforms / seconds(lambda: torch.fft.irfft(torch.fft.rfft(signals)), 20),
        )


def median_rates(several: Sequence[Rates]) -> Rates:
    """Of each, the median of what was measured at several times."""
    return Rates(
        *(statistics.median(getattr(its, field.name) for its in several) for field in fields(Rates))
    )


def of_gpu(name: str) -> Rates:
    """Of a kind that is in no reach, from its data sheet (`train.costs.GPUS`)."""
    gpu = GPUS[name]
    # A transform reads its numbers and writes as many, four bytes each.
    transformed = FFT_SHARE * gpu.bytes_per_second / 8
    return Rates(
        bytes=gpu.bytes_per_second,
        products=PRODUCT_SHARE * gpu.flops / 2,
        ffts=transformed * math.log2(FFT_LENGTH),
    )


def seconds(call: Callable[[], object], times: int) -> float:
    """Of one call: the median of several, each so many times."""
    call()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(times):
            call()
        taken.append((time.perf_counter() - start) / times)
    return statistics.median(taken)
