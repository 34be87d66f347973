"""Sampling one token of one row with sorted lists and plain sums."""

import math

import numpy as np


def uniform(seed, position):
    """The first 53 bits of the Philox stream that `seed` and `position` name, over 2^53."""
    return (int(np.random.Philox(key=seed, counter=position).random_raw()) >> 11) / 2**53


def adjusted(logits, params, prompt, new):
    """The logits after bias and penalties, of a row with these tokens so far."""
    result = []
    for i, logit in enumerate(logits):
        logit += params.logit_bias.get(i, 0)
        if i in prompt or i in new:
            by = params.repetition_penalty
            logit = logit / by if logit > 0 else logit * by
        if i in new:
            logit -= params.presence_penalty
        logit -= params.frequency_penalty * new.count(i)
        result.append(logit)
    return result


def kept(logits, temperature, top_k, top_p, min_p=0):
    """Probabilities `{id: p}` of the tokens that may be chosen, ids ascending, sum 1."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        ranked = ranked[:top_k]
    weights = {i: math.exp((logits[i] - logits[ranked[0]]) / temperature) for i in ranked}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for i in ranked:
        if top_p < 1 and nucleus and mass >= top_p * total:
            break
        nucleus.append(i)
        mass += weights[i]
    nucleus = [i for i in nucleus if weights[i] >= min_p]
    mass = sum(weights[i] for i in nucleus)
    return {i: weights[i] / mass for i in sorted(nucleus)}


def sample(logits, params, position, prompt=(), new=()):
    """The token id that `params` choose for `position`."""
    logits = adjusted(logits, params, prompt, new)
    if params.temperature == 0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    probabilities = kept(logits, params.temperature, params.top_k, params.top_p, params.min_p)
    target, cumulative = uniform(params.seed, position), 0.0
    for i, probability in probabilities.items():
        cumulative += probability
        if cumulative > target:
            return i
    return i


def logprobs(logits, token, count):
    """The token's log probability, the `count` largest by token id, the largest first, and the
    token's place among all."""
    largest = max(logits)
    log_sum = largest + math.log(math.fsum(math.exp(x - largest) for x in logits))
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    top = {i: logits[i] - log_sum for i in ranked[:count]}
    return logits[token] - log_sum, top, ranked.index(token) + 1
