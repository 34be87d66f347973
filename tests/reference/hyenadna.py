"""HyenaDNA's language model by its formulas, from tensors by their published names, in float64.

Nguyen et al. 2023, "HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide
Resolution", arXiv:2306.15794; its layers are those of Poli et al. 2023, arXiv:2302.10866, in blocks
of a GPT-2. Every sum over lags is a loop or a direct convolution.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tests.reference.convolution import causal

Array = NDArray[np.float64]


def logits(weights: Mapping[str, Array], tokens: NDArray[np.int64], shift: float) -> Array:
    """`[T] -> [T, vocab_size]`; shift: number that is added to the windows of filters."""
    embedding = weights["backbone.embeddings.word_embeddings.weight"]
    x = embedding[tokens]
    num_layers = len([name for name in weights if name.endswith("norm1.weight")])
    for i in range(num_layers):
        start = f"backbone.layers.{i}."
        layer = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        x = x + mixer(norm(x, layer, "norm1"), layer, shift)
        hidden = linear(norm(x, layer, "norm2"), layer, "mlp.fc1")
        bent = (
            0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        )
        x = x + linear(bent, layer, "mlp.fc2")
    return norm(x, weights, "backbone.ln_f") @ embedding.T


def norm(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def mixer(x: Array, layer: Mapping[str, Array], shift: float) -> Array:
    """`[T, D]` both ways."""
    projected = linear(x, layer, "mixer.in_proj")
    short, bias = layer["mixer.short_filter.weight"][:, 0], layer["mixer.short_filter.bias"]
    convolved = np.zeros_like(projected)
    for t in range(len(x)):
        for tap in range(3):  # the last tap is that of the token itself
            if t + tap >= 2:
                convolved[t] += short[:, tap] * projected[t + tap - 2]
    first, second, values = np.split(convolved + bias, 3, axis=1)
    gated = second * values
    filters = np.array([implicit_filter(lag, layer, shift) for lag in range(len(x))])
    mixed = causal(gated[None], filters)[0] + layer["mixer.filter_fn.bias"] * gated
    return linear(first * mixed, layer, "mixer.out_proj")


def implicit_filter(lag: int, layer: Mapping[str, Array], shift: float) -> Array:
    """`[D]`, without the term that passes a token's own input."""
    start = "mixer.filter_fn."
    features, time = layer[f"{start}pos_emb.z"][0, lag], layer[f"{start}pos_emb.t"][0, lag, 0]
    hidden = features
    for place in (0, 2, 4):
        hidden = linear(hidden, layer, f"{start}implicit_filter.{place}")
        hidden = np.sin(layer[f"{start}implicit_filter.1.freq"][0] * hidden)
    values = layer[f"{start}implicit_filter.6.weight"] @ hidden
    decays = np.abs(layer[f"{start}modulation.deltas"][0, 0])
    return values * (np.exp(-decays * time) + shift)
