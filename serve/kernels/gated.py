"""Product of a gated MLP's hidden layer, from gate and up as one matrix gives them."""

from __future__ import annotations  # annotations of kernels need Triton

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.kernels.dispatch import dense_rows, jit, power_of_two, tl, uses_triton

MOST_CHANNELS = 1024
"""Channels of a program."""


def gated_product(gate_up: Tensor) -> Tensor:
    """Return `gelu_tanh(gate) * up`, `[B, H]`, as `stu.layers.GatedMLP` does.

    gate_up: Gate, then up, `[B, 2 H]`.
    """
    return triton_gated_product(gate_up) if uses_triton(gate_up) else torch_gated_product(gate_up)


def torch_gated_product(gate_up: Tensor) -> Tensor:
    """Do as `gated_product`, in torch."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def triton_gated_product(gate_up: Tensor) -> Tensor:
    """Do as `gated_product`, in Triton."""
    hidden, gate_up = gate_up.shape[1] // 2, dense_rows(gate_up)
    products = torch.empty(len(gate_up), hidden, dtype=gate_up.dtype, device=gate_up.device)
    block = min(power_of_two(hidden), MOST_CHANNELS)
    with torch.cuda.device_of(gate_up):
        _gated_product_kernel[len(gate_up), -(-hidden // block)](
            gate_up, products, gate_up.stride(0), hidden, BLOCK=block, num_warps=4
        )
    return products


@jit
def _gated_product_kernel(gate_up, products, row_stride, hidden, BLOCK: tl.constexpr):
    """Compute a block of channels of one row."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channels < hidden
    dtype = products.dtype.element_ty
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    own = gate_up + row * row_stride + channels
    gate = tl.load(own, mask=exists, other=0).to(wide)
    up = tl.load(own + hidden, mask=exists, other=0).to(wide)
    # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z)), which is exact for small ones too
    exponent = -2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)  # sqrt(2 / pi)
    bent = (gate / (1 + tl.exp(exponent))).to(dtype).to(wide)
    tl.store(products + row * hidden + channels, (bent * up).to(dtype), mask=exists)
