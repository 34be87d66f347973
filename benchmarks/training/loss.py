"""`python -m benchmarks loss`: the training loss, which never holds all logits, against torch's.

Forward and backward pass in float32 with the published vocabulary of 200,064. Memory is the peak
beyond what was resident before, gradients included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import describe
from benchmarks.process_memory import peak_gib
from benchmarks.timing import median_seconds
from train.loss import next_token_loss

VOCAB_SIZE = 200_064
SIZES = [(2048, 512), (4096, 256)]
"""Number of targets and width."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    first: PositiveInt = 2
    """Number of sizes to run."""
    repeats: PositiveInt = 3
    """Timed passes of each loss."""


def measure(options: Options) -> dict[str, Any]:
    """Return seconds and GiB of both losses, and the ratios."""
    runs = []
    for num_targets, width in SIZES[: options.first]:
        torch.manual_seed(0)
        hidden = torch.randn(num_targets, width, requires_grad=True)
        output = torch.randn(VOCAB_SIZE, width).mul_(width**-0.5).requires_grad_()
        targets = torch.randint(VOCAB_SIZE, (num_targets,))
        run: dict[str, Any] = {"threads": torch.get_num_threads()}
        run |= {"targets": num_targets, "width": width}
        for name, loss in {"plain": plain, "chunked": chunked}.items():
            call = {name: partial(both_passes, loss, hidden, output, targets)}
            seconds, run[f"{name}_gib"] = peak_gib(partial(median_seconds, call, options.repeats))
            run[f"{name}_seconds"] = seconds[name]
            hidden.grad = output.grad = None
        run["memory_ratio"] = run["plain_gib"] / run["chunked_gib"]
        run["speed_ratio"] = run["plain_seconds"] / run["chunked_seconds"]
        runs.append(run)
    return {"machine": describe(), "runs": runs}


def both_passes(loss: Loss, hidden: Tensor, output: Tensor, targets: Tensor) -> None:
    """Compute a loss and its gradients."""
    hidden.grad = output.grad = None
    loss(hidden, output, targets).backward()  # type: ignore[no-untyped-call]


def plain(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss from whole logits."""
    return F.cross_entropy(hidden @ output.t(), targets)


def chunked(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss from the logits of a few rows at a time."""
    return next_token_loss(hidden, output, targets)[0]
