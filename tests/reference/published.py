"""The forward pass of the published Flash-STU, from its tensors by their published names.

Everything in float64 and as its formula says: both branches of an STU layer on their own, each
convolution as a lower triangular matrix, each attention score alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def logits(
    weights: Mapping[str, Array], config: Mapping[str, Any], tokens: NDArray[np.int64]
) -> Array:
    """`[T] -> [T, vocab_size]`."""
    x = weights["tok_emb.weight"][tokens]
    for i in range(config["n_layers"]):
        layer = {
            name.removeprefix(f"layers.{i}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{i}.")
        }
        if i % 2 == 1 and config["use_attn"]:
            x = x + attention(norm(x, layer["attn_norm.weight"], config), layer, config)
        else:
            x = x + stu(norm(x, layer["stu_norm.weight"], config), layer, weights["phi"])
        x = x + mlp(norm(x, layer["mlp_norm.weight"], config), layer)
    return norm(x, weights["norm.weight"], config) @ weights["lm_head.weight"].T


def norm(x: Array, weight: Array, config: Mapping[str, Any]) -> Array:
    eps = config.get("norm_eps", 2**-23)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def mlp(x: Array, layer: Mapping[str, Array]) -> Array:
    gate = x @ layer["mlp.gate_proj.weight"].T
    gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * (x @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T


def stu(x: Array, layer: Mapping[str, Array], phi: Array) -> Array:
    signs = (-1.0) ** np.arange(len(x))[:, None]
    outputs = np.zeros_like(x)
    if "stu.M_inputs" in layer:
        projected, psi = x @ layer["stu.M_inputs"], phi @ layer["stu.M_filters"]
        for channel in range(x.shape[1]):
            filter_matrix = toeplitz(psi[:, channel], len(x))
            inputs = projected[:, channel : channel + 1]
            plus = filter_matrix @ inputs
            minus = signs * (filter_matrix @ (signs * inputs))
            outputs[:, channel] = (plus + minus)[:, 0]
    else:
        for k in range(phi.shape[1]):
            filter_matrix = toeplitz(phi[:, k], len(x))
            outputs += filter_matrix @ x @ layer["stu.M_phi_plus"][k]
            outputs += signs * (filter_matrix @ (signs * x)) @ layer["stu.M_phi_minus"][k]
    return outputs


def toeplitz(taps: Array, length: int) -> Array:
    """`[t, s] = taps[t - s]` for `s <= t`."""
    matrix = np.zeros((length, length))
    for t in range(length):
        for s in range(t + 1):
            matrix[t, s] = taps[t - s]
    return matrix


def attention(x: Array, layer: Mapping[str, Array], config: Mapping[str, Any]) -> Array:
    length, width = x.shape
    heads, softcap = config["n_heads"], config["softcap"]
    head_dim = width // heads
    fused = x @ layer["attn.c_attn.weight"].T
    queries, keys, values = fused[:, :width], fused[:, width : 2 * width], fused[:, 2 * width :]
    outputs = np.zeros_like(x)
    for head, slope in enumerate(slopes(heads)):
        its = slice(head * head_dim, (head + 1) * head_dim)
        for i in range(length):
            seen = range(max(0, i - config["window_size"]), i + 1)
            scores = [
                softcap * math.tanh(queries[i, its] @ keys[j, its] / math.sqrt(head_dim) / softcap)
                - slope * (i - j)
                for j in seen
            ]
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            outputs[i, its] = sum(
                weight * values[j, its] for weight, j in zip(weights, seen, strict=True)
            )
    return outputs @ layer["attn.c_proj.weight"].T


def slopes(heads: int) -> list[float]:
    """ALiBi's, with their recursion for numbers of heads that are no power of two, times 0.25."""

    def geometric(n: int) -> list[float]:
        start = 2 ** -(2 ** (3 - math.log2(n)))
        return [start ** (i + 1) for i in range(n)]

    below = 2 ** math.floor(math.log2(heads))
    rest = geometric(2 * below)[::2][: heads - below]
    return [0.25 * slope for slope in geometric(below) + rest]
