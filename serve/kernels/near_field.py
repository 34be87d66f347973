"""Outputs of a long convolution from the inputs of the page that is being decoded.

The output of a slot is what was pending for it when the page began, and a direct sum over the
inputs of the page: `y = pending[slot] + sum_{j=0..slot} near[j] x[slot - j]`. Pending outputs are
only read, and the new input is all that is written.
"""

from __future__ import annotations  # annotations of kernels need Triton

import torch
from torch import Tensor

from serve.kernels.dispatch import dense_rows, jit, power_of_two, tl, uses_triton

MOST_CHANNELS = 128
"""Channels of a program."""
LAGS_AT_ONCE = 16
"""Inputs that a program has under way at once."""


def near_field(
    inputs: Tensor,
    pending: Tensor,
    near: Tensor,
    layer: int,
    rows: Tensor,
    place: Tensor,
    x: Tensor,
) -> Tensor:
    """Return the outputs of one token of each row, `[B, C]` as `x`, and keep its inputs.

    Sums are in the dtype of `inputs`. Rows that occur twice, as padding may, have undefined
    outputs.

    Args:
        inputs: Inputs of the page, `[rows, layers, signals, slots, C]`, in float32 or float64.
        pending: Pending outputs of the page, in the same shape and dtype.
        near: Taps at lags 0, 1, .. of a signal, `[layers, slots, C]`.
        layer: Number of the layer.
        rows: Row of each token, `[B]`.
        place: The token's place in the layer's page, `[1]`. Places take turns over the signals.
        x: The new inputs, `[B, C]`.
    """
    run = triton_near_field if uses_triton(x) else torch_near_field
    return run(inputs, pending, near, layer, rows, place, x)


def torch_near_field(
    inputs: Tensor,
    pending: Tensor,
    near: Tensor,
    layer: int,
    rows: Tensor,
    place: Tensor,
    x: Tensor,
) -> Tensor:
    """Do as `near_field`, in torch."""
    signals, slots = inputs.shape[2:4]
    slot, signal = place // signals, place % signals
    kept, (per_row, per_signal, per_slot) = vectors(inputs[:, layer])
    first = rows * per_row + signal * per_signal  # [B]
    kept.index_copy_(0, first + slot * per_slot, x.to(inputs.dtype))
    lags = torch.arange(slots, device=x.device)
    # Later slots may hold anything; the first one, which is read in their place, is always written.
    read = first[:, None] + (slot - lags).clamp(min=0) * per_slot  # [B, lags]
    past = kept.index_select(0, read.flatten()).view(*read.shape, -1)
    sums = past.mul_(near[layer] * (lags <= slot)[:, None]).sum(1)
    due, (per_row, per_signal, per_slot) = vectors(pending[:, layer])
    sums += due.index_select(0, rows * per_row + signal * per_signal + slot * per_slot)
    return sums.to(x.dtype)


def vectors(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Return the memory of a tensor `[.., C]` as vectors `[n, C]`, and the number of vectors from
    one index of each other dim to the next.

    Whole vectors are gathered several times faster than by indices of several dims.
    """
    *sizes, channels = tensor.shape
    strides = [0 if size == 1 else s for size, s in zip(sizes, tensor.stride(), strict=False)]
    assert tensor.stride(-1) == 1, "channels are next to each other"
    assert not any(stride % channels for stride in strides), "no gaps are between vectors"
    strides = [stride // channels for stride in strides]
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return tensor.as_strided((last + 1, channels), (channels, 1)), strides


def triton_near_field(
    inputs: Tensor,
    pending: Tensor,
    near: Tensor,
    layer: int,
    rows: Tensor,
    place: Tensor,
    x: Tensor,
) -> Tensor:
    """Do as `near_field`, in Triton."""
    signals, slots, channels = inputs.shape[2:]
    x = dense_rows(x)
    outputs = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = min(power_of_two(channels), MOST_CHANNELS)
    with torch.cuda.device_of(x):
        _near_field_kernel[len(x), -(-channels // block)](
            inputs[:, layer],
            pending[:, layer],
            near[layer],
            rows,
            place,
            x,
            outputs,
            inputs.stride(0),
            inputs.stride(2),
            inputs.stride(3),
            pending.stride(0),
            pending.stride(2),
            pending.stride(3),
            x.stride(0),
            channels,
            SIGNALS=signals,
            LAGS=min(slots, LAGS_AT_ONCE),
            BLOCK=block,
            num_warps=1,
        )
    return outputs


@jit
def _near_field_kernel(
    inputs,
    pending,
    near,
    rows,
    place,
    x,
    outputs,
    input_row,
    input_signal,
    input_slot,
    pending_row,
    pending_signal,
    pending_slot,
    x_row,
    num_channels,
    SIGNALS: tl.constexpr,
    LAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute a block of channels of one token."""
    token = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channels < num_channels
    row, now = tl.load(rows + token), tl.load(place)
    slot, signal = now // SIGNALS, now % SIGNALS
    page = inputs + row * input_row + signal * input_signal + channels
    due = pending + row * pending_row + signal * pending_signal + slot * pending_slot + channels
    new = tl.load(x + token * x_row + channels, mask=exists).to(inputs.dtype.element_ty)
    tl.store(page + slot * input_slot, new, mask=exists)
    total = tl.load(due, mask=exists) + tl.load(near + channels, mask=exists) * new
    for first in range(1, slot + 1, LAGS):
        for more in tl.static_range(LAGS):
            lag = first + more
            reached = exists & (lag <= slot)
            tap = tl.load(near + lag * num_channels + channels, mask=reached, other=0)
            total += tap * tl.load(page + (slot - lag) * input_slot, mask=reached, other=0)
    place_of_output = outputs + token * num_channels + channels
    tl.store(place_of_output, total.to(outputs.dtype.element_ty), mask=exists)
