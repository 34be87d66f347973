"""Parts of a decoding step, one number or one row after the other, in float64."""

import numpy as np
from numpy.typing import NDArray

from tests.reference.attention import attention

Array = NDArray[np.float64]


def near_field(inputs: Array, pending: Array, near: Array, slot: int, new: Array) -> Array:
    """Return an output `[C]`: inputs, pending outputs and taps are `[slots, C]`."""
    output = pending[slot].copy()
    for channel in range(len(output)):
        output[channel] += near[0, channel] * new[channel]
        for lag in range(1, slot + 1):
            output[channel] += near[lag, channel] * inputs[slot - lag, channel]
    return output


def page_end(
    state: Array, inputs: Array, rates: Array, coefficients: Array, num_outputs: int
) -> tuple[Array, Array]:
    """Return the state `[r, C]` after inputs `[n, C]`, and the outputs that follow from it.

    rates: `[r]`; of a coordinate, `exp(-rate)` is left after each input. coefficients: `[r, C]`.
    """
    for taken in inputs:
        state = np.exp(-rates)[:, None] * state + taken
    outputs, left = [], state
    for _ in range(num_outputs):
        outputs.append((coefficients * left).sum(0))
        left = np.exp(-rates)[:, None] * left
    return state, np.stack(outputs)


def alternating_field(
    inputs: Array, state: Array, weights: Array, filters: Array, place: int, steps: int, new: Array
) -> Array:
    """Return outputs `[S, 2, K]`: inputs `[slots, S]` of the page, and of each signal a state
    `[2, m, S]`, of which `weights [slots, K, m]` are in the outputs after so many steps.

    filters: `[slots, K]`, and their number for lag 0 first.
    """
    past = [*inputs[:place], new]
    outputs = np.zeros((len(new), 2, filters.shape[1]))
    for stream in range(len(new)):
        for number in range(filters.shape[1]):
            for signal, alternates in enumerate((1, -1)):
                share = alternates**place * (weights[steps, number] @ state[signal, :, stream])
                for lag in range(place + 1):
                    tap = alternates**lag * filters[lag, number]
                    share += tap * past[place - lag][stream]
                outputs[stream, signal, number] = share
    return outputs


def norm(x: Array, weight: Array, eps: float) -> Array:
    """Return RMSNorm of `[B, D]`."""
    return np.stack([row / np.sqrt((row * row).mean() + eps) * weight for row in x])


def gated_product(gate_up: Array) -> Array:
    """Return `gelu(gate) * up`, `[B, H]`, with GELU's approximation by tanh."""
    gate, up = np.split(gate_up, 2, axis=1)
    bend = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
    return 0.5 * gate * (1 + bend) * up


def narrow_product(x: Array, values: Array, scales: Array) -> Array:
    """Return `[B, out]`: x is `[B, in]`, weights `[out, in]` with a scale `[out]` each."""
    products = np.empty((len(x), len(values)))
    for output, (own, scale) in enumerate(zip(values, scales, strict=True)):
        for row, inputs in enumerate(x):
            products[row, output] = (inputs * own * scale).sum()
    return products


def window_attention(
    queries: Array, keys: Array, values: Array, window_tokens: int, softcap: float
) -> Array:
    """Return the last token's output `[heads, head_dim]`; all are `[T, heads, head_dim]`."""
    return attention(queries[None], keys[None], values[None], window_tokens, softcap)[0, -1]
