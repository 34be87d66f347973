"""The model over many sequences: prefill of prompts, and decoding of one token of every row."""

import logging
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from serve.adapters.folder import Adapter
from serve.adapters.layers import Adapters
from serve.cache.base import Cache, num_rows
from serve.cache.budget import Caches
from serve.cache.page_pool import OutOfPages
from serve.cache.window_blocks import on_device
from serve.config import INVARIANT_ROWS, EngineConfig
from serve.engine.decode_step import DecodeStep
from serve.engine.draft_step import DraftStep
from serve.engine.inference_model import (
    chosen_weights,
    inference_copy,
    inference_product,
    require_invariance,
)
from serve.engine.memory import PromptMemory, RowMemory
from serve.engine.packing import USUAL_ROWS
from serve.engine.prompt_results import Chunk, PooledHidden, PromptLogits, places_read
from serve.engine.sampling_step import SamplingStep
from serve.sampling.features import Features
from serve.sampling.sampler import DeviceSampler, Sampled
from stu.common.errors import UserError
from stu.model import Block, FlashSTU

logger = logging.getLogger(__name__)

LOGITS_AT_ONCE = 256
"""Tokens of a prompt whose logits are computed, or whose hidden states are pooled, together."""


class Runner:
    """A model and its caches.

    A sequence keeps its row from its admission to its release. A new one gets the lowest free row.

    Args:
        model: On the device that decodes.
        caches: Caches of everything that its layers remember.
        config: Limits, and how to run the model. With `batch_invariant` a row's logits are
            independent of the other rows to the last bit: matrix products round differently for
            different numbers of rows, so rows then go through the model in padded groups of a fixed
            size, and attention and prompts run one by one.
        static: Decode by static steps (`serve.engine.decode_step`). None: on CUDA, where they are
            captured as graphs.
        adapters: Adapters beside the model's layers, of which a row may have one.
    """

    def __init__(
        self,
        model: FlashSTU,
        caches: Caches,
        config: EngineConfig,
        static: bool | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        is_invariant = self._batch_invariant = config.batch_invariant
        if is_invariant:
            require_invariance(model)
        weights = chosen_weights(config.weights, model)
        self.adapters = Adapters(adapters, num_rows(config), model.embedding.weight)
        is_alone = config.max_running == 1 and not is_invariant
        usual_rows = 1 if is_alone else USUAL_ROWS
        self._model = inference_copy(model, weights, self.adapters, usual_rows, is_invariant)
        self._product = inference_product(model.embedding.weight, weights, usual_rows)
        self._caches = caches
        self._device = model.embedding.weight.device
        self.num_layers = len(model.blocks)
        self._rows: set[int] = set()
        """Rows in use."""
        self._joining: dict[int, int] = {}
        """Rows that join the batch, and their numbers of tokens."""
        self._batch: list[int] = []
        self.num_prefilled = 0
        """Tokens of prompts that have gone through all layers."""
        self._last_tokens = torch.zeros(
            num_rows(config) + 1, dtype=torch.int64, device=self._device
        )
        """Last token of each row that was chosen on the device; the last one is for padding."""
        on_cuda = self._device.type == "cuda"
        self._static: DecodeStep | None = None
        self._sampling: SamplingStep | None = None
        is_static = on_cuda if static is None else static
        self.drafts: DraftStep | None = None
        """Steps that take several tokens of a row."""
        if config.speculate is not None:
            if is_static:
                allowed = "null on CUDA, where steps take a token of a row"
                raise UserError("speculate", config.speculate, allowed)
            parts = self._model, caches, self.adapters, self._logits
            self.drafts = DraftStep(*parts, config.batch_invariant)
        if is_static:
            self._static = self._static_step(captures=on_cuda and not config.enforce_eager)

    @property
    def takes_chunks(self) -> bool:
        """Whether prompts go through all layers in chunks, and not whole through each layer."""
        return all(cache.takes_chunks for cache in self._caches.all)

    def admit(self, prompt_tokens: int, new_tokens: int, adapter: str = "") -> int:
        """Return a free row with an adapter, if one is named, and all that a prompt and new tokens
        need in every cache; or allocate nothing and raise OutOfPages."""
        row = next(row for row in count() if row not in self._rows)
        admitted: list[Cache] = []
        try:
            for cache in self._caches.all:
                cache.admit(row, prompt_tokens, new_tokens)
                admitted.append(cache)
        except OutOfPages:
            for cache in admitted:
                cache.release(row)
            raise
        self._rows.add(row)
        self.adapters.admit(row, adapter)
        return row

    def release(self, row: int) -> None:
        """Free a row that is not in the batch."""
        for cache in self._caches.all:
            cache.release(row)
        self._rows.remove(row)

    def join(self, row: int, num_tokens: int) -> None:
        """Add a prefilled row of `num_tokens` to the batch: at once, or, where the batch is
        invariant, at a step at which its sums are those of any other time."""
        self._joining[row] = num_tokens

    def leave(self, row: int) -> None:
        """Remove a row from the batch."""
        if self._joining.pop(row, None) is None:
            for cache in self._caches.all:
                cache.leave(row)
            self._batch.remove(row)

    def batch(self) -> list[int]:
        """Return the rows that the next step decodes, in ascending order."""
        caches = self._caches.all
        ahead, wait = dict.fromkeys(self._joining, 0), dict.fromkeys(self._joining, 0)
        if self._batch_invariant:
            # Where a step may take several tokens, rows have clocks of their own.
            aligned = wait if self.drafts is None else ahead
            for row, num_tokens in self._joining.items():
                aligned[row] = max((c.steps_until_aligned(num_tokens) for c in caches), default=0)
        shortest = min(wait.values(), default=0)
        if shortest and not self._batch:
            for cache in caches:
                cache.skip(shortest)
            wait = {row: steps - shortest for row, steps in wait.items()}
        for row in [row for row, steps in wait.items() if steps == 0]:
            del self._joining[row]
            for cache in caches:
                cache.join(row, ahead[row])
            self._batch = sorted([*self._batch, row])
        return self._batch

    @torch.inference_mode()
    def prefill(
        self, chunks: Sequence[Chunk], tokens_at_once: int | None = None
    ) -> Iterator[Tensor | PromptLogits | PooledHidden | None]:
        """Prefill chunks of sequences, concatenated without padding.

        Yields the logits of the chunks that want them, a few tokens at a time, the hidden states of
        those with a pooling, and at last, if any sequence ends, the logits of the first new token
        of each that does, `[sequences, vocab_size]`. The caller may stop at any time.

        tokens_at_once: Yield None after each piece of work too: a layer's mixer, or its
            feed-forward part for so many tokens.
        """
        model = self._model
        ids = [token for chunk in chunks for token in chunk.tokens]
        for chunk in chunks:
            for cache in self._caches.all:
                cache.begin_chunk(chunk.row, len(chunk.tokens))
        lengths = [len(chunk.tokens) for chunk in chunks]
        rows, read = [chunk.row for chunk in chunks], [chunk.num_read for chunk in chunks]
        memory = PromptMemory(self._caches, rows, lengths)
        factors = self.adapters.of_prompts(rows, lengths)
        x = model.embedding(on_device(np.array([ids]), self._device))  # [1, T, D]
        for number, block in enumerate(model.blocks, 1):
            assert isinstance(block, Block)
            self.adapters.factors = factors  # other rows may have had a step since
            x = block.mix(x, model.filters, memory)
            if tokens_at_once is not None:
                yield None
            if number == self.num_layers and read != lengths:  # the rest is of each token alone
                index = on_device(places_read(chunks), self._device)
                x, factors = x.index_select(1, index), factors.index_select(1, index)
                if not sum(read):
                    break
            parts = []
            pairs = (torch.split(own, tokens_at_once or len(ids), dim=1) for own in (x, factors))
            for part, own in zip(*pairs, strict=True):
                self.adapters.factors = own
                parts.append(block.feed_forward(part))
                if tokens_at_once is not None:
                    yield None
            x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        self.num_prefilled += len(ids)
        for chunk, hidden in zip(chunks, x[0].split(read), strict=True):
            first, last = chunk.first + chunk.first_read, len(hidden) - chunk.is_last
            begin = last if chunk.logits_from is None else max(0, chunk.logits_from - 1 - first)
            for start in range(begin, last, LOGITS_AT_ONCE):
                part = hidden[start : min(start + LOGITS_AT_ONCE, last)]
                logits = self._logits(model.norm(part))
                yield PromptLogits(chunk.row, first + start + 1, logits)
            if chunk.pooling == "mean":
                parts = hidden.split(LOGITS_AT_ONCE)
                sums = [model.norm(part).double().sum(0) for part in parts]  # [D] each
                yield PooledHidden(chunk.row, torch.stack(sums).sum(0))
            elif chunk.pooling == "last" and chunk.is_last:
                yield PooledHidden(chunk.row, model.norm(hidden[-1]).double())
        ends = np.cumsum(read)[[chunk.is_last for chunk in chunks]] - 1
        if len(ends):  # [sequences, D] -> [sequences, vocab_size]
            yield self._logits(model.norm(x[0].index_select(0, on_device(ends, self._device))))

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int | None]) -> Tensor:
        """Advance each row of `batch()` by a token, None for the last one that `set_tokens` set.
        Return the logits `[B, vocab_size]` of the next, valid until the next call."""
        assert len(tokens) == len(self._batch), "a token of each row is needed"
        if self._static is not None:
            return self._static.decode(self._batch, tokens)
        for cache in self._caches.all:
            cache.begin_step(self._batch, alone=self._batch_invariant)
        at_once = INVARIANT_ROWS if self._batch_invariant else len(tokens)
        hidden = []
        for first in range(0, len(tokens), at_once):
            group = [0 if token is None else token for token in tokens[first : first + at_once]]
            memory = RowMemory(self._caches, first)
            padded = torch.tensor(group + [0] * (at_once - len(group)), device=self._device)
            for place, row in enumerate(self._batch[first : first + at_once]):
                if tokens[first + place] is None:
                    padded[place] = self._last_tokens[row]
            if self.adapters.rank:
                padding = [len(self._last_tokens) - 1] * (at_once - len(group))
                own_rows = [*self._batch[first : first + at_once], *padding]
                self.adapters.begin_rows(torch.tensor(own_rows, device=self._device))
            hidden.append(self._model.hidden(padded[:, None], memory)[: len(group), 0])
        for cache in self._caches.all:
            cache.advance()
        return self._logits(torch.cat(hidden))

    def capture_sampling(self, sampler: DeviceSampler) -> None:
        """Let `sample` sample with static steps, if there are any."""
        step = self._static
        if step is not None:
            self._sampling = SamplingStep(
                sampler, step.logits, self._last_tokens, step.batches, step.graphs
            )

    def sample(
        self, logits: Tensor, rows: Sequence[int], uniforms: Sequence[float], features: Features
    ) -> Sampled | None:
        """Sample and set the next tokens of rows by a static step, as `SamplingStep.sample`; None:
        there is none for this."""
        if self._sampling is None:
            return None
        return self._sampling.sample(logits, rows, uniforms, features)

    @torch.inference_mode()
    def set_tokens(self, rows: Tensor, tokens: Tensor) -> None:
        """Set the last tokens of rows, both `[B]`, which have been chosen on the device."""
        self._last_tokens.index_copy_(0, rows, tokens)

    def _static_step(self, captures: bool) -> DecodeStep | None:
        found = {}
        for kind, cache in self._caches.by_kind.items():
            step = cache.static_step()
            if step is None:
                reason = f"{type(cache).__name__} has no static step"
                logger.warning("decoding runs without CUDA graphs, as %s", reason)
                return None
            found[kind] = cache, step
        invariant, tokens = self._batch_invariant, self._last_tokens
        adapters = self.adapters if self.adapters.rank else None
        parts = self._model, self._unembed, found, tokens
        return DecodeStep(*parts, invariant, captures, adapters=adapters)

    def _unembed(self, hidden: Tensor) -> Tensor:
        return self._model.logits_of_all(self._product(hidden))

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
