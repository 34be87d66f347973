"""RMSNorm of the residual stream, with the sum that comes before it."""

from __future__ import annotations  # annotations of kernels need Triton

import torch
from torch import Tensor
from torch.nn import functional as F

from serve.kernels.dispatch import dense_rows, jit, power_of_two, tl, uses_triton


def add_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `x + added`, and the same after `stu.layers.RMSNorm`: all `[B, D]`.

    Args:
        x: The residual stream, `[B, D]`.
        added: Output of a mixer or an MLP, `[B, D]`; None: nothing is added.
        weight: Weights of the norm, `[D]`.
        eps: Number added to the mean square.
    """
    run = triton_add_norm if uses_triton(x) else torch_add_norm
    return run(x, added, weight, eps)


def torch_add_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Do as `add_norm`, in torch."""
    total = x if added is None else x + added
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    normed = F.rms_norm(wide, wide.shape[-1:], eps=eps).to(total.dtype) * weight
    return total, normed


def triton_add_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Do as `add_norm`, in Triton."""
    width, x = x.shape[-1], dense_rows(x)
    added = added if added is None else dense_rows(added)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = x if added is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = power_of_two(width)
    with torch.cuda.device_of(x):
        _add_norm_kernel[(len(x),)](
            x,
            x if added is None else added,
            weight,
            total,
            normed,
            x.stride(0),
            x.stride(0) if added is None else added.stride(0),
            WIDTH=width,
            EPS=eps,
            HAS_ADDED=added is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )
    return total, normed


@jit
def _add_norm_kernel(
    x,
    added,
    weight,
    total,
    normed,
    x_row,
    added_row,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise one row."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    exists = channels < WIDTH
    dtype = x.dtype.element_ty
    wide = tl.float64 if dtype == tl.float64 else tl.float32
    values = tl.load(x + row * x_row + channels, mask=exists, other=0).to(wide)
    if HAS_ADDED:
        values += tl.load(added + row * added_row + channels, mask=exists, other=0).to(wide)
        values = values.to(dtype)
        tl.store(total + row * WIDTH + channels, values, mask=exists)
        values = values.to(wide)
    size = tl.sqrt(tl.sum(values * values, 0) / WIDTH + EPS)
    scaled = (values / size).to(dtype).to(wide) * tl.load(weight + channels, mask=exists).to(wide)
    tl.store(normed + row * WIDTH + channels, scaled.to(normed.dtype.element_ty), mask=exists)
