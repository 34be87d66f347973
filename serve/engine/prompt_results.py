"""Pieces of prompts, and their results besides the next token: log probabilities and embeddings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve.request import Pooling, Request, TokenLogprobs
from serve.sampling.sampler import token_logprobs


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a sequence to prefill."""

    row: int
    """The row that the sequence has been admitted to."""
    tokens: Sequence[int]
    """Token ids."""
    first: int
    """Position of the first of them in the sequence."""
    is_last: bool
    """Whether the sequence ends with them."""
    logits_from: int | None = None
    """Position in the sequence of the first token whose logits are computed. None: of no token."""
    pooling: Pooling | None = None
    """Way to pool the hidden states of the sequence."""

    @property
    def first_read(self) -> int:
        """Index of the first of these tokens whose hidden state is read, as are those of all after
        it."""
        if self.pooling == "mean":
            return 0
        end = len(self.tokens) - self.is_last
        # A token's logits are those of the position before.
        begin = end if self.logits_from is None else self.logits_from - 1 - self.first
        return min(max(0, begin), end)

    @property
    def num_read(self) -> int:
        """Number of tokens whose hidden state is read: these are the last ones."""
        return len(self.tokens) - self.first_read


def places_read(chunks: Sequence[Chunk]) -> NDArray[np.int64]:
    """Return the places of the tokens whose hidden state is read, in chunks one after another."""
    ends = np.cumsum([len(chunk.tokens) for chunk in chunks])
    return np.concatenate(
        [np.arange(end - chunk.num_read, end) for end, chunk in zip(ends, chunks, strict=True)]
    )


@dataclass(frozen=True)
class PromptLogits:
    """Logits of consecutive tokens of a prompt."""

    row: int
    first: int
    """Position of the first of these tokens in the prompt."""
    logits: Tensor
    """Logits `[tokens, vocab_size]`."""


@dataclass(frozen=True)
class PooledHidden:
    """Hidden states of consecutive tokens of a prompt, after the final norm: their sum, or the last
    one of the prompt."""

    row: int
    hidden: Tensor
    """Hidden state `[D]`, in float64."""


class PromptResults:
    """Results of prompts by request, from their prefill until an output takes them."""

    def __init__(self) -> None:
        self._logprobs: dict[int, list[TokenLogprobs]] = {}
        self._hidden: dict[int, Tensor] = {}

    def add(self, request_id: int, request: Request, piece: PromptLogits | PooledHidden) -> None:
        """Add the results of a piece of a request's prompt."""
        if isinstance(piece, PooledHidden):
            hidden = self._hidden.get(request_id)
            self._hidden[request_id] = piece.hidden if hidden is None else hidden + piece.hidden
            return
        tokens = request.prompt_token_ids[piece.first : piece.first + len(piece.logits)]
        counts = [request.sampling.prompt_logprobs] * len(tokens)
        found = token_logprobs(piece.logits, tokens, counts)
        kept = self._logprobs.setdefault(request_id, [])
        kept += [logprobs for logprobs in found if logprobs is not None]

    def are_finite(self, request_id: int) -> bool:
        """Return whether all results of a request are finite."""
        logprobs = self._logprobs.get(request_id, ())
        hidden = self._hidden.get(request_id, torch.zeros(1))
        return all(math.isfinite(token.logprob) for token in logprobs) and bool(
            hidden.isfinite().all()
        )

    def pop(self, request_id: int, request: Request) -> dict[str, Any]:
        """Forget the results of a request, and return them as fields of `Output`."""
        values: dict[str, Any] = {"prompt_logprobs": self._logprobs.pop(request_id, ())}
        hidden = self._hidden.pop(request_id, None)
        if hidden is not None:
            count = len(request.prompt_token_ids) if request.pooling == "mean" else 1
            values["embedding"] = (hidden / count).tolist()
        return values
