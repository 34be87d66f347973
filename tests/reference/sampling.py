"""Sampling one token of one row with sorted lists and plain sums."""

import math

import numpy as np


def uniform(seed, position):
    """The first 53 bits of the Philox stream that `seed` and `position` name, over 2^53."""
    return (int(np.random.Philox(key=seed, counter=position).random_raw()) >> 11) / 2**53


def kept(logits, temperature, top_k, top_p):
    """Probabilities `{id: p}` of the tokens that may be chosen, ids ascending, sum 1."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        ranked = ranked[:top_k]
    weights = {i: math.exp((logits[i] - logits[ranked[0]]) / temperature) for i in ranked}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for i in ranked:
        if top_p < 1 and mass >= top_p * total:
            break
        nucleus.append(i)
        mass += weights[i]
    return {i: weights[i] / mass for i in sorted(nucleus)}


def sample(logits, params, position):
    """The token id that `params` choose for `position`."""
    if params.temperature == 0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    probabilities = kept(logits, params.temperature, params.top_k, params.top_p)
    target, cumulative = uniform(params.seed, position), 0.0
    for i, probability in probabilities.items():
        cumulative += probability
        if cumulative > target:
            return i
    return i
