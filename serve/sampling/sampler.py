"""From logits to token ids, the same for a request whatever else is in its batch.

The settings apply in this order: bias, penalties, temperature, top-k, top-p, min-p.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from serve.request import TokenLogprobs
from serve.sampling_params import SamplingParams


class TokenHistory:
    """Dense over the vocabulary, so that the rows of a batch are adjusted together."""

    def __init__(
        self,
        vocab_size: int,
        prompt: Sequence[int],
        logit_bias: Mapping[int, float],
        device: str | torch.device = "cpu",
    ) -> None:
        self.bias: Tensor = torch.zeros(vocab_size, device=device)
        """Added to the logits, float32."""
        self.in_prompt: Tensor = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.new_counts: Tensor = torch.zeros(vocab_size, device=device)
        """How often each token is in the new text, float32."""
        if logit_bias:
            ids = torch.tensor(list(logit_bias), device=device)
            self.bias[ids] = torch.tensor(list(map(float, logit_bias.values())), device=device)
        self.in_prompt[torch.tensor(prompt, device=device)] = True

    def append(self, token: int) -> None:
        """`token` is the next of the new text."""
        self.new_counts[token] += 1


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Mapping[int, TokenHistory],
) -> Tensor:
    """The next token of every row: logits `[B, vocab_size]` -> ids `[B]`.

    positions: where in its own sequence each row's new token goes. histories: by row, of those
    whose params need one. A row's id depends on its own arguments alone. Of equal logits the lower
    id counts as more probable. The largest logit of every row must be finite.
    """
    logits = _adjusted(logits, params, histories)
    ids = logits.argmax(-1)
    random = [row for row, its in enumerate(params) if its.temperature > 0]
    if random:
        chosen, places = [params[row] for row in random], [positions[row] for row in random]
        ids[random] = _draw(logits[random].double(), chosen, places)
    return ids


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], counts: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Each row's token, and so many most probable ones, from logits `[B, vocab_size]`; None for a
    row that does not ask."""
    asked = [row for row, count in enumerate(counts) if count is not None]
    results: list[TokenLogprobs | None] = [None] * len(counts)
    if not asked:
        return results
    logprobs = logits[asked].double().log_softmax(-1)  # [R, vocab_size]
    chosen = torch.tensor([tokens[row] for row in asked], device=logits.device)
    of_chosen = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    most_probable = _most_probable(logprobs, [counts[row] or 0 for row in asked])
    for row, logprob, top in zip(asked, of_chosen, most_probable, strict=True):
        results[row] = TokenLogprobs(tokens[row], logprob, top)
    return results


def _most_probable(logprobs: Tensor, counts: Sequence[int]) -> list[dict[int, float]]:
    """Each row's `count` largest of `logprobs [R, vocab_size]`, by token id, in order."""
    vocab_size = logprobs.shape[1]
    values, ids = logprobs.topk(min(max(counts) + 1, vocab_size), sorted=True)
    # Of equal values the lower id goes first, which topk does not see to.
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    found = []
    for row, (count, row_ids, row_values) in enumerate(
        zip(counts, ids.tolist(), values.tolist(), strict=True)
    ):
        count = min(count, vocab_size)
        last = row_values[-1]
        if 0 < count < vocab_size and row_values[count - 1] == last:
            # Others beyond these may be as probable, with lower ids.
            more = (logprobs[row] >= last).nonzero()[:, 0]  # ascending
            order = logprobs[row, more].argsort(descending=True, stable=True)
            row_ids, row_values = more[order].tolist(), logprobs[row, more[order]].tolist()
        found.append(dict(zip(row_ids[:count], row_values[:count], strict=True)))
    return found


def _adjusted(
    logits: Tensor, params: Sequence[SamplingParams], histories: Mapping[int, TokenHistory]
) -> Tensor:
    """`logits` after bias and penalties, in float32 at least."""
    rows = [row for row, its in enumerate(params) if its.needs_history]
    if not rows:
        return logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    chosen, past = [params[row] for row in rows], [histories[row] for row in rows]
    adjusted = logits[rows] + torch.stack([its.bias for its in past])  # [R, vocab_size]
    counts = torch.stack([its.new_counts for its in past])
    seen = torch.stack([its.in_prompt for its in past]) | (counts > 0)
    factor = column([its.repetition_penalty for its in chosen])
    penalized = torch.where(adjusted > 0, adjusted / factor, adjusted * factor)
    adjusted = torch.where(seen, penalized, adjusted)
    adjusted -= column([its.presence_penalty for its in chosen]) * (counts > 0)
    adjusted -= column([its.frequency_penalty for its in chosen]) * counts
    largest = torch.finfo(logits.dtype).max
    logits[rows] = adjusted.clamp(-largest, largest)  # a penalty may have gone beyond
    return logits


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Inverse of the cumulative distribution over the kept tokens, in the order of their ids."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    temperatures = column([its.temperature for its in params])
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperatures).exp()  # [R, vocab_size]
    if any(its.top_k or its.top_p < 1 for its in params):
        weights = _keep_most_probable(weights, params)
    if any(its.min_p > 0 for its in params):
        weights = weights * (weights >= column([its.min_p for its in params]))  # the largest is 1
    cumulative = weights.cumsum(-1)
    uniforms = column([_uniform(its.seed, at) for its, at in zip(params, positions, strict=True)])
    # The first token whose cumulative weight is above the target: never one of weight 0.
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)[:, 0]


def _keep_most_probable(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`weights [R, vocab_size]` with 0 for every token that top-k or top-p leaves out."""
    vocab_size, device = weights.shape[1], weights.device
    most = [min(its.top_k or vocab_size, vocab_size) for its in params]
    # At 1 nothing is left out, not even a tail too small to change the sum.
    shares = [its.top_p if its.top_p < 1 else math.inf for its in params]
    top_k = torch.tensor(most, device=device)[:, None]
    top_p = torch.tensor(shares, dtype=torch.float64, device=device)[:, None]

    largest = weights.topk(max(most)).values  # [R, k], descending
    largest = largest.masked_fill(torch.arange(max(most), device=device) >= top_k, 0)
    mass = largest.cumsum(-1)
    mass_before = pad(mass, (1, -1))
    count = (mass_before < top_p * mass[:, -1:]).sum(-1, keepdim=True).clamp(min=1).minimum(top_k)

    threshold = largest.gather(1, count - 1)
    above, equal = weights > threshold, weights == threshold
    room = count - above.sum(-1, keepdim=True)
    return weights * (above | (equal & (equal.cumsum(-1) <= room)))


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (Philox, Salmon et al. 2011)."""
    bits = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53
