"""Convolutions for training and for decoding, against the ways they are usually computed.

    python -m benchmarks convolution > convolution.json

`training`: forward and backward of the fused even-lag form against the two-branch form as it is
published: both branches stacked on a last axis and transformed along the time axis in place.

`decoding`: `Continuous` over a whole run against direct sums that read only even lags and allocate
no temporaries. Of einsum, matmul and vecdot, each timed in mid-run, the best one is what `Naive`
computes with; its whole run is the time compared.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from stu.convolution import causal_convolution
from stu.futurefill import Continuous
from stu.online_convolution import Naive, OnlineConvolution

REPEATS = 7


def two_branch_convolution(inputs: Tensor, psi: Tensor) -> Tensor:
    """`psi * x` plus `((-1)^i psi) * x`, both of length L: the published layout of the work."""
    length = inputs.shape[1]
    n = 2 * length
    sign = torch.ones(length, 1)
    sign[1::2] = -1
    branches = torch.stack([inputs, inputs * sign], dim=-1)  # [B, T, D, 2]
    spectrum = torch.fft.rfft(branches, n=n, dim=1)
    filters = torch.fft.rfft(psi[None, :, :, None], n=n, dim=1)
    plus, minus = torch.fft.irfft(spectrum * filters, n=n, dim=1)[:, :length].unbind(-1)
    return plus + minus * sign


def fused_convolution(inputs: Tensor, psi: Tensor) -> Tensor:
    """The same function as one convolution with the even lags of `2 psi`."""
    return causal_convolution(inputs, 2 * psi[::2], lag_step=2)


def training(length: int) -> dict[str, Any]:
    """Milliseconds of forward plus backward at B=2, D=256."""
    torch.manual_seed(0)
    inputs = torch.randn(2, length, 256, requires_grad=True)
    psi = (torch.randn(length, 256) / length**0.5).requires_grad_()
    grad = torch.randn(2, length, 256)
    forms = {"two_branch": two_branch_convolution, "fused": fused_convolution}
    difference = two_branch_convolution(inputs, psi) - fused_convolution(inputs, psi)
    result: dict[str, Any] = {"length": length, "max_difference": difference.abs().max().item()}
    times = interleaved(
        {name: lambda form=form: form(inputs, psi).backward(grad) for name, form in forms.items()}
    )
    result |= {f"{name}_ms": 1e3 * seconds for name, seconds in times.items()}
    result["ratio"] = times["two_branch"] / times["fused"]
    return result


def decoding(length: int, batch: int) -> dict[str, Any]:
    """Microseconds per token of one STU-T layer at D=512, over `length` tokens from no prompt."""
    torch.manual_seed(0)
    taps = torch.randn(1, length // 2, 512) / length**0.5
    tokens = torch.randn(64, batch, 512)
    sums = direct_sums(length // 4, batch)
    run(Continuous(taps, batch, length, 2), tokens, min(length, 2048))  # warm-up
    continuous = statistics.median(
        run(Continuous(taps, batch, length, 2), tokens, length) for _ in range(3)
    )
    naive = run(Naive(taps, batch, length, 2), tokens, length)
    return {
        "length": length,
        "batch": batch,
        "direct_sum_in_mid_run_us": {name: 1e6 * seconds for name, seconds in sums.items()},
        "best_direct_sum": min(sums, key=lambda name: sums[name]),
        "naive_us_per_token": 1e6 * naive / length,
        "continuous_us_per_token": 1e6 * continuous / length,
        "ratio": naive / continuous,
    }


def direct_sums(num_taps: int, batch: int) -> dict[str, float]:
    """Seconds of one sum over `num_taps` even lags, by operation, each in the layout it likes."""
    taps, inputs = torch.randn(512, num_taps), torch.randn(512, batch, num_taps)
    by_row = inputs.transpose(0, 1).contiguous()  # [B, D, n]
    return interleaved(
        {
            "einsum": lambda: torch.einsum("bdn,dn->bd", by_row, taps),
            "matmul": lambda: taps[:, None] @ inputs.transpose(1, 2),
            "vecdot": lambda: torch.linalg.vecdot(inputs, taps[:, None]),
        }
    )


def run(online: OnlineConvolution, tokens: Tensor, count: int) -> float:
    """Seconds to decode `count` tokens."""
    start = time.perf_counter()
    for position in range(count):
        online.step(0, tokens[position % len(tokens)])
        online.advance()
    return time.perf_counter() - start


def interleaved(tasks: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each task; rounds alternate, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(REPEATS):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Training at two lengths and decoding at three settings, for each number of threads."""
    results: dict[str, Any] = {"machine": describe(), "runs": []}
    for threads in args.threads:
        torch.set_num_threads(threads)
        run: dict[str, Any] = {"threads": threads, "training": [], "decoding": []}
        for length in (2048, 8192)[: args.first]:
            run["training"].append(training(length))
            print(f"training at {length}: {run['training'][-1]['ratio']:.1f}x", file=sys.stderr)
        for length, batch in ((8192, 1), (8192, 8), (32768, 1))[: args.first]:
            run["decoding"].append(decoding(length, batch))
            ratio = run["decoding"][-1]["ratio"]
            print(f"decoding {length} tokens at batch {batch}: {ratio:.1f}x", file=sys.stderr)
        results["runs"].append(run)
    return results
