"""Sampling of token ids from logits, where a row's token does not depend on the other rows."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from serve.request import TokenLogprobs
from serve.sampling.processors import (
    LOGITS_PROCESSORS,
    WEIGHT_PROCESSORS,
    TokenHistory,
    needs_history,
    process,
)
from serve.sampling_params import SamplingParams

ROWS_AT_ONCE = 16
"""Rows whose log probabilities are computed together. In float64, more would fit no processor's
cache."""


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Mapping[int, TokenHistory],
) -> Tensor:
    """Return the next token of every row: logits `[B, vocab_size]` -> ids `[B]`.

    Args:
        logits: The largest of every row must be finite. The lower id of equal logits counts as more
            probable.
        params: Settings of each row.
        positions: Position of each row's new token in its own sequence.
        histories: Token histories by row, for rows whose settings need one (`needs_history`).
    """
    changed = [row for row, own in enumerate(params) if needs_history(own)]
    if changed:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        process(LOGITS_PROCESSORS, logits, params, histories)
        largest = torch.finfo(logits.dtype).max
        logits[changed] = logits[changed].clamp(-largest, largest)  # a penalty may go beyond
    ids = logits.argmax(-1)
    random = [row for row, own in enumerate(params) if own.temperature > 0]
    if random:
        chosen, places = [params[row] for row in random], [positions[row] for row in random]
        ids[random] = _draw(logits[random].double(), chosen, places)
    return ids


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], counts: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Return log probabilities of each row's token and of its `count` most probable ones.

    logits: `[B, vocab_size]`. A row whose count is None gets None.
    """
    asked = [row for row, count in enumerate(counts) if count is not None]
    results: list[TokenLogprobs | None] = [None] * len(counts)
    if not asked:
        return results
    own = logits if len(asked) == len(counts) else logits[asked]
    chosen = torch.tensor([tokens[row] for row in asked], device=logits.device)
    parts = (torch.split(whole, ROWS_AT_ONCE) for whole in (own, chosen))
    of_chosen, most_probable = [], list[dict[int, float]]()
    for part, ids in zip(*parts, strict=True):
        logprobs = part.double().log_softmax(-1)  # [R, vocab_size]
        of_chosen.append(logprobs.gather(1, ids[:, None])[:, 0])
        rows = asked[len(most_probable) : len(most_probable) + len(part)]
        most_probable += _most_probable(logprobs, [counts[row] or 0 for row in rows])
    values = torch.cat(of_chosen).tolist()
    for row, logprob, top in zip(asked, values, most_probable, strict=True):
        results[row] = TokenLogprobs(tokens[row], logprob, top)
    return results


def _most_probable(logprobs: Tensor, counts: Sequence[int]) -> list[dict[int, float]]:
    """Return each row's `count` largest of `logprobs [R, vocab_size]` by token id, in order."""
    if not any(counts):
        return [{} for _ in counts]
    vocab_size = logprobs.shape[1]
    values, ids = logprobs.topk(min(max(counts) + 1, vocab_size), sorted=True)
    # The lower id of equal values comes first, which topk does not guarantee.
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
            # Others that topk left out may be as probable, with lower ids.
            more = (logprobs[row] >= last).nonzero()[:, 0]  # ascending
            order = logprobs[row, more].argsort(descending=True, stable=True)
            row_ids, row_values = more[order].tolist(), logprobs[row, more[order]].tolist()
        found.append(dict(zip(row_ids[:count], row_values[:count], strict=True)))
    return found


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Draw by the inverse of the cumulative distribution, tokens in the order of their ids."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    temperatures = column([own.temperature for own in params])
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperatures).exp()  # [R, vocab_size]
    process(WEIGHT_PROCESSORS, weights, params, {})
    cumulative = weights.cumsum(-1)
    numbers = [
        _uniform(own.seed, position) for own, position in zip(params, positions, strict=True)
    ]
    # The first token whose cumulative weight is above the target: never one of weight 0.
    return torch.searchsorted(cumulative, column(numbers) * cumulative[:, -1:], right=True)[:, 0]


def _uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on nothing else (Philox, Salmon et al. 2011)."""
    bits = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53
