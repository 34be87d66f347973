"""The model over many sequences: prompts taken in together, and a token of every running one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve.cache.attention_windows import AttentionCache
from serve.cache.page_pool import OutOfPages, Pages
from serve.cache.paged_futurefill import ConvolutionCache
from serve.cache.recent_inputs import RecentInputs
from serve.config import INVARIANT_ROWS
from serve.engine.packing import packed_copy, packed_product, packs
from stu.common.errors import UserError
from stu.mixers import PastInputs, remembered
from stu.model import Block, FlashSTU

LOGITS_AT_ONCE = 256
"""Of a prompt's tokens: a vocabulary may be large."""


@dataclass(frozen=True)
class Prompt:
    """A sequence that is to join the batch."""

    owner: int
    tokens: Sequence[int]
    new_tokens: int
    """That it will step through the layers."""
    wants_logits: bool = False
    """Those of its own tokens but the first."""


@dataclass(frozen=True)
class PromptLogits:
    """Of some of a prompt's tokens."""

    owner: int
    first: int
    """Place of the first of these tokens in the prompt."""
    logits: Tensor
    """`[tokens, vocab_size]`."""


class Runner:
    """A model, and what it remembers of every sequence. Rows of the batch are in joining order,
    but that the last row takes the place of one that leaves.

    batch_invariant: a row's logits do not depend on other rows to the last bit. Matrix products
    round differently for different numbers of rows, so rows then go through the model in groups of
    a fixed size, the last one padded, and attention and prompts run one by one.
    """

    def __init__(
        self,
        model: FlashSTU,
        convolutions: ConvolutionCache,
        attentions: AttentionCache | None,
        batch_invariant: bool = False,
        recent: RecentInputs | None = None,
    ) -> None:
        if batch_invariant:
            _require_invariance(model)
        self._model, self._batch_invariant = packed_copy(model), batch_invariant
        self._unembed = packed_product(model.embedding.weight)
        self._convolutions, self._attentions, self._recent = convolutions, attentions, recent
        self._device = model.embedding.weight.device
        self._num_rows = 0

    def needed(self, prompt_tokens: int, new_tokens: int) -> Pages:
        """Pages that a sequence owns, or may come to own."""
        if self._attentions is None:
            return Pages(self._convolutions.pages_needed(new_tokens), 0)
        positions = prompt_tokens + new_tokens
        return Pages(
            self._convolutions.pages_needed(new_tokens), self._attentions.pages_needed(positions)
        )

    def admit(self, prompt: Prompt) -> None:
        """Allocate what `prompt` needs, or nothing and raise OutOfPages."""
        self._convolutions.admit(prompt.owner, prompt.new_tokens)
        if self._attentions is not None:
            try:
                self._attentions.admit(prompt.owner, len(prompt.tokens) + prompt.new_tokens)
            except OutOfPages:
                self._convolutions.release(prompt.owner)
                raise
        if self._recent is not None:
            self._recent.admit(prompt.owner)

    def release(self, owner: int) -> None:
        """Forget a sequence that is no row of the batch."""
        for cache in self._caches():
            cache.release(owner)

    def join(self, owner: int) -> None:
        """Make a sequence whose prompt was taken in the last row of the batch."""
        for cache in self._caches():
            cache.join(owner)
        self._num_rows += 1

    def leave(self, row: int) -> None:
        """Take a row out of the batch; the last row takes its place."""
        for cache in self._caches():
            cache.leave(row)
        self._num_rows -= 1

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Prompt], tokens_at_once: int
    ) -> Iterator[Tensor | PromptLogits | None]:
        """Take prompts in, one behind the other without padding, in many small pieces of work.

        Yields None after each piece, that of a layer's mixer or of its feed-forward part for
        `tokens_at_once` tokens, then the logits of the prompts that want them, a few at a time, and
        at last those of each prompt's first new token, `[len(prompts), vocab_size]`. It may be
        given up between pieces.
        """
        model = self._model
        ids = [token for prompt in prompts for token in prompt.tokens]
        memory = _PromptMemory(self._convolutions, self._attentions, self._recent, prompts)
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
        for prompt, its in zip(
            prompts, x[0].split([len(its.tokens) for its in prompts]), strict=True
        ):
            for first in range(1, len(prompt.tokens) if prompt.wants_logits else 0, LOGITS_AT_ONCE):
                some = its[first - 1 : min(first - 1 + LOGITS_AT_ONCE, len(its) - 1)]
                yield PromptLogits(prompt.owner, first, self._logits(model.norm(some)))
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts], device=self._device)
        last = model.norm(x[0, lengths.cumsum(0) - 1])  # [len(prompts), D]
        yield self._logits(last)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Take each row's next token; return the logits `[B, vocab_size]` of the one after."""
        assert len(tokens) == self._num_rows, "a token of each row is needed"
        if self._attentions is not None:
            self._attentions.begin_step(alone=self._batch_invariant)
        at_once = INVARIANT_ROWS if self._batch_invariant else len(tokens)
        hidden = []
        for first in range(0, len(tokens), at_once):
            group = list(tokens[first : first + at_once])
            memory = _RowMemory(self._convolutions, self._attentions, self._recent, first)
            padded = torch.tensor(group + [0] * (at_once - len(group)), device=self._device)
            hidden.append(self._model.hidden(padded[:, None], memory)[: len(group), 0])
        self._convolutions.advance()
        if self._attentions is not None:
            self._attentions.advance()
        return self._logits(torch.cat(hidden))

    def _logits(self, hidden: Tensor) -> Tensor:
        """`[B, D] -> [B, vocab_size]`."""
        if not self._batch_invariant:
            return self._unembed(hidden)
        groups = []
        for group in torch.split(hidden, INVARIANT_ROWS):
            padded = hidden.new_zeros(INVARIANT_ROWS, hidden.shape[1])
            padded[: len(group)] = group
            groups.append(self._unembed(padded)[: len(group)])
        return torch.cat(groups)

    def _caches(self) -> list[ConvolutionCache | AttentionCache | RecentInputs]:
        caches = self._convolutions, self._attentions, self._recent
        return [cache for cache in caches if cache is not None]


def _require_invariance(model: FlashSTU) -> None:
    """Raise UserError for a width at which products round by a row's place among others."""
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
    """`stu.mixers.Memory` of prompts that lie one behind the other."""

    def __init__(
        self,
        convolutions: ConvolutionCache,
        attentions: AttentionCache | None,
        recent: RecentInputs | None,
        prompts: Sequence[Prompt],
    ) -> None:
        self._convolutions, self._attentions, self._recent = convolutions, attentions, recent
        self._prompts = prompts
        self._lengths = [len(prompt.tokens) for prompt in prompts]

    def convolve(self, layer: int, streams: Tensor) -> Tensor:
        outputs = torch.empty_like(streams)  # [S, T, C]
        for owner, inputs, output in self._by_prompt(streams, outputs):
            output.copy_(self._convolutions.prefill(owner, layer, inputs))
        return outputs

    def convolve_short(self, layer: int, inputs: Tensor, taps: Tensor) -> Tensor:
        assert self._recent is not None
        outputs = torch.empty_like(inputs)  # [1, T, C]
        for owner, its, output in self._by_prompt(inputs, outputs):
            output.copy_(self._recent.prefill(owner, layer, its, taps))
        return outputs

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        assert self._attentions is not None, "a model of convolutions alone has no attention"
        outputs = torch.empty_like(queries)  # [1, T, heads, head_dim]
        for owner, q, k, v, output in self._by_prompt(queries, keys, values, outputs):
            output.copy_(self._attentions.prefill(owner, layer, q, k, v))
        return outputs

    def _by_prompt(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each prompt's owner, and its part of each tensor."""
        owners = [prompt.owner for prompt in self._prompts]
        parts = (torch.split(its, self._lengths, dim=1) for its in tensors)
        return zip(owners, *parts, strict=True)


class _RowMemory:
    """`stu.mixers.Memory` of one token of rows from `first_row` on; all caches take padding."""

    def __init__(
        self,
        convolutions: ConvolutionCache,
        attentions: AttentionCache | None,
        recent: RecentInputs | None,
        first_row: int,
    ) -> None:
        self._convolutions, self._attentions, self._recent = convolutions, attentions, recent
        self._first_row = first_row

    def convolve(self, layer: int, streams: Tensor) -> Tensor:
        return self._convolutions.step(layer, streams[:, 0], self._first_row)[:, None]

    def convolve_short(self, layer: int, inputs: Tensor, taps: Tensor) -> Tensor:
        assert self._recent is not None
        return self._recent.step(layer, inputs, taps, self._first_row)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        assert self._attentions is not None, "a model of convolutions alone has no attention"
        return self._attentions.step(layer, queries, keys, values, self._first_row)
