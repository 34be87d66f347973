"""Sampling of token ids from logits, where a row's token does not depend on the other rows.

A step works on tensors that stay where they are. It neither waits for the device nor copies from
the host, so a CUDA graph can hold it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from serve.request import Request, TokenLogprobs
from serve.sampling.features import (
    GREEDY,
    MOST_TOKENS,
    NEUTRAL,
    Features,
    features_needed,
    settings_of,
)
from serve.sampling.processors import LOGITS_PROCESSORS, WEIGHT_PROCESSORS
from serve.sampling.selection import largest
from serve.sampling.tables import Batch, RowTables

NUMBERS_AT_ONCE = 2**17
"""Numbers in float64 that are computed together on a CPU. More would not fit most caches."""
NUMBERS_ON_DEVICE = 2**22
"""The same on other devices, whose memory it spares: a step needs about ten such tensors."""


class Logprobs(NamedTuple):
    """Log probabilities of tokens and of the most probable ones, on the device."""

    tokens: Tensor
    """Log probabilities of the tokens, float64 `[B]`."""
    top_ids: Tensor
    """Most probable tokens, the most probable first, int64 `[B, count]`."""
    top: Tensor
    """Log probabilities of the most probable tokens, float64 `[B, count]`."""
    ranks: Tensor
    """Places of the tokens among all by probability, from 1, int64 `[B]`."""

    def of(self, tokens: Sequence[int], counts: Sequence[int | None]) -> list[TokenLogprobs | None]:
        """Return those of each row's token and of its `count` most probable ones, None for a row
        whose count is None."""
        values = (tensor.tolist() for tensor in self)
        return [
            None
            if count is None
            else TokenLogprobs(token, own, dict(zip(ids[:count], top[:count], strict=True)), rank)
            for token, count, own, ids, top, rank in zip(tokens, counts, *values, strict=True)
        ]


class Sampled(NamedTuple):
    """The next tokens of rows, on the device."""

    tokens: Tensor
    """Token ids, int64 `[B]`; any token where one of the flags is false."""
    is_finite: Tensor
    """Whether the largest logit is finite, bool `[B]`."""
    is_allowed: Tensor
    """Whether any token may come next, bool `[B]`."""
    logprobs: Logprobs | None
    """Log probabilities, if the features include them."""


class DeviceSampler:
    """Samples tokens for rows, whose settings and token histories are on the device.

    Args:
        max_rows: Number of rows. The one after the last, `null_row`, pads batches.
        vocab_size: Number of tokens in the vocabulary.
        device: Device of the logits.
        most_new_tokens: Most new tokens of a request. Below 2**15, counts of tokens take 16 bits.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        device: str | torch.device = "cpu",
        most_new_tokens: int = MOST_TOKENS,
    ) -> None:
        device = torch.device(device)
        self.tables = RowTables(max_rows, vocab_size, most_new_tokens, NEUTRAL, device)
        self.max_rows = self.null_row = max_rows
        self._features: dict[int, Features] = {}

    def reserve(self, features: Features) -> None:
        """Allocate the tables that a step with these features reads. `set` does it otherwise."""
        self.tables.reserve(features.tables)

    def set(
        self,
        row: int,
        request: Request,
        new_token_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        """Give a row to a request that has these new tokens already.

        stop_ids: Tokens that end its text, which `min_new_tokens` forbids. The tokens that a
            constraint forbids are written by `allow` before each step.
        """
        params, tables = request.sampling, self.tables
        features = features_needed(params, bool(stop_ids))
        self.reserve(features)
        tables.write_settings(row, settings_of(params, features), len(new_token_ids))
        tables.write_bias(row, params.logit_bias)
        if "in_prompt" in features.tables:
            tables.write_bits("in_prompt", [row], tables.pack(request.prompt_token_ids)[None])
        if "new_counts" in features.tables:
            tables.write_counts(row, new_token_ids)
        if "allowed" in features.tables:
            tables.write_bits("allowed", [row], ~tables.pack(stop_ids)[None])
        self._features[row] = features

    def clear(self, row: int) -> None:
        """Make a row neutral, because its request has ended or has left it."""
        self.tables.write_settings(row, {}, 0)
        self.tables.write_bias(row, {})
        self._features.pop(row, None)

    def allow(self, rows: Sequence[int], words: np.ndarray) -> None:
        """Write the tokens that constraints allow next in these rows.

        words: Bit masks, the lowest bit first, int32 `[len(rows), ceil(vocab_size / 32)]`.
        """
        self.tables.write_bits("allowed", rows, words)

    def unmask(self, row: int) -> None:
        """Take note that `min_new_tokens` forbids nothing in `row` any more, to save work."""
        if self._features[row].is_masked:
            self._features[row] = replace(self._features[row], is_masked=False)

    def features(self, rows: Iterable[int]) -> Features:
        """Return the work that a step of these rows needs."""
        return reduce(or_, (self._features.get(row, GREEDY) for row in rows), GREEDY)

    def sample(self, logits: Tensor, rows: Tensor, uniforms: Tensor, features: Features) -> Sampled:
        """Sample the next token of each row, and count it.

        Args:
            logits: Logits `[B, vocab_size]`. The lower id of equal ones counts as more probable.
            rows: Rows `[B]`, int64, in any order; only the null row may be there more than once.
            uniforms: Random numbers in [0, 1), float64 `[B]`, by `uniforms`. Only rows with a
                temperature above 0 use theirs.
            features: The work to do, at least that of `features(rows)`.
        """
        is_finite = is_allowed = logits.amax(-1).isfinite()
        batch = Batch(self.tables, rows, logits, features.fields, features.most_kept)
        if features.changes_logits:
            batch = replace(batch, logits=_changed(batch, features))
        if features.is_masked:
            batch = replace(batch, logits=batch.logits + batch.mask())
            is_allowed = batch.logits.amax(-1) > -torch.inf
        tokens = batch.logits.argmax(-1)
        if features.is_random:
            is_random = batch.column("temperature")[:, 0] > 0
            tokens = torch.where(is_random, _drawn(batch, features, uniforms), tokens)
        self._count(rows, tokens, features)
        count = features.num_logprobs
        logprobs = _logprobs(logits, tokens, count) if count >= 0 else None
        return Sampled(tokens, is_finite, is_allowed, logprobs)

    def _count(self, rows: Tensor, tokens: Tensor, features: Features) -> None:
        """Count the rows' next tokens in the tables that the features read."""
        counted = [(self.tables.num_new, rows)] if features.is_masked else []
        if "new_counts" in features.tables:
            places = rows * self.tables.vocab_size + tokens
            counted.append((self.tables["new_counts"].view(-1), places))
        for counts, places in counted:
            counts.index_copy_(0, places, counts.index_select(0, places) + 1)


def uniforms(seed: int, position: int, count: int = 1) -> np.ndarray:
    """Return random numbers in [0, 1) for the tokens from `position` on, float64 `[count]`. Each
    depends on the seed and its own position alone (Philox, Salmon et al. 2011)."""
    bits = np.random.Philox(key=seed, counter=position).random_raw(4 * count)[::4]
    return (bits >> np.uint64(11)) * 2.0**-53


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], counts: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Return log probabilities of each row's token and of its `count` most probable ones.

    logits: `[B, vocab_size]`. A row whose count is None gets None.
    """
    asked = [row for row, count in enumerate(counts) if count is not None]
    results: list[TokenLogprobs | None] = [None] * len(counts)
    if asked:
        own = logits if len(asked) == len(counts) else logits[asked]
        chosen, chosen_counts = [tokens[row] for row in asked], [counts[row] for row in asked]
        most = max(count or 0 for count in chosen_counts)
        found = _logprobs(own, torch.tensor(chosen, device=logits.device), most)
        for row, logprobs in zip(asked, found.of(chosen, chosen_counts), strict=True):
            results[row] = logprobs
    return results


def _changed(batch: Batch, features: Features) -> Tensor:
    """Return the logits `[B, vocab_size]` with the changes that options make."""
    logits = batch.logits.to(torch.promote_types(batch.logits.dtype, torch.float32))
    for processor in filter(features.runs, LOGITS_PROCESSORS):
        logits = processor.apply(logits, batch)
    is_changed = batch.column("changes_logits", logits.dtype)
    most = (is_changed * torch.finfo(logits.dtype).max).masked_fill(is_changed == 0, torch.inf)
    return logits.clamp(-most, most)  # a penalty may go beyond


def _drawn(batch: Batch, features: Features, uniforms: Tensor) -> Tensor:
    """Return tokens `[B]` drawn by the inverse of the cumulative distribution, in the order of
    their ids."""
    (num_rows, vocab_size), at_once = batch.logits.shape, _rows_at_once(batch.logits)
    drawn = []
    for first in range(0, num_rows, at_once):
        part = batch.part(first, first + at_once)
        logits = part.logits.to(torch.promote_types(part.logits.dtype, torch.float32))
        temperatures = part.column("temperature")
        temperatures = temperatures.masked_fill(temperatures == 0, 1)
        weights = logits.to(torch.float64, copy=True)  # [R, vocab_size]
        weights.sub_(weights.amax(-1, keepdim=True)).div_(temperatures).exp_()
        for processor in filter(features.runs, WEIGHT_PROCESSORS):
            weights = processor.apply(weights, replace(part, logits=logits))
        cumulative = weights.cumsum_(-1)
        # The first token whose cumulative weight is above the target: never one of weight 0.
        targets = uniforms[first : first + at_once, None] * cumulative[:, -1:]
        drawn.append(torch.searchsorted(cumulative, targets, right=True)[:, 0])
    return torch.cat(drawn).clamp_(max=vocab_size - 1)  # beyond only if logits are not finite


def _logprobs(logits: Tensor, tokens: Tensor, count: int) -> Logprobs:
    """Return log probabilities of each row's token, and of the `count` most probable ones."""
    parts = []
    at_once = _rows_at_once(logits)
    split = (torch.split(whole, at_once) for whole in (logits, tokens))
    for part, ids in zip(*split, strict=True):
        logprobs = part.double().log_softmax(-1)  # [R, vocab_size]
        top_ids = largest(part, min(count, part.shape[1]))
        found = logprobs.gather(1, ids[:, None])[:, 0], top_ids, logprobs.gather(1, top_ids)
        parts.append((*found, _ranks(part, ids)))
    return Logprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _ranks(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the place of each row's token by its logit, from 1; of equal ones the lower id comes
    first."""
    own, ids = (
        logits.gather(1, tokens[:, None]),
        torch.arange(logits.shape[1], device=logits.device),
    )
    is_before = (logits > own) | ((logits == own) & (ids < tokens[:, None]))
    return is_before.sum(1) + 1


def _rows_at_once(logits: Tensor) -> int:
    """Return how many rows of `logits [B, vocab_size]` are computed together in float64."""
    at_once = NUMBERS_ON_DEVICE if logits.is_cuda else NUMBERS_AT_ONCE
    return max(1, at_once // logits.shape[1])
