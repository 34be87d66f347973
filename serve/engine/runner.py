"""The model over many sequences: prefill of prompts, and decoding of one token of every row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from serve.cache.base import Cache
from serve.cache.budget import Caches
from serve.cache.page_pool import OutOfPages
from serve.config import INVARIANT_ROWS
from serve.engine.packing import packed_copy, packed_product, packs
from stu.common.errors import UserError
from stu.mixers import PastInputs, remembered
from stu.model import Block, FlashSTU

LOGITS_AT_ONCE = 256
"""Tokens of a prompt whose logits are computed together: a vocabulary may be large."""


@dataclass(frozen=True)
class Prompt:
    """A sequence to prefill."""

    owner: int
    """Id of the request, under which the caches know the sequence."""
    tokens: Sequence[int]
    """Token ids to prefill."""
    new_tokens: int
    """Number of steps that the sequence needs pages for."""
    wants_logits: bool = False
    """Whether to compute the logits of its own tokens but the first."""


@dataclass(frozen=True)
class PromptLogits:
    """Logits of consecutive tokens of a prompt."""

    owner: int
    first: int
    """Position of the first of these tokens in the prompt."""
    logits: Tensor
    """Logits `[tokens, vocab_size]`."""


class Runner:
    """A model and its caches.

    Rows of the batch are in the order in which they joined, except that the last row takes the
    place of one that leaves.

    Args:
        model: On the device that decodes.
        caches: Caches of everything that its layers remember.
        batch_invariant: Make a row's logits independent of the other rows to the last bit. Matrix
            products round differently for different numbers of rows, so rows then go through the
            model in padded groups of a fixed size, and attention and prompts run one by one.
    """

    def __init__(self, model: FlashSTU, caches: Caches, batch_invariant: bool = False) -> None:
        if batch_invariant:
            _require_invariance(model)
        self._model, self._batch_invariant = packed_copy(model), batch_invariant
        self._unembed = packed_product(model.embedding.weight)
        self._caches = caches
        self._device = model.embedding.weight.device
        self.num_layers = len(model.blocks)
        self._num_rows = 0

    def admit(self, prompt: Prompt) -> None:
        """Allocate what `prompt` needs in every cache, or nothing and raise OutOfPages."""
        admitted: list[Cache] = []
        try:
            for cache in self._all:
                cache.admit(prompt.owner, len(prompt.tokens), prompt.new_tokens)
                admitted.append(cache)
        except OutOfPages:
            for cache in admitted:
                cache.release(prompt.owner)
            raise

    def release(self, owner: int) -> None:
        """Forget a sequence that is no row of the batch."""
        for cache in self._all:
            cache.release(owner)

    def join(self, owner: int) -> None:
        """Append a prefilled sequence to the rows of the batch."""
        for cache in self._all:
            cache.join(owner)
        self._num_rows += 1

    def leave(self, row: int) -> None:
        """Remove a row from the batch; the last row takes its place."""
        for cache in self._all:
            cache.leave(row)
        self._num_rows -= 1

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Prompt], tokens_at_once: int
    ) -> Iterator[Tensor | PromptLogits | None]:
        """Prefill prompts, concatenated without padding, in many small pieces of work.

        Yields None after each piece: a layer's mixer, or its feed-forward part for `tokens_at_once`
        tokens. Then yields the logits of the prompts that want them, a few at a time, and at last
        those of each prompt's first new token, `[len(prompts), vocab_size]`. The caller may stop
        after any piece.
        """
        model = self._model
        ids = [token for prompt in prompts for token in prompt.tokens]
        memory = _PromptMemory(self._caches, prompts)
        x = model.embedding(torch.tensor([ids], device=self._device))  # [1, T, D]
        for block in model.blocks:
            assert isinstance(block, Block)
            x = block.mix(x, model.filters, memory)
            yield None
            parts = []
            for part in torch.split(x, tokens_at_once, dim=1):
                parts.append(block.feed_forward(part))
                yield None
            x = torch.cat(parts, dim=1)
        lengths = [len(prompt.tokens) for prompt in prompts]
        for prompt, hidden in zip(prompts, x[0].split(lengths), strict=True):
            last = len(hidden) - 1 if prompt.wants_logits else 0
            for start in range(0, last, LOGITS_AT_ONCE):
                part = hidden[start : min(start + LOGITS_AT_ONCE, last)]
                yield PromptLogits(prompt.owner, start + 1, self._logits(model.norm(part)))
        ends = torch.tensor(lengths, device=self._device).cumsum(0)
        yield self._logits(model.norm(x[0, ends - 1]))  # [len(prompts), D] -> [.., vocab_size]

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Advance every row by a token, and return the logits `[B, vocab_size]` of the next."""
        assert len(tokens) == self._num_rows, "a token of each row is needed"
        for cache in self._all:
            cache.begin_step(alone=self._batch_invariant)
        at_once = INVARIANT_ROWS if self._batch_invariant else len(tokens)
        hidden = []
        for first in range(0, len(tokens), at_once):
            group = list(tokens[first : first + at_once])
            memory = _RowMemory(self._caches, first)
            padded = torch.tensor(group + [0] * (at_once - len(group)), device=self._device)
            hidden.append(self._model.hidden(padded[:, None], memory)[: len(group), 0])
        for cache in self._all:
            cache.advance()
        return self._logits(torch.cat(hidden))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return logits `[B, vocab_size]` of `hidden [B, D]`."""
        if not self._batch_invariant:
            return self._unembed(hidden)
        groups = []
        for group in torch.split(hidden, INVARIANT_ROWS):
            padded = hidden.new_zeros(INVARIANT_ROWS, hidden.shape[1])
            padded[: len(group)] = group
            groups.append(self._unembed(padded)[: len(group)])
        return torch.cat(groups)

    @property
    def _all(self) -> list[Cache]:
        return list(self._caches.by_kind.values())


class Prefill:
    """Prefill of some prompts, spread over several steps.

    Args:
        runner: The model, whose caches have admitted the prompts.
        prompts: Prompts to prefill together.
        costs: Cost of a token of each prompt, where that of a usual token is 1.
        tokens_per_step: Usual tokens that a step prefills.
    """

    def __init__(
        self, runner: Runner, prompts: Sequence[Prompt], costs: Sequence[int], tokens_per_step: int
    ) -> None:
        lengths = [len(prompt.tokens) for prompt in prompts]
        self.num_tokens = sum(lengths)
        self._pieces = runner.prefill(prompts, tokens_per_step)
        num_pieces = runner.num_layers * (1 + -(-self.num_tokens // tokens_per_step))
        cost = sum(own * length for own, length in zip(costs, lengths, strict=True))
        if cost > self.num_tokens:
            num_pieces += -(-self.num_tokens // LOGITS_AT_ONCE)
        steps = max(1, cost // tokens_per_step)
        # A prefill of one step runs to its end, even if it computes log probabilities.
        self._pieces_per_step = -(-(num_pieces + 1) // steps) if steps > 1 else None

    def step(self) -> Iterator[Tensor | PromptLogits]:
        """Run the pieces of one step, and yield the logits that `Runner.prefill` yields."""
        for logits in islice(self._pieces, self._pieces_per_step):
            if logits is not None:
                yield logits


def _require_invariance(model: FlashSTU) -> None:
    """Raise UserError for a width at which a row's products round according to its place."""
    width = model.config.width
    is_safe = packs(model.embedding.weight) and all(
        past.streams == 1 for past in remembered(model.mixers, PastInputs)
    )
    if width % 16 and not is_safe:
        raise UserError(
            "batch_invariant",
            message=f"batch_invariant is not allowed for width={width}: for the full form, and "
            "where weights are not packed, the width must be a multiple of 16",
        )


class _PromptMemory:
    """`stu.mixers.Memory` of concatenated prompts."""

    def __init__(self, caches: Caches, prompts: Sequence[Prompt]) -> None:
        self._caches, self._prompts = caches, prompts
        self._lengths = [len(prompt.tokens) for prompt in prompts]

    def convolve(self, layer: int, streams: Tensor) -> Tensor:
        outputs = torch.empty_like(streams)  # [S, T, C]
        for owner, inputs, output in self._by_prompt(streams, outputs):
            output.copy_(self._caches.convolution.prefill(owner, layer, inputs))
        return outputs

    def convolve_short(self, layer: int, inputs: Tensor, taps: Tensor) -> Tensor:
        recent = self._caches.recent
        assert recent is not None, "the model has no short convolution"
        outputs = torch.empty_like(inputs)  # [1, T, C]
        for owner, part, output in self._by_prompt(inputs, outputs):
            output.copy_(recent.prefill(owner, layer, part, taps))
        return outputs

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attention = self._caches.attention
        assert attention is not None, "the model has no attention"
        outputs = torch.empty_like(queries)  # [1, T, heads, head_dim]
        for owner, q, k, v, output in self._by_prompt(queries, keys, values, outputs):
            output.copy_(attention.prefill(owner, layer, q, k, v))
        return outputs

    def _by_prompt(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield each prompt's owner, and its part of each tensor."""
        owners = [prompt.owner for prompt in self._prompts]
        parts = (torch.split(tensor, self._lengths, dim=1) for tensor in tensors)
        return zip(owners, *parts, strict=True)


class _RowMemory:
    """`stu.mixers.Memory` of one token of the rows from `first_row`, padding included."""

    def __init__(self, caches: Caches, first_row: int) -> None:
        self._caches, self._first_row = caches, first_row

    def convolve(self, layer: int, streams: Tensor) -> Tensor:
        return self._caches.convolution.step(layer, streams[:, 0], self._first_row)[:, None]

    def convolve_short(self, layer: int, inputs: Tensor, taps: Tensor) -> Tensor:
        recent = self._caches.recent
        assert recent is not None, "the model has no short convolution"
        return recent.step(layer, inputs, taps, self._first_row)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attention = self._caches.attention
        assert attention is not None, "the model has no attention"
        return attention.step(layer, queries, keys, values, self._first_row)
