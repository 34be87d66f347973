"""Product of a few rows with weights of 8 bits, which are read as they are.

Few rows take as long as the weights take to read. So the weights, int8 or floats of 8 bits (e4m3),
become floats in registers only; sums are in float32, and each output's scale multiplies its sum.
Many rows take as long as their multiply-adds, and go through a copy of the weights in their dtype.
"""

from __future__ import annotations  # annotations of kernels need Triton

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.kernels.dispatch import dense_rows, jit, power_of_two, tl, uses_triton

MOST_ROWS = 256
"""Rows up to which the weights are read as they are."""
LEAST_PROGRAMS = 128
"""Programs that keep a GPU busy: outputs are divided among as many, and then their inputs."""
LEAST_INPUTS = 512
"""Inputs of a program that shares its outputs with others."""
MOST_SPLITS = 8
"""Most programs that share outputs."""


def narrow_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Return `x @ (values * scales[:, None]).T`, `[B, out]` as `x`.

    Args:
        x: Inputs `[B, in]`, float32 or bfloat16; float64 is computed in float32.
        values: Weights `[out, in]`, int8 or float8_e4m3fn, contiguous.
        scales: Their scales, float32 `[out]`.
    """
    if len(x) > MOST_ROWS:
        return F.linear(x, values.to(x.dtype).mul_(scales[:, None]))
    run = triton_narrow_product if uses_triton(x) else torch_narrow_product
    return run(x, values, scales)


def torch_narrow_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Do as `narrow_product`, in torch."""
    return F.linear(x.float(), values.float()).mul_(scales).to(x.dtype)


def triton_narrow_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Do as `narrow_product`, in Triton."""
    if x.dtype == torch.float64:
        return triton_narrow_product(x.float(), values, scales).double()
    x = dense_rows(x)
    (rows, inputs), outputs = x.shape, len(values)
    sizes = blocks(rows, outputs, x.element_size())
    grid = -(-outputs // sizes["BLOCK_OUT"]), -(-rows // sizes["BLOCK_ROWS"])
    splits = num_splits(grid[0] * grid[1], inputs)
    block = sizes["BLOCK_IN"]
    per_split = -(-inputs // (splits * block)) * block
    products = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    sums = products
    if splits > 1:
        sums = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _narrow_product_kernel[(*grid, splits)](
            x,
            values.view(torch.int8),
            scales,
            sums,
            x.stride(0),
            rows,
            outputs,
            inputs,
            per_split,
            IS_FLOAT=values.dtype != torch.int8,
            IS_WHOLE=splits == 1,
            **sizes,
        )
        if splits > 1:
            channels = min(power_of_two(outputs), 1024)
            _join_splits[rows, -(-outputs // channels)](
                sums, scales, products, rows, outputs, SPLITS=splits, BLOCK=channels, num_warps=4
            )
    return products


def blocks(rows: int, outputs: int, itemsize: int) -> dict[str, Any]:
    """Return the sizes of a program's blocks, and how it runs."""
    block_rows = min(max(power_of_two(rows), 16), 128 if itemsize == 2 else 32)
    # As many outputs as rows, so that reading inputs again costs no more than reading weights.
    block_out = min(max(power_of_two(2 * rows), 16), 64 if itemsize == 2 else 32)
    is_small = itemsize == 2 and block_rows <= 32
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_OUT": min(block_out, max(power_of_two(outputs), 16)),
        "BLOCK_IN": 256 if is_small else 128,
        "num_warps": 8 if block_rows > 64 else 4,  # or sm_80 would spill
        "num_stages": 4 if is_small else 3,
    }


def num_splits(programs: int, inputs: int) -> int:
    """Return among how many programs the inputs of each output are divided."""
    splits = 1
    while programs * splits < LEAST_PROGRAMS and inputs >= 2 * splits * LEAST_INPUTS:
        splits *= 2
    return min(splits, MOST_SPLITS)


@partial(jit, unspecialized=["num_rows"])
def _narrow_product_kernel(
    x,
    values,
    scales,
    sums,
    x_row,
    num_rows,
    num_outputs,
    num_inputs,
    per_split,
    IS_FLOAT: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Compute a block of outputs of a block of rows, or a part of their sums. Weights are the left
    factor, which tensor cores take from registers."""
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(2)
    are_outs, are_rows = outs < num_outputs, rows < num_rows
    places = split * per_split + tl.arange(0, BLOCK_IN)
    own_weights = values + outs.to(tl.int64)[:, None] * num_inputs
    own_x = x + rows.to(tl.int64)[None, :] * x_row
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for first in range(0, tl.minimum(per_split, num_inputs - split * per_split), BLOCK_IN):
        inputs = first + places
        exist = inputs < num_inputs
        weights = tl.load(
            own_weights + inputs[None, :], mask=are_outs[:, None] & exist[None, :], other=0
        )
        if IS_FLOAT:
            weights = weights.to(tl.float8e4nv, bitcast=True)
        taken = tl.load(own_x + inputs[:, None], mask=are_rows[None, :] & exist[:, None], other=0)
        total = tl.dot(weights.to(x.dtype.element_ty), taken, total, input_precision="ieee")
    both = are_outs[:, None] & are_rows[None, :]
    results = (split * num_rows + rows).to(tl.int64)[None, :] * num_outputs + outs[:, None]
    if IS_WHOLE:
        total *= tl.load(scales + outs, mask=are_outs, other=0)[:, None]
    tl.store(sums + results, total.to(sums.dtype.element_ty), mask=both)


@partial(jit, unspecialized=["num_rows"])
def _join_splits(
    sums, scales, products, num_rows, num_outputs, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up the parts of a row's sums."""
    row = tl.program_id(0).to(tl.int64)
    outs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exist = outs < num_outputs
    total = tl.load(sums + row * num_outputs + outs, mask=exist, other=0)
    for split in tl.static_range(1, SPLITS):
        part = sums + (split * num_rows + row) * num_outputs + outs
        total += tl.load(part, mask=exist, other=0)
    total *= tl.load(scales + outs, mask=exist, other=0)
    tl.store(products + row * num_outputs + outs, total.to(products.dtype.element_ty), mask=exist)
