"""The forward pass of the published Flash-STU, from its tensors by their published names.

Everything in float64 and as its formula says: both branches of an STU layer on their own, direct
sums, and every attention score alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference.attention import attention as windowed
from tests.reference.convolution import stu_full, stu_tensordot

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
    if "stu.M_inputs" in layer:
        return stu_tensordot(x[None], phi, layer["stu.M_inputs"], layer["stu.M_filters"])[0]
    return stu_full(x[None], phi, layer["stu.M_phi_plus"], layer["stu.M_phi_minus"])[0]


def attention(x: Array, layer: Mapping[str, Array], config: Mapping[str, Any]) -> Array:
    heads = config["n_heads"]
    fused = (x @ layer["attn.c_attn.weight"].T).reshape(1, len(x), 3 * heads, -1)
    queries, keys, values = np.split(fused, 3, axis=2)
    outputs = windowed(queries, keys, values, config["window_size"], config["softcap"])
    return outputs.reshape(x.shape) @ layer["attn.c_proj.weight"].T
