"""`python -m benchmarks loss`: the loss that never holds all logits, against torch's on whole ones.

Forward and backward pass in float32, the published vocabulary of 200,064. Memory is the most that
was resident beyond what there was before, gradients included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import describe
from benchmarks.peak_memory import peak_gib
from train.loss import next_token_loss

VOCAB_SIZE = 200_064
SIZES = [(2048, 512), (4096, 256)]
"""Targets, width."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and GiB of both, and the ratios."""
    result: dict[str, Any] = {"machine": describe(), "runs": []}
    ways = {"plain": plain, "chunked": chunked}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for num_targets, width in SIZES[: args.first]:
            torch.manual_seed(0)
            hidden = torch.randn(num_targets, width, requires_grad=True)
            output = torch.randn(VOCAB_SIZE, width).mul_(width**-0.5).requires_grad_()
            targets = torch.randint(VOCAB_SIZE, (num_targets,))
            run: dict[str, Any] = {"threads": threads, "targets": num_targets, "width": width}
            for name, way in ways.items():
                figures = timed(way, hidden, output, targets, args.repeats)
                run |= {f"{name}_{key}": its for key, its in figures}
            run["memory_ratio"] = run["plain_gib"] / run["chunked_gib"]
            run["speed_ratio"] = run["plain_seconds"] / run["chunked_seconds"]
            result["runs"].append(run)
    return result


def plain(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """Whole logits."""
    return F.cross_entropy(hidden @ output.t(), targets)


def chunked(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """A few rows' logits at a time."""
    return next_token_loss(hidden, output, targets)[0]


def timed(
    way: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    output: Tensor,
    targets: Tensor,
    repeats: int,
) -> list[tuple[str, float]]:
    """Seconds, the median, and GiB."""

    def repeated() -> list[float]:
        seconds = []
        for _ in range(repeats):
            hidden.grad = output.grad = None
            began = time.perf_counter()
            way(hidden, output, targets).backward()
            seconds.append(time.perf_counter() - began)
        return seconds

    seconds, gib = peak_gib(repeated)
    hidden.grad = output.grad = None
    return [("seconds", statistics.median(seconds)), ("gib", gib)]
