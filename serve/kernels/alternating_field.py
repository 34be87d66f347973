"""Outputs of an STU in full form from narrow states and the inputs of the page that is decoded.

Every input has two signals, itself and itself with the sign of its place, and each signal has an
output for each filter. An output is a sum over the coordinates of the state before the page and
over the inputs of the page, and takes the sign back.
"""

from __future__ import annotations  # annotations of kernels need Triton

import torch
from torch import Tensor

from serve.kernels.dispatch import jit, power_of_two, tl, uses_triton

TILE = 2048
"""Numbers of the outputs that a program has in registers."""
SLOTS_AT_ONCE = 4
"""Inputs that a program has under way at once."""


def alternating_field(
    inputs: Tensor,
    narrow: Tensor,
    reach: Tensor,
    near: Tensor,
    layer: int,
    rows: Tensor,
    place: Tensor,
    ages: Tensor,
    x: Tensor,
) -> Tensor:
    """Return the outputs of one token of each row, `[B S, 2 K]` in the dtype of `x`, those of the
    inputs first, and keep its inputs.

    Sums are in the dtype of `inputs`. Rows that occur twice, as padding may, have undefined
    outputs.

    Args:
        inputs: Inputs of the page, `[rows, layers, 2, slots, S]`, in float32 or float64.
        narrow: States before the page, `[rows, layers, 2, m, S]`, in the same dtype.
        reach: Contribution of a state to the outputs after 0, 1, .. more steps, `[slots, K, m]`.
        near: Contribution of the inputs of a page to the outputs at each of its places,
            `[slots, K, slots]`.
        layer: Number of the layer.
        rows: Row of each token, `[B]`.
        place: The token's place in the layer's page, `[1]`.
        ages: Steps since each row joined, `[B]`. The state is of where it did, if in this page.
        x: The new inputs, `[B, S]`.
    """
    run = triton_alternating_field if uses_triton(x) else torch_alternating_field
    return run(inputs, narrow, reach, near, layer, rows, place, ages, x)


def torch_alternating_field(
    inputs: Tensor,
    narrow: Tensor,
    reach: Tensor,
    near: Tensor,
    layer: int,
    rows: Tensor,
    place: Tensor,
    ages: Tensor,
    x: Tensor,
) -> Tensor:
    """Do as `alternating_field`, in torch."""
    own, signal = inputs[:, layer], x.to(inputs.dtype)
    sign = (1 - 2 * (place % 2)).to(inputs.dtype)
    own[:, 0].index_put_((rows, place), signal)
    own[:, 1].index_put_((rows, place), signal * sign)
    slots = torch.arange(own.shape[2], device=x.device)
    past = own.index_select(0, rows)  # [B, 2, slots, S]
    past.masked_fill_((slots > place)[:, None], 0)  # later slots may hold anything
    states = narrow[:, layer].index_select(0, rows)  # [B, 2, m, S]
    mixed = reach.index_select(0, torch.minimum(place, ages))[:, None] @ states  # [B, 2, K, S]
    mixed += near.index_select(0, place) @ past
    mixed[:, 1] *= sign
    return mixed.to(x.dtype).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def triton_alternating_field(
    inputs: Tensor,
    narrow: Tensor,
    reach: Tensor,
    near: Tensor,
    layer: int,
    rows: Tensor,
    place: Tensor,
    ages: Tensor,
    x: Tensor,
) -> Tensor:
    """Do as `alternating_field`, in Triton."""
    slots, filters, coordinates = reach.shape
    batch, streams = x.shape
    outputs = x.new_empty(batch * streams, 2 * filters)
    block_filters = power_of_two(filters)
    block = min(power_of_two(streams), max(TILE // block_filters, 1))
    with torch.cuda.device_of(x):
        _alternating_field_kernel[batch, -(-streams // block), 2](
            inputs[:, layer],
            narrow[:, layer],
            reach,
            near,
            rows,
            place,
            ages,
            x,
            outputs,
            inputs.stride(0),
            inputs.stride(2),
            inputs.stride(3),
            narrow.stride(0),
            narrow.stride(2),
            narrow.stride(3),
            ages.stride(0),
            x.stride(0),
            x.stride(1),
            streams,
            FILTERS=filters,
            COORDINATES=coordinates,
            SLOTS=slots,
            AT_ONCE=min(slots, SLOTS_AT_ONCE),
            BLOCK_FILTERS=block_filters,
            BLOCK=block,
            num_warps=4,
        )
    return outputs


@jit
def _alternating_field_kernel(
    inputs,
    narrow,
    reach,
    near,
    rows,
    place,
    ages,
    x,
    outputs,
    input_row,
    input_signal,
    input_slot,
    narrow_row,
    narrow_signal,
    narrow_coordinate,
    age_row,
    x_row,
    x_stream,
    num_streams,
    FILTERS: tl.constexpr,
    COORDINATES: tl.constexpr,
    SLOTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the outputs of a block of streams of one signal of a token."""
    token, signal = tl.program_id(0), tl.program_id(2)
    streams = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    filters = tl.arange(0, BLOCK_FILTERS)
    exists, counts = streams < num_streams, filters < FILTERS
    row, now = tl.load(rows + token), tl.load(place)
    sign = 1 - 2 * (signal * (now % 2))
    new = tl.load(x + token * x_row + streams * x_stream, mask=exists, other=0)
    new = new.to(inputs.dtype.element_ty) * sign
    page = inputs + row * input_row + signal * input_signal + streams
    tl.store(page + now * input_slot, new, mask=exists)
    taps = near + now * FILTERS * SLOTS + filters * SLOTS
    total = tl.load(taps + now, mask=counts, other=0)[:, None] * new[None, :]
    for first in range(0, now, AT_ONCE):
        for more in tl.static_range(AT_ONCE):
            slot = first + more
            tap = tl.load(taps + slot, mask=counts & (slot < now), other=0)
            past = tl.load(page + slot * input_slot, mask=exists & (slot < now), other=0)
            total += tap[:, None] * past[None, :]
    steps = tl.minimum(now, tl.load(ages + token * age_row))
    shares = reach + steps * FILTERS * COORDINATES + filters * COORDINATES
    state = narrow + row * narrow_row + signal * narrow_signal + streams
    for coordinate in range(COORDINATES):
        share = tl.load(shares + coordinate, mask=counts, other=0)
        own = tl.load(state + coordinate * narrow_coordinate, mask=exists, other=0)
        total += share[:, None] * own[None, :]
    places = ((token * num_streams + streams)[None, :] * 2 + signal) * FILTERS + filters[:, None]
    total = (total * sign).to(outputs.dtype.element_ty)
    tl.store(outputs + places, total, mask=counts[:, None] & exists[None, :])
