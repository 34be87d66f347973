"""Kernels against what torch.compile makes of their twins, which is enough where it is as fast."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.measuring import (
    Figures,
    Measures,
    captured,
    decoding_dtype,
    release_memory,
)
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.timing import timed
from serve.kernels.gated import gated_product, torch_gated_product
from serve.kernels.near_field import near_field, torch_near_field
from serve.kernels.norm import add_norm, torch_add_norm

CALLS, REPEATS = 50, 5
SLOTS, SIGNALS = 16, 2
"""A page of 32 positions, of the tensordot form."""


def measures(device: str, sizes: Sizes) -> Measures:
    """Yield each kernel, in the shape of the first model."""
    config, rows = next(iter(sizes.models.values())), sizes.compiled_rows
    width = config.width
    dtype = decoding_dtype(device)
    make = partial(torch.randn, device=device, dtype=dtype)
    x, added, weight = make(rows, width), make(rows, width), make(width)
    yield "add_norm", partial(compare, add_norm, torch_add_norm, (x, added, weight, 1e-5), device)
    gate_up = make(rows, 2 * config.mlp_ratio * width)
    yield "gated_product", partial(compare, gated_product, torch_gated_product, (gate_up,), device)
    pages = torch.randn(1, SIGNALS, SLOTS, rows, width, device=device).permute(3, 0, 1, 2, 4)
    near = torch.randn(1, SLOTS, width, device=device)
    place = torch.tensor([SIGNALS * SLOTS // 2], device=device)
    own = torch.arange(rows, device=device)
    arguments = pages, pages.clone(), near, 0, own, place, x
    yield "near_field", partial(compare, near_field, torch_near_field, arguments, device)
    release_memory()


@torch.inference_mode()
def compare(
    kernel: Callable[..., Any], twin: Callable[..., Any], arguments: tuple[Any, ...], device: str
) -> Figures:
    """Return microseconds of a kernel, of its twin compiled and as it is, and the largest
    difference of the first two relative to the largest number."""
    backend = "inductor" if device == "cuda" else "eager"  # which only traces
    compiled = torch.compile(twin, dynamic=False, backend=backend)
    found, wanted = results(kernel(*arguments)), results(compiled(*arguments))
    differences = [
        ((own.double() - other.double()).abs().max() / other.double().abs().max()).item()
        for own, other in zip(found, wanted, strict=True)
    ]
    runs = {"kernel": kernel, "compiled": compiled, "twin": twin}
    figures = {f"{name}_us": microseconds(partial(run, *arguments)) for name, run in runs.items()}
    return figures | {"largest_difference": max(differences)}


def results(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Return the tensors that a call returned."""
    return [found.clone()] if isinstance(found, Tensor) else [own.clone() for own in found]


def microseconds(call: Callable[[], object]) -> float:
    """Return microseconds of a call among many that are launched as one graph."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    run = captured(calls)
    return 1e6 * min(timed(run) for _ in range(REPEATS)) / CALLS
