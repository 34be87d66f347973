"""Outputs of a long convolution from the inputs of the page that is being decoded.

The output of a slot is what was pending for it when the page began, and a direct sum over the
inputs of the page: `y = pending[slot] + sum_{j=0..slot} near[j] x[slot - j]`. Pending outputs are
only read, and the new input is all that is written.
"""

from __future__ import annotations  # annotations of kernels need Triton

import torch
from torch import Tensor

from serve.kernels.dispatch import jit, power_of_two, tl, uses_triton

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
    own = inputs[:, layer]  # [rows, signals, slots, C]
    own.index_put_((rows, signal, slot), x.to(inputs.dtype))
    lags = torch.arange(slots, device=x.device)
    taps = torch.where((lags <= slot)[:, None], near[layer], 0)
    # Later slots may hold anything; the first one, which is read in their place, is always written.
    past = own[rows[:, None], signal, (slot - lags).clamp(min=0)]  # [B, lags, C]
    sums = past.mul_(taps).sum(1)
    return (pending[:, layer][rows, signal, slot] + sums).to(x.dtype)


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
    outputs = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = min(power_of_two(channels), MOST_CHANNELS)
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
