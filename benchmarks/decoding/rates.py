"""Speeds of a machine: the constants of the cost model (`benchmarks.decoding.model`).

Each is measured, or taken from a data sheet with the share of it that `train.plan.costs` assumes.
"""

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
from benchmarks.timing import seconds, timed
from serve.engine.packing import packed_product
from stu.layers import RMSNorm
from train.gpus import GPUS
from train.plan.costs import FFT_SHARE, PRODUCT_SHARE

READ = 2**26
"""Numbers in a vector: a quarter of a gigabyte, more than the caches of any processor hold."""
WIDTH, HIDDEN = 1024, 4096
MATRICES = [(WIDTH, WIDTH), (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)] * 4
"""Weights of four blocks, `[out, in]`: small ones take longer than their share."""
HEADS, KEYS, HEAD_DIM = 128, 4096, 128
"""Heads of one query each."""
STREAM, STREAM_SPACE = 128, 4096
"""Numbers of a stream that are read, and from one stream to the next."""
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


@torch.inference_mode()
def measured_rates(batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Rates:
    """Measure this machine with torch's number of threads and weights of `dtype`, for a second."""
    vectors, keys, products = operands(device, dtype)
    queries = torch.randn(HEADS, 1, HEAD_DIM, device=device)
    signals = torch.randn(FFT_ROWS, FFT_LENGTH, device=device)
    rows = {
        width: torch.randn(batch, width, dtype=dtype, device=device) for width in (WIDTH, HIDDEN)
    }
    norm = functools.partial(RMSNorm(WIDTH, eps=1e-5).to(device, dtype), rows[WIDTH])
    transforms = 2 * FFT_ROWS * FFT_LENGTH * math.log2(FFT_LENGTH)
    weights = sum(outputs * inputs for outputs, inputs in MATRICES)
    multiply = [
        functools.partial(product, rows[inputs])
        for product, (_, inputs) in zip(products, MATRICES, strict=True)
    ]
    num_filters, begin = streams(batch, vectors)
    return Rates(
        bytes=2 * FLOAT_BYTES * READ / seconds(lambda: torch.dot(*vectors)),
        products=batch * weights / seconds(lambda: [product() for product in multiply]),
        single_products=HEADS * KEYS * HEAD_DIM / seconds(lambda: torch.bmm(queries, keys.mT)),
        ffts=transforms / seconds(lambda: torch.fft.irfft(torch.fft.rfft(signals))),
        streams=num_filters * (1 + batch) / seconds(begin),
        operations=operations(norm) / seconds_after(norm, multiply),
    )


@functools.cache
def operands(
    device: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Tensor, list[Callable[[Tensor], Tensor]]]:
    """Return a gigabyte of vectors, keys and weights on the device, the same ones every time."""
    with torch.device(device):
        weights = [torch.randn(*shape, dtype=dtype) for shape in MATRICES]
        vectors, keys = (torch.ones(READ), torch.ones(READ)), torch.randn(HEADS, KEYS, HEAD_DIM)
    return vectors, keys, [packed_product(weight) for weight in weights]


def streams(batch: int, vectors: tuple[Tensor, Tensor]) -> tuple[int, Callable[[], Tensor]]:
    """Return a number of filters and a call that sums the shortest pasts, as `Naive` does, at other
    places of memory each time."""
    num_filters = READ // (batch * STREAM_SPACE)
    whole = num_filters * batch * STREAM_SPACE
    inputs = vectors[0][:whole].view(num_filters, batch, STREAM_SPACE).mT
    filters = vectors[1][:whole].view(num_filters, 1, batch * STREAM_SPACE)
    places = itertools.cycle(range(0, STREAM_SPACE, STREAM))

    def begin() -> Tensor:
        place = next(places)
        return filters[:, :, place : place + STREAM] @ inputs[:, place : place + STREAM]

    return num_filters, begin


def mean_rates(several: Sequence[Rates]) -> Rates:
    """Return the mean of what was measured at several times."""
    return Rates(*map(statistics.mean, zip(*map(astuple, several), strict=True)))


def rates_of_gpu(name: str) -> Rates:
    """Return the speeds on the data sheet of a GPU; it has none for streams and operations."""
    gpu = GPUS[name]
    # A transform reads its numbers and writes as many, four bytes each.
    transformed = FFT_SHARE * gpu.bytes_per_second / 8
    products = PRODUCT_SHARE * gpu.flops / 2
    return Rates(
        bytes=gpu.bytes_per_second,
        products=products,
        single_products=products,
        ffts=transformed * math.log2(FFT_LENGTH),
        streams=math.inf,
        operations=math.inf,
    )


def step_parts(run: Mapping[str, Any], rates: Rates) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on; `products` is the time by which
    multiplying takes longer than reading the weights.

    run: the `batch`, the counts of a token (`counting.report`), and the `operations_per_step` of
        the batch.
    """
    batch, multiply_adds = run["batch"], run["multiply_adds_per_token"]
    moved = run["bytes_moved_per_token"]
    caches = moved["filters"] + moved["cache_read"] + moved["cache_written"]
    others = (multiply_adds["convolution"] + multiply_adds["recurrence"]) / rates.products
    others += multiply_adds["attention"] / rates.single_products
    weights = batch * moved["weights"] / rates.bytes
    return {
        "weights": weights,
        "products": max(0.0, batch * multiply_adds["dense"] / rates.products - weights),
        "caches": batch * max(caches / rates.bytes, others),
        "streams": batch * run["streams_per_token"] / rates.streams,
        "ffts": batch * multiply_adds["fft"] / rates.ffts,
        "operations": run["operations_per_step"] / rates.operations,
    }


def operations(call: Callable[[], object]) -> int:
    """Return how many of torch's operations a call consists of, views included."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return sum(not event.cpu_children for event in profiled.events() or [])


def seconds_after(call: Callable[[], object], others: Sequence[Callable[[], object]]) -> float:
    """Return the median seconds of calls, each of which follows one of the others."""
    taken: list[float] = []
    for other in others:
        other()
        taken.append(timed(call))
    return statistics.median(taken)
