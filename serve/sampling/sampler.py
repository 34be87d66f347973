"""From logits to token ids, the same for a request whatever else is in its batch.

The settings apply in this order: bias, penalties, temperature, top-k, top-p, min-p.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from serve.config import is_whole
from serve.sampling.history import TokenHistory

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens. Raises ValueError for a value that is not allowed."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most probable token always."""
    top_k: int = 0
    """Choose among this many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Then among the fewest most probable ones that hold this share of the probability: 1: all, 0:
    the most probable one."""
    min_p: float = 0.0
    """Then among those at least this share as probable as the most probable one; 0: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the new text are divided by it if positive, else multiplied
    (Keskar et al. 2019); 1: none."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the new text."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the new text, once for each time they are there."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    logprobs: int | None = None
    """Report each new token's log probability, and those of so many most probable ones."""
    seed: int = 0
    """With a token's position, all that decides its random number."""

    def __post_init__(self) -> None:
        self._require("temperature", _is_number(self.temperature), "a finite number >= 0")
        is_count = is_whole(self.top_k) and self.top_k < 2**31
        self._require("top_k", is_count, "a whole number from 0 (for all tokens) to 2**31 - 1")
        is_share = _is_number(self.top_p) and self.top_p <= 1
        self._require("top_p", is_share, "from 0 (for the most probable token) to 1 (for all)")
        is_share = _is_number(self.min_p) and self.min_p <= 1
        self._require("min_p", is_share, "from 0 (for all tokens) to 1")
        is_factor = _is_number(self.repetition_penalty, 0.01, 100)
        self._require("repetition_penalty", is_factor, "a number from 0.01 to 100 (1 for none)")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, _is_number(getattr(self, name), -2, 2), "a number from -2 to 2")
        bias = self.logit_bias
        is_bias = isinstance(bias, Mapping) and all(
            is_whole(token) and _is_number(value, -100, 100) for token, value in bias.items()
        )
        self._require("logit_bias", is_bias, "a number from -100 to 100 for each of some token ids")
        is_count = self.logprobs is None or is_whole(self.logprobs)
        is_count = is_count and (self.logprobs or 0) <= MOST_LOGPROBS
        self._require("logprobs", is_count, f"from 0 to {MOST_LOGPROBS}, or null for none")
        self._require("seed", is_whole(self.seed) and self.seed < 2**64, "from 0 to 2**64 - 1")

    @property
    def needs_history(self) -> bool:
        """Whether the logits depend on more than the model."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return bool(self.logit_bias) or penalties != (1, 0, 0)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before any sampling setting."""

    token: int
    logprob: float
    """Of the token that was chosen."""
    top: dict[int, float]
    """The most probable tokens and theirs, the most probable first, of equal ones the lower id."""


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


def _is_number(value: object, least: float = 0, most: float = sys.float_info.max) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and least <= value <= most  # type: ignore[operator]
