"""Sampling options, each an entry of `LOGITS_PROCESSORS` or `WEIGHT_PROCESSORS`.

To add an option, add a field to `SamplingParams` and an entry here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from serve.sampling_params import SamplingParams

DEFAULTS = SamplingParams()


class TokenHistory:
    """Tokens of one request that its options refer to, as vectors over the vocabulary."""

    def __init__(
        self,
        vocab_size: int,
        prompt: Sequence[int],
        logit_bias: Mapping[int, float],
        device: str | torch.device = "cpu",
    ) -> None:
        self.bias: Tensor = torch.zeros(vocab_size, device=device)
        """Numbers to add to the logits, float32."""
        self.in_prompt: Tensor = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.new_counts: Tensor = torch.zeros(vocab_size, device=device)
        """How often each token is in the new text, float32."""
        if logit_bias:
            ids = torch.tensor(list(logit_bias), device=device)
            self.bias[ids] = torch.tensor(list(map(float, logit_bias.values())), device=device)
        self.in_prompt[torch.tensor(prompt, device=device)] = True

    def append(self, token: int) -> None:
        """Count the next token of the new text."""
        self.new_counts[token] += 1


class Rows(NamedTuple):
    """Rows of a batch that use an option."""

    values: Tensor
    """Logits or weights `[R, vocab_size]`."""
    params: Sequence[SamplingParams]
    histories: Sequence[TokenHistory]
    """One for each row; none for weights, which depend on no history."""

    def column(self, field: str) -> Tensor:
        """Return a field of each row's settings, `[R, 1]`."""
        numbers = [getattr(params, field) for params in self.params]
        return torch.tensor(numbers, dtype=self.values.dtype, device=self.values.device)[:, None]

    def new_counts(self) -> Tensor:
        """Return how often each token is in the new text, `[R, vocab_size]`."""
        return torch.stack([history.new_counts for history in self.histories])


class Processor(NamedTuple):
    """One sampling option."""

    fields: tuple[str, ...]
    """Fields of `SamplingParams` that switch it on, for the rows where they are not the default."""
    apply: Callable[[Rows], Tensor]
    """Returns the new values of the rows that use it."""

    def is_on(self, params: SamplingParams) -> bool:
        """Return whether the option is used with these settings."""
        return any(getattr(params, name) != getattr(DEFAULTS, name) for name in self.fields)


def process(
    processors: Sequence[Processor],
    values: Tensor,
    params: Sequence[SamplingParams],
    histories: Mapping[int, TokenHistory],
) -> None:
    """Apply `processors` in their order to `values [B, vocab_size]`, in place."""
    for processor in processors:
        rows = [row for row, own in enumerate(params) if processor.is_on(own)]
        if rows:
            past = [histories[row] for row in rows if row in histories]
            values[rows] = processor.apply(Rows(values[rows], [params[i] for i in rows], past))


def needs_history(params: SamplingParams) -> bool:
    """Return whether the logits of a request depend on its `TokenHistory`."""
    return any(processor.is_on(params) for processor in LOGITS_PROCESSORS)


def _add_bias(rows: Rows) -> Tensor:
    return rows.values + torch.stack([history.bias for history in rows.histories])


def _penalize_repetition(rows: Rows) -> Tensor:
    logits, factor = rows.values, rows.column("repetition_penalty")
    in_prompt = torch.stack([history.in_prompt for history in rows.histories])
    penalized = torch.where(logits > 0, logits / factor, logits * factor)
    return torch.where(in_prompt | (rows.new_counts() > 0), penalized, logits)


def _penalize_presence(rows: Rows) -> Tensor:
    return rows.values - rows.column("presence_penalty") * (rows.new_counts() > 0)


def _penalize_frequency(rows: Rows) -> Tensor:
    return rows.values - rows.column("frequency_penalty") * rows.new_counts()


def _keep_most_probable(rows: Rows) -> Tensor:
    """Return weights with 0 for every token that top-k or top-p leaves out.

    Top-p counts the probability that top-k leaves. Of equal weights the lower ids are kept.
    """
    weights, params = rows.values, rows.params
    vocab_size, device = weights.shape[1], weights.device
    most = [min(own.top_k or vocab_size, vocab_size) for own in params]
    # At 1 nothing is left out, not even a tail too small to change the sum.
    shares = [own.top_p if own.top_p < 1 else math.inf for own in params]
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


def _keep_probable(rows: Rows) -> Tensor:
    return rows.values * (rows.values >= rows.column("min_p"))


LOGITS_PROCESSORS = [
    Processor(("logit_bias",), _add_bias),
    Processor(("repetition_penalty",), _penalize_repetition),
    Processor(("presence_penalty",), _penalize_presence),
    Processor(("frequency_penalty",), _penalize_frequency),
]
"""Options that change logits, before the temperature divides them."""
WEIGHT_PROCESSORS = [
    Processor(("top_k", "top_p"), _keep_most_probable),
    Processor(("min_p",), _keep_probable),
]
"""Options that leave tokens out of a random choice. They change float64 weights that are
proportional to the probabilities, with a largest weight of 1."""
