"""Sampling options, each an entry of `LOGITS_PROCESSORS` or `WEIGHT_PROCESSORS`.

To add an option, add a field to `SamplingParams` and an entry here. Its function gets all rows of a
step and returns those with the default value unchanged. It runs in a CUDA graph: shapes may depend
on no value.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from serve.sampling.selection import at_least, keep_first
from serve.sampling.tables import Batch, Table
from serve.sampling_params import SamplingParams

DEFAULTS = SamplingParams()


class Processor(NamedTuple):
    """One sampling option."""

    fields: tuple[str, ...]
    """Fields of `SamplingParams` that switch it on, for the rows where they are not the default."""
    apply: Callable[[Tensor, Batch], Tensor]
    """Returns new logits or weights `[B, vocab_size]`. Called if any row of a step uses it. It may
    overwrite weights, but not logits."""
    tables: tuple[Table, ...] = ()
    """Tables over the vocabulary that it reads."""

    def fields_used(self, params: SamplingParams) -> set[str]:
        """Return the fields that are not the default in these settings."""
        return {name for name in self.fields if getattr(params, name) != getattr(DEFAULTS, name)}


def _add_bias(logits: Tensor, batch: Batch) -> Tensor:
    return logits + batch.bias()


def _penalize_repetition(logits: Tensor, batch: Batch) -> Tensor:
    factor = batch.column("repetition_penalty", logits.dtype)
    penalized = torch.where(logits > 0, logits / factor, logits * factor)
    return torch.where(batch.in_prompt() | (batch.new_counts() > 0), penalized, logits)


def _penalize_presence(logits: Tensor, batch: Batch) -> Tensor:
    return logits - batch.column("presence_penalty", logits.dtype) * (batch.new_counts() > 0)


def _penalize_frequency(logits: Tensor, batch: Batch) -> Tensor:
    return logits - batch.column("frequency_penalty", logits.dtype) * batch.new_counts()


def _keep_most_probable(weights: Tensor, batch: Batch) -> Tensor:
    """Return weights with 0 for every token that top-k or top-p leaves out.

    Top-p counts the probability that top-k leaves. Of equal logits the lower ids are kept.
    """
    if batch.most_kept < weights.shape[1]:
        return _keep_few(weights, batch)
    vocab_size = weights.shape[1]
    if "top_k" in batch.fields:
        top_k = batch.column("top_k", torch.int64)
        count = top_k.masked_fill(top_k == 0, vocab_size)
        ones = count.new_ones(1, 1).expand_as(weights)
        keep_first(weights, batch.logits, ones, count)
    if "top_p" in batch.fields:
        top_p = batch.column("top_p")
        # Units so small that their sum just fits: integers add up to the same in any order.
        units = (weights * 2.0 ** (62 - vocab_size.bit_length())).long()
        total = units.sum(1, keepdim=True)
        target = (total * top_p).ceil_().long().clamp_(min=1).minimum(total)
        # At 1 nothing is left out, not even a tail of less than a unit.
        target.masked_fill_(top_p >= 1, 2**62)
        keep_first(weights, batch.logits, units, target)
    return weights


def _keep_few(weights: Tensor, batch: Batch) -> Tensor:
    """Do the same where top-k keeps few tokens, among which top-p can search."""
    logits, most = batch.logits, batch.most_kept
    top_k = batch.column("top_k", torch.int64)
    top_k = top_k.masked_fill(top_k == 0, most).clamp_(max=most)
    top_p = batch.column("top_p")
    top_p = top_p.masked_fill(top_p >= 1, torch.inf)
    largest = logits.topk(most, sorted=True)
    mass = weights.gather(1, largest.indices)  # [B, most]
    mass = mass.masked_fill(torch.arange(most, device=mass.device) >= top_k, 0).cumsum(1)
    is_before = pad(mass, (1, -1)) < top_p * mass[:, -1:]
    count = is_before.sum(1, keepdim=True).clamp_(min=1).minimum(top_k)
    threshold = largest.values.gather(1, count - 1)
    above = (largest.values > threshold).sum(1, keepdim=True)
    return weights.mul_(at_least(logits, threshold, count - above))


def _keep_probable(weights: Tensor, batch: Batch) -> Tensor:
    return weights.mul_(weights >= batch.column("min_p", weights.dtype))


LOGITS_PROCESSORS = [
    Processor(("logit_bias",), _add_bias, ("bias",)),
    Processor(("repetition_penalty",), _penalize_repetition, ("in_prompt", "new_counts")),
    Processor(("presence_penalty",), _penalize_presence, ("new_counts",)),
    Processor(("frequency_penalty",), _penalize_frequency, ("new_counts",)),
]
"""Options that change logits, before the temperature divides them."""
WEIGHT_PROCESSORS = [
    Processor(("top_k", "top_p"), _keep_most_probable),
    Processor(("min_p",), _keep_probable),
]
"""Options that leave tokens out of a random choice. They change float64 weights that are
proportional to the probabilities, with a largest weight of 1."""
