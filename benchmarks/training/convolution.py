"""`python -m benchmarks convolution`: the convolution in training, against two branches.

Forward and backward pass of the fused form, which has even lags only, against both branches as they
are published: stacked on a last axis and transformed along the time axis in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.timing import median_seconds
from stu.convolution import causal_convolution

LENGTHS, BATCH, WIDTH, REPEATS = (2048, 8192), 2, 256, 7


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    first: PositiveInt = 2
    """Number of lengths to run."""


def measure(options: Options) -> dict[str, Any]:
    """Return milliseconds of both forms at each length, and their ratio."""
    run = {
        "threads": torch.get_num_threads(),
        "training": [compare(length) for length in LENGTHS[: options.first]],
    }
    return {"machine": describe(), "runs": [run]}


def compare(length: int) -> dict[str, Any]:
    """Return the figures for sequences of `length` tokens."""
    torch.manual_seed(0)
    inputs = torch.randn(BATCH, length, WIDTH, requires_grad=True)
    psi = (torch.randn(length, WIDTH) / length**0.5).requires_grad_()
    grad = torch.randn(BATCH, length, WIDTH)
    forms = {"two_branch": two_branch_convolution, "fused": fused_convolution}
    difference = two_branch_convolution(inputs, psi) - fused_convolution(inputs, psi)
    result: dict[str, Any] = {"length": length, "max_difference": difference.abs().max().item()}

    def both_passes(form: Callable[[Tensor, Tensor], Tensor]) -> None:
        form(inputs, psi).backward(grad)  # type: ignore[no-untyped-call]

    ways = {name: partial(both_passes, form) for name, form in forms.items()}
    seconds = median_seconds(ways, REPEATS)
    result |= {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
    return result | {"ratio": seconds["two_branch"] / seconds["fused"]}


def two_branch_convolution(inputs: Tensor, psi: Tensor) -> Tensor:
    """Compute `psi * x` plus `((-1)^i psi) * x` in two transforms, as published."""
    length = inputs.shape[1]
    n = 2 * length
    sign = torch.ones(length, 1)
    sign[1::2] = -1
    branches = torch.stack([inputs, inputs * sign], dim=-1)  # [B, T, D, 2]
    spectrum = torch.fft.rfft(branches, n=n, dim=1)
    filters = torch.fft.rfft(psi[None, :, :, None], n=n, dim=1)
    outputs: Tensor = torch.fft.irfft(spectrum * filters, n=n, dim=1)[:, :length]
    return outputs[..., 0] + outputs[..., 1] * sign


def fused_convolution(inputs: Tensor, psi: Tensor) -> Tensor:
    """Compute the same function as one convolution with the even lags of `2 psi`."""
    return causal_convolution(inputs, 2 * psi[::2], lag_step=2)
