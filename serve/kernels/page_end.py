"""End of a page of spectral states: the states take its inputs in, and the next page is pending.

A coordinate of a state decays by itself: after the page it is what is left of it, and the sum of
what is left of each input. The next page's pending outputs, or the narrow states that they follow
from, are sums over the coordinates. All is summed in float64.
"""

from __future__ import annotations  # annotations of kernels need Triton

import torch
from torch import Tensor

from serve.kernels.dispatch import jit, power_of_two, tl, uses_triton
from serve.kernels.near_field import vectors

TILE = 2048
"""Numbers of a state that a program has in registers."""
MOST_CHANNELS = 32
"""Channels of a program."""


def page_end(
    states: Tensor,
    inputs: Tensor,
    pending: Tensor,
    decays: Tensor,
    coefficients: Tensor,
    joined_at: Tensor,
    layers: Tensor,
    rows: Tensor,
) -> None:
    """End the pages of `layers` for all `rows`, and begin the next ones.

    Args:
        states: States before the page, `[rows, layers, signals, r, C]` in float64, contiguous.
        inputs: Inputs of the page, `[rows, layers, signals, slots, C]`.
        pending: Pending outputs of a page, in the same shape and dtype. They become those of the
            next page. Or narrow states, `[rows, layers, signals, m, C]`.
        decays: Factors of the coordinates after 0, 1, .. more inputs, `[> slots, r]` in float64.
        coefficients: Weights of the coordinates in the next output, `[layers, r, C]` in float64,
            where places take turns over the signals. Or weights of the coordinates in narrow
            states, `[m, r]`, where each signal has a slot for every place.
        joined_at: Place in the page at which a row joined, else 0, `[rows, layers]`; its inputs
            before are 0. It becomes 0.
        layers: Numbers of the layers whose pages end, `[n]`, no two alike; -1 stands for none.
        rows: Rows of the batch, `[B]`. Those that occur twice, as padding may, become undefined.
    """
    run = triton_page_end if uses_triton(states) else torch_page_end
    run(states, inputs, pending, decays, coefficients, joined_at, layers, rows)


def torch_page_end(
    states: Tensor,
    inputs: Tensor,
    pending: Tensor,
    decays: Tensor,
    coefficients: Tensor,
    joined_at: Tensor,
    layers: Tensor,
    rows: Tensor,
) -> None:
    """Do as `page_end`, in torch.

    Row by row, a state is in the processor's cache until all is done, and nothing depends on the
    other rows.
    """
    signals, slots = inputs.shape[2:4]
    is_mixed = coefficients.ndim == 3
    into = decays[:slots].flip(0).T.expand(signals, -1, -1)
    later = (decays[:slots] if is_mixed else coefficients).expand(signals, -1, -1)
    lag_step = signals if is_mixed else 1
    numbers = torch.arange(signals, device=states.device) % lag_step
    flat = states.flatten(0, 1)  # [rows layers, signals, r, C]
    kept, input_strides = vectors(inputs)
    due, pending_strides = vectors(pending)
    for number in torch.split(layers, 1):
        ends, layer = number >= 0, number.clamp(min=0)
        joined = joined_at[rows, layer]
        before = (joined[:, None] - numbers + lag_step - 1) // lag_step
        rest = torch.where(ends, decays[slots - before].unsqueeze(-1), 1)  # [B, signals, r, 1]
        weights = coefficients.index_select(0, layer) if is_mixed else None
        for own_rest, row in zip(rest, torch.split(rows, 1), strict=True):
            page = _page(row, layer, inputs.shape, input_strides)
            taken = kept.index_select(0, page).masked_fill_(~ends, 0).double()
            place = row * len(states[0]) + layer
            state = flat.index_select(0, place)[0].mul_(own_rest)
            state.baddbmm_(into, taken.view(signals, slots, -1))
            flat.index_copy_(0, place, state[None])
            weighted = state if weights is None else weights * state
            outputs = torch.bmm(later, weighted).flatten(0, 1).to(pending.dtype)
            page = _page(row, layer, pending.shape, pending_strides)
            due.index_copy_(0, page, torch.where(ends, outputs, due.index_select(0, page)))
        joined_at.index_put_((rows, layer), torch.where(ends, 0, joined))


def _page(row: Tensor, layer: Tensor, shape: torch.Size, strides: list[int]) -> Tensor:
    """Return the places of a page's vectors, signal by signal."""
    per_row, per_layer, per_signal, per_slot = strides
    signals = torch.arange(shape[2], device=row.device)[:, None] * per_signal
    slots = torch.arange(shape[3], device=row.device) * per_slot
    return (signals + slots).flatten() + (row * per_row + layer * per_layer)


def triton_page_end(
    states: Tensor,
    inputs: Tensor,
    pending: Tensor,
    decays: Tensor,
    coefficients: Tensor,
    joined_at: Tensor,
    layers: Tensor,
    rows: Tensor,
) -> None:
    """Do as `page_end`, in Triton."""
    signals, rank, channels = states.shape[2:]
    is_mixed, block_rank = coefficients.ndim == 3, power_of_two(rank)
    block = min(power_of_two(channels), MOST_CHANNELS, max(TILE // block_rank, 1))
    with torch.cuda.device_of(states):
        _page_end_kernel[-(-channels // block) * signals, len(layers), len(rows)](
            states,
            inputs,
            pending,
            decays,
            coefficients,
            joined_at,
            layers,
            rows,
            states.stride(0),
            states.stride(1),
            *inputs.stride()[:4],
            *pending.stride()[:4],
            joined_at.stride(0),
            channels,
            RANK=rank,
            SIGNALS=signals,
            LAG_STEP=signals if is_mixed else 1,
            SLOTS=inputs.shape[3],
            OUTPUTS=pending.shape[3],
            IS_MIXED=is_mixed,
            BLOCK_RANK=block_rank,
            BLOCK=block,
            num_warps=4,
        )
    # Programs of other channels read where their row joined, so none of them can write it.
    ended = layers.clamp(min=0)
    for layer, number in zip(torch.split(ended, 1), torch.split(layers, 1), strict=True):
        joined = joined_at[rows, layer]
        joined_at.index_put_((rows, layer), torch.where(number >= 0, 0, joined))


@jit
def _page_end_kernel(
    states,
    inputs,
    pending,
    decays,
    coefficients,
    joined_at,
    layers,
    rows,
    state_row,
    state_layer,
    input_row,
    input_layer,
    input_signal,
    input_slot,
    pending_row,
    pending_layer,
    pending_signal,
    pending_slot,
    joined_row,
    num_channels,
    RANK: tl.constexpr,
    SIGNALS: tl.constexpr,
    LAG_STEP: tl.constexpr,
    SLOTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    IS_MIXED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Advance a block of channels of one signal of a row in a layer."""
    layer = tl.load(layers + tl.program_id(1)).to(tl.int64)
    if layer >= 0:
        row = tl.load(rows + tl.program_id(2)).to(tl.int64)
        signal = tl.program_id(0) % SIGNALS
        channels = tl.program_id(0) // SIGNALS * BLOCK + tl.arange(0, BLOCK)
        coordinates = tl.arange(0, BLOCK_RANK)
        exists, counts = channels < num_channels, coordinates < RANK
        both = counts[:, None] & exists[None, :]
        places = coordinates[:, None] * num_channels + channels[None, :]
        joined = tl.load(joined_at + row * joined_row + layer)
        left = SLOTS - (joined - signal % LAG_STEP + LAG_STEP - 1) // LAG_STEP
        own = states + row * state_row + layer * state_layer + signal * RANK * num_channels + places
        rest = tl.load(decays + left * RANK + coordinates, mask=counts, other=0)
        state = rest[:, None] * tl.load(own, mask=both, other=0)
        page = inputs + row * input_row + layer * input_layer + signal * input_signal + channels
        for slot in range(SLOTS):
            share = decays + (SLOTS - 1 - slot) * RANK + coordinates
            share = tl.load(share, mask=counts, other=0)
            taken = tl.load(page + slot * input_slot, mask=exists, other=0).to(tl.float64)
            state += share[:, None] * taken[None, :]
        tl.store(own, state, mask=both)
        later = coefficients
        if IS_MIXED:
            weights = coefficients + layer * RANK * num_channels + places
            state *= tl.load(weights, mask=both, other=0)
            later = decays
        due = pending + row * pending_row + layer * pending_layer
        due += signal * pending_signal + channels
        for output in range(OUTPUTS):
            share = tl.load(later + output * RANK + coordinates, mask=counts, other=0)
            outputs = tl.sum(share[:, None] * state, 0)
            tl.store(due + output * pending_slot, outputs.to(pending.dtype.element_ty), mask=exists)
