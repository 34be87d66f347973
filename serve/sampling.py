"""From logits to token ids, the same for a request whatever else is in its batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens. Raises ValueError for a value that is not allowed."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most probable token always."""
    top_k: int = 0
    """Choose among this many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Then among the fewest most probable ones that hold this share of the probability; 1: all."""
    seed: int = 0
    """With a token's position, all that decides its random number."""

    def __post_init__(self) -> None:
        self._require("temperature", _is_number(self.temperature), "a finite number >= 0")
        self._require("top_k", _is_whole(self.top_k), "a whole number >= 0 (0 for all tokens)")
        is_share = _is_number(self.top_p) and 0 < self.top_p <= 1
        self._require("top_p", is_share, "above 0 and at most 1 (1 for all tokens)")
        self._require("seed", _is_whole(self.seed) and self.seed < 2**64, "from 0 to 2**64 - 1")

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
    """The most probable tokens and theirs, the most probable first."""


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """The next token of every row: logits `[B, vocab_size]` -> ids `[B]`.

    positions: where in its own sequence each row's new token goes. A row's id depends on its own
    logits, params and position alone. Of equal logits the lower id counts as more probable.

    Raises ValueError if the largest logit of a row is not finite.
    """
    if not logits.amax(-1).isfinite().all():
        raise ValueError(
            "the model's logits are not finite: its weights are damaged, or too large for this "
            "dtype; try another checkpoint, or float32"
        )
    ids = logits.argmax(-1)
    random = [row for row, its in enumerate(params) if its.temperature > 0]
    if random:
        chosen, places = [params[row] for row in random], [positions[row] for row in random]
        ids[random] = _draw(logits[random].double(), chosen, places)
    return ids


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Inverse of the cumulative distribution over the kept tokens, in the order of their ids."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    temperatures = column([its.temperature for its in params])
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperatures).exp()  # [R, vocab_size]
    if any(its.top_k or its.top_p < 1 for its in params):
        weights = _keep_most_probable(weights, params)
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
    count = (mass_before < top_p * mass[:, -1:]).sum(-1, keepdim=True).minimum(top_k)

    threshold = largest.gather(1, count - 1)
    above, equal = weights > threshold, weights == threshold
    room = count - above.sum(-1, keepdim=True)
    return weights * (above | (equal & (equal.cumsum(-1) <= room)))


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (Philox, Salmon et al. 2011)."""
    bits = int(np.random.Philox(key=seed, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and 0 <= value < math.inf  # type: ignore[operator]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
