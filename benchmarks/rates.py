"""What a machine does in a second: the three constants of the cost model (`benchmarks.model`).

Each is measured, or taken from a data sheet with the share of it that `train.costs` assumes.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from serve.packing import packed_product
from train.costs import FFT_SHARE, GPUS, PRODUCT_SHARE

REPEATS = 7
LARGE = 2**27
"""Numbers: half a gigabyte, more than any processor's caches hold."""
SQUARE = 512
"""A matrix of a megabyte, which stays in a core's cache: reading has a constant of its own."""
FFT_LENGTH, FFT_ROWS = 4096, 64
"""A quarter of a million numbers at once, as `stu.futurefill` transforms them."""


@dataclass(frozen=True)
class Rates:
    """Of one machine, with some number of threads, and for a batch of some size."""

    bytes: float
    """Read a second, as decoding mostly does: a copy would count its target's lines as well, which
    it reads before it writes to them."""
    products: float
    """Multiply-adds a second of a matrix with the rows of the batch: few rows use a processor
    badly, however little there is to read."""
    ffts: float
    """Multiply-adds a second of real FFTs, of which one of length n counts n log2 n."""
    overlap: bool = False
    """Whether weights are read while products are computed: on a GPU, not on a core."""


def measured_rates(batch: int) -> Rates:
    """Of this machine, with torch's present number of threads; takes a few seconds."""
    vector, other = torch.ones(LARGE), torch.ones(LARGE)
    num_bytes = 2 * vector.numel() * vector.element_size()
    rows, signals = torch.randn(batch, SQUARE), torch.randn(FFT_ROWS, FFT_LENGTH)
    product = packed_product(torch.randn(SQUARE, SQUARE))
    transforms = 2 * FFT_ROWS * FFT_LENGTH * math.log2(FFT_LENGTH)
    with torch.inference_mode():
        return Rates(
            bytes=num_bytes / seconds(lambda: torch.dot(vector, other), 1),
            products=batch * SQUARE**2 / seconds(lambda: product(rows), 100),
            ffts=transforms / seconds(lambda: torch.fft.irfft(torch.fft.rfft(signals)), 20),
        )


def median_rates(several: Sequence[Rates]) -> Rates:
    """Of each, the median of what was measured at several times."""
    return Rates(
        statistics.median(its.bytes for its in several),
        statistics.median(its.products for its in several),
        statistics.median(its.ffts for its in several),
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
        overlap=True,
    )


def step_parts(
    multiply_adds: dict[str, float], moved: dict[str, float], batch: int, rates: Rates
) -> dict[str, float]:
    """Seconds of a step, by what they are spent on. Costs are those of a token
    (`benchmarks.costs.Costs.report`)."""
    caches = moved["filters"] + moved["cache_read"] + moved["cache_written"]
    others = multiply_adds["convolution"] + multiply_adds["attention"] + multiply_adds["recurrence"]
    weights = batch * moved["weights"] / rates.bytes
    products = batch * multiply_adds["dense"] / rates.products
    if rates.overlap:
        weights, products = (weights, 0.0) if weights > products else (0.0, products)
    return {
        "weights": weights,
        "products": products,
        "caches": batch * max(caches / rates.bytes, others / rates.products),
        "ffts": batch * multiply_adds["fft"] / rates.ffts,
    }


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
