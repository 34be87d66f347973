"""Measured speeds of a machine: the constants of the cost model (`benchmarks.decoding.model`)."""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers.peer import FLOAT_BYTES
from benchmarks.timing import timed
from serve.engine.inference_model import inference_product
from stu.layers import RMSNorm

READ = 2**26
"""Numbers in a vector: a quarter of a gigabyte, more than the caches of any processor hold."""
WIDTH, HIDDEN = 1024, 4096
MATRICES = [(WIDTH, WIDTH), (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)] * 4
"""Weights of four blocks, `[out, in]`: small ones take longer than their share."""
HEADS, KEYS, HEAD_DIM = 128, 4096, 128
"""Heads of one query each."""
SHORT_STREAM, LONG_STREAM, STREAM_SPACE = 128, 4096, 4416
"""Numbers of a stream that are read, and from one stream to the next: at a power of two, streams
would share few lines of the processor's caches."""
FFT_ROWS, FFT_LENGTH = 64, 4096
"""A quarter of a million numbers at once, as `stu.futurefill` transforms them."""


@dataclass(frozen=True)
class Rates:
    """Speeds per second of a machine with some number of threads, for batches of some size."""

    bytes: float
    """Bytes read, which is most of decoding; a copy would also read the lines that it writes to."""
    products: float
    """Multiply-adds of weights, read meanwhile, with the rows of the batch: few rows use a
    processor badly."""
    single_products: float
    """Multiply-adds of matrices with one row each, as the keys of a sequence meet."""
    ffts: float
    """Multiply-adds of real FFTs; one of length n counts n log2 n."""
    streams: float
    """Short streams of memory far from each other: the inputs of as many sequences as the batch
    has, and a filter with which they are multiplied."""
    operations: float
    """Operations of torch on a vector of each sequence, between products, whose weights have
    driven everything else out of the processor's caches."""
    stream_bytes: float = math.inf
    """Bytes of long streams of the same kind. Results without it have no count of such bytes."""


@functools.cache
class Meter:
    """Measures this machine with torch's number of threads, a fraction of a second at a time.

    Every call is timed once, when the others have driven its operands out of the processor's
    caches, as it is with the steps of a large model.
    """

    @torch.inference_mode()
    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._vectors, self._keys, products = operands()
        rows = {width: torch.randn(batch, width) for width in (WIDTH, HIDDEN)}
        self._queries = torch.randn(HEADS, 1, HEAD_DIM)
        self._signals = torch.randn(FFT_ROWS, FFT_LENGTH)
        self._norm = functools.partial(RMSNorm(WIDTH, eps=1e-5), rows[WIDTH])
        self._norm_operations = operations(self._norm)
        self._products = [
            functools.partial(product, rows[inputs])
            for product, (_, inputs) in zip(products, MATRICES, strict=True)
        ]
        self._num_filters = READ // (batch * STREAM_SPACE)
        self._places = itertools.cycle(range(0, LONG_STREAM, SHORT_STREAM))
        self.rates()  # the first calls allocate and plan

    @torch.inference_mode()
    def rates(self) -> Rates:
        """Measure once."""
        times = [(timed(product), timed(self._norm)) for product in self._products]
        products, norms = zip(*times, strict=True)
        weights = sum(outputs * inputs for outputs, inputs in MATRICES)
        transforms = 2 * FFT_ROWS * FFT_LENGTH * math.log2(FFT_LENGTH)
        streams, place = self._num_filters * (1 + self._batch), next(self._places)
        stream_bytes, keys = FLOAT_BYTES * streams * LONG_STREAM, self._keys
        return Rates(
            bytes=2 * FLOAT_BYTES * READ / timed(lambda: torch.dot(*self._vectors)),
            products=self._batch * weights / sum(products),
            single_products=keys.numel() / timed(lambda: torch.bmm(self._queries, keys.mT)),
            ffts=transforms / timed(lambda: torch.fft.irfft(torch.fft.rfft(self._signals))),
            streams=streams / timed(lambda: self._sum_streams(place, SHORT_STREAM)),
            operations=self._norm_operations / statistics.median(norms),
            stream_bytes=stream_bytes / timed(lambda: self._sum_streams(0, LONG_STREAM)),
        )

    def _sum_streams(self, start: int, length: int) -> Tensor:
        """Sum the pasts of channels, as `Naive` does."""
        whole = self._num_filters * self._batch * STREAM_SPACE
        inputs = self._vectors[0][:whole].view(self._num_filters, self._batch, STREAM_SPACE)
        filters = self._vectors[1][:whole].view(self._num_filters, 1, -1)
        stretch = slice(start, start + length)
        return filters[:, :, stretch] @ inputs[:, :, stretch].mT


@functools.cache
def operands() -> tuple[tuple[Tensor, Tensor], Tensor, list[Callable[[Tensor], Tensor]]]:
    """Return a gigabyte of vectors, keys and weights, the same ones every time."""
    weights = [torch.randn(*shape) for shape in MATRICES]
    vectors, keys = (torch.ones(READ), torch.ones(READ)), torch.randn(HEADS, KEYS, HEAD_DIM)
    return vectors, keys, [inference_product(weight) for weight in weights]


def median_rates(several: Sequence[Rates]) -> Rates:
    """Return the medians of what was measured at nearly the same time."""
    return Rates(*map(statistics.median, zip(*map(astuple, several), strict=True)))


def mean_rates(several: Sequence[Rates]) -> Rates:
    """Return the rates at which as much is done at several times takes the time of all."""
    return Rates(*map(statistics.harmonic_mean, zip(*map(astuple, several), strict=True)))


def step_parts(run: Mapping[str, Any], rates: Rates) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on; `products` is the time by which
    multiplying takes longer than reading the weights.

    run: the `batch`, the counts of a token (`counting.report`), and the `operations_per_step` of
        the batch.
    """
    batch, multiply_adds = run["batch"], run["multiply_adds_per_token"]
    moved = run["bytes_moved_per_token"]
    streams = run.get("stream_bytes_per_token", 0.0)
    shared = run.get("shared_products_per_token", 0.0)
    caches = moved["filters"] + moved["cache_read"] + moved["cache_written"] - streams
    reading = caches / rates.bytes + streams / rates.stream_bytes
    others = (multiply_adds["convolution"] + multiply_adds["recurrence"]) / rates.products
    others += (multiply_adds["attention"] - shared) / rates.single_products
    weights = batch * moved["weights"] / rates.bytes
    return {
        "weights": weights,
        "products": max(0.0, batch * multiply_adds["dense"] / rates.products - weights),
        "caches": batch * max(reading, others),
        "streams": batch * run["streams_per_token"] / rates.streams,
        "ffts": batch * multiply_adds["fft"] / rates.ffts,
        "operations": run["operations_per_step"] / rates.operations,
    }


def operations(call: Callable[[], object]) -> int:
    """Return how many of torch's operations a call consists of, views included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return sum(not event.cpu_children for event in profiled.events() or [])
