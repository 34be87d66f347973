"""Windowed attention with the whole `T x T` score matrix, one head at a time, in float64."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def slopes(num_heads: int) -> list[float]:
    """ALiBi slopes times 0.25, by Press et al.'s recursion."""

    def unscaled(n: int) -> list[float]:
        if n & (n - 1) == 0:
            s = 2.0 ** (-8.0 / n)
            return [s**h for h in range(1, n + 1)]
        below = 1 << (n.bit_length() - 1)
        return unscaled(below) + unscaled(2 * below)[0::2][: n - below]

    return [0.25 * s for s in unscaled(num_heads)]


def attention(q: Array, k: Array, v: Array, window_tokens: int, softcap: float) -> Array:
    """`[B, T, heads, head_dim]` each; every score by its formula."""
    batch, length, heads, head_dim = q.shape
    outputs = np.zeros_like(q)
    for b in range(batch):
        for h, slope in enumerate(slopes(heads)):
            for i in range(length):
                keys = range(max(0, i - window_tokens), i + 1)
                products = np.array([q[b, i, h] @ k[b, j, h] for j in keys]) / np.sqrt(head_dim)
                distances = np.array([i - j for j in keys])
                scores = softcap * np.tanh(products / softcap) - slope * distances
                weights = np.exp(scores - scores.max())
                outputs[b, i, h] = (weights / weights.sum()) @ v[b, list(keys), h]
    return outputs
