"""Prefill of prompts, spread over the steps of an engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import torch
from torch import Tensor

from serve.engine.prompt_results import Chunk, PooledHidden, PromptLogits
from serve.engine.runner import LOGITS_AT_ONCE, Runner
from serve.request import Pooling


@dataclass(frozen=True)
class Prompt:
    """A sequence to prefill."""

    row: int
    """The row that the sequence has been admitted to."""
    tokens: Sequence[int]
    """Token ids of the sequence."""
    start: int = 0
    """Number of tokens that the row remembers already."""
    stops: Sequence[int] = ()
    """Numbers of tokens, ascending, after which a chunk ends."""
    logits_from: int | None = None
    """Position of the first of its own tokens whose logits are computed. None: of no token."""
    pooling: Pooling | None = None
    """Way to pool its hidden states."""
    cost: int = 1
    """Cost of a token, where that of a usual one is 1."""


@dataclass(frozen=True)
class ChunkEnd:
    """A chunk of a prompt has gone through all layers."""

    row: int
    num_tokens: int
    """Number of tokens of the sequence that its row remembers."""


Piece = Tensor | PromptLogits | PooledHidden | ChunkEnd


class Prefill:
    """Prefill of some prompts, which share a step, or of one, which may take several.

    Where all caches take chunks, a step runs chunks of `tokens_per_step` usual tokens through all
    layers, or all chunks of several prompts. Else prompts go whole through each layer, and a step
    runs its share of the pieces: a layer's mixer, or its feed-forward part for `tokens_per_step`
    tokens.

    Args:
        runner: The model, whose caches have admitted the prompts.
        prompts: Prompts to prefill together.
        tokens_per_step: Usual tokens that a step prefills.
        chunk_len: Most usual tokens of a chunk.
    """

    def __init__(
        self,
        runner: Runner,
        prompts: Sequence[Prompt],
        tokens_per_step: int,
        chunk_len: int,
    ) -> None:
        self._runner, self._prompts, self._tokens_per_step = runner, prompts, tokens_per_step
        self.num_tokens = sum(len(prompt.tokens) - prompt.start for prompt in prompts)
        """Tokens that go through the model."""
        self._pieces_per_step = None
        if runner.takes_chunks:
            self._pieces = self._in_chunks(chunk_len)
        else:
            chunks = [Chunk(p.row, p.tokens, 0, True, p.logits_from, p.pooling) for p in prompts]
            self._pieces = runner.prefill(chunks, tokens_per_step)
            self._pieces_per_step = self._share_of_a_step(chunks)

    def step(self) -> Iterator[Piece]:
        """Run one step's work, and yield what comes of it: the logits that prompts want of their
        own tokens, pooled hidden states, the ends of chunks, and at last the logits of each
        prompt's first new token, `[len(prompts), vocab_size]`. The caller may stop at any time."""
        for piece in islice(self._pieces, self._pieces_per_step):
            if piece is not None:
                yield piece
            elif self._runner.takes_chunks:
                return

    def _in_chunks(self, chunk_len: int) -> Iterator[Piece | None]:
        """Yield None where a step ends."""
        costs = {prompt.row: prompt.cost for prompt in self._prompts}
        logits: dict[int, Tensor] = {}
        used = 0
        for chunks in self._rounds(chunk_len):
            cost = sum(costs[chunk.row] * len(chunk.tokens) for chunk in chunks)
            # Several prompts share a step, however much of them turns out not to be remembered.
            if used and used + cost > self._tokens_per_step and len(self._prompts) == 1:
                yield None
                used = 0
            used += cost
            for piece in self._runner.prefill(chunks):
                if isinstance(piece, Tensor):
                    logits.update(zip((c.row for c in chunks if c.is_last), piece, strict=True))
                else:
                    yield piece
            for chunk in chunks:
                yield ChunkEnd(chunk.row, chunk.first + len(chunk.tokens))
        yield torch.stack([logits[prompt.row] for prompt in self._prompts])

    def _rounds(self, chunk_len: int) -> Iterator[list[Chunk]]:
        """Yield chunks that go through the layers together, of `tokens_per_step` tokens or one."""
        for together in zip_longest(*(_chunks(prompt, chunk_len) for prompt in self._prompts)):
            chunks: list[Chunk] = []
            for chunk in together:
                if chunk is None:
                    continue
                num_tokens = sum(len(other.tokens) for other in [*chunks, chunk])
                if chunks and num_tokens > self._tokens_per_step:
                    yield chunks
                    chunks = []
                chunks.append(chunk)
            yield chunks

    def _share_of_a_step(self, chunks: Sequence[Chunk]) -> int | None:
        """Return the pieces of a step that prefills whole prompts layer by layer. None: all, even
        if it computes log probabilities."""
        cost = sum(prompt.cost * len(prompt.tokens) for prompt in self._prompts)
        read = sum(chunk.num_read for chunk in chunks)
        in_layer, in_last = (
            -(-tokens // self._tokens_per_step) for tokens in (self.num_tokens, read)
        )
        num_pieces = self._runner.num_layers * (1 + in_layer) - in_layer + in_last
        if cost > self.num_tokens:
            num_pieces += -(-self.num_tokens // LOGITS_AT_ONCE)
        steps = max(1, cost // self._tokens_per_step)
        return -(-(num_pieces + 1) // steps) if steps > 1 else None


def _chunks(prompt: Prompt, chunk_len: int) -> Iterator[Chunk]:
    """Divide what is left of a prompt into chunks of at most `chunk_len` usual tokens."""
    length, first = max(1, chunk_len // prompt.cost), prompt.start
    for stop in (*prompt.stops, len(prompt.tokens)):
        while first < stop:
            end = min(first + length, stop)
            is_last = end == len(prompt.tokens)
            tokens, wants = prompt.tokens[first:end], (prompt.logits_from, prompt.pooling)
            yield Chunk(prompt.row, tokens, first, is_last, *wants)
            first = end
