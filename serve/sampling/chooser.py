"""The next tokens of requests: settings, penalties and grammars applied to their logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from serve.request import Request, TokenLogprobs
from serve.sampling.grammar import GrammarMatcher, Grammars
from serve.sampling.sampler import TokenHistory, sample, token_logprobs
from serve.sampling_params import Constraint
from stu.tokenizer import Tokenizer

NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or too large for this dtype; try "
    "another checkpoint, or float32"
)


class Choice(NamedTuple):
    """Of one request."""

    token: int
    logprobs: TokenLogprobs | None
    """If the request asks for them."""
    error: str
    """Why there is none, or nothing."""
    is_refused: bool
    """Whether the error is the request's own."""


class TokenChooser:
    """Remembers of every request, by its number, what its next token depends on."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._vocab_size, self._device = tokenizer.vocab_size, device
        self._eos_id = tokenizer.eos_id
        self._grammars = Grammars(tokenizer)
        self._requests: dict[int, Request] = {}
        self._tokens: dict[int, list[int]] = {}
        """New ones."""
        self._histories: dict[int, TokenHistory] = {}
        """Of requests that need one, from their first choice on."""
        self._matchers: dict[int, GrammarMatcher] = {}

    def compile(self, constraint: Constraint) -> None:
        """Get a constraint ready. Raises ValueError for one that is not allowed."""
        self._grammars.matcher(constraint)

    def add(self, request_id: int, request: Request) -> None:
        """Raises ValueError for a constraint that is not allowed."""
        if request.sampling.constraint is not None:
            self._matchers[request_id] = self._grammars.matcher(request.sampling.constraint)
        self._requests[request_id], self._tokens[request_id] = request, []
        for token in request.new_token_ids:
            self.append(request_id, token)

    def append(self, request_id: int, token: int) -> None:
        """A request has its next token."""
        self._tokens[request_id].append(token)
        if request_id in self._histories:
            self._histories[request_id].append(token)
        if request_id in self._matchers:
            self._matchers[request_id].append(token)

    def remove(self, request_id: int) -> None:
        """Forget a request."""
        del self._requests[request_id], self._tokens[request_id]
        self._histories.pop(request_id, None)
        self._matchers.pop(request_id, None)

    def choose(self, request_ids: Sequence[int], logits: Tensor) -> list[Choice]:
        """Each request's next token, from its row of `logits [B, vocab_size]`; they are not
        appended."""
        requests = [self._requests[request_id] for request_id in request_ids]
        params = [request.sampling for request in requests]
        places = [
            len(request.prompt_token_ids) + len(self._tokens[request_id])
            for request_id, request in zip(request_ids, requests, strict=True)
        ]
        is_finite = logits.amax(-1).isfinite()
        errors = ["" if its else NOT_FINITE for its in is_finite.tolist()]
        if any(errors):
            logits = logits.masked_fill(~is_finite[:, None], 0)
        histories = {
            row: self._history(request_id)
            for row, request_id in enumerate(request_ids)
            if params[row].needs_history
        }
        refused: set[int] = set()
        allowed = self._constrained(request_ids, logits, errors, refused)
        tokens = sample(allowed, params, places, histories).tolist()
        logprobs = token_logprobs(logits, tokens, [its.logprobs for its in params])
        are_refused = [row in refused for row in range(len(requests))]
        return [Choice(*its) for its in zip(tokens, logprobs, errors, are_refused, strict=True)]

    def _constrained(
        self, request_ids: Sequence[int], logits: Tensor, errors: list[str], refused: set[int]
    ) -> Tensor:
        """Logits without the tokens that a request's grammar does not allow next, nor those that
        would end it too early."""
        rows = [row for row, its in enumerate(request_ids) if its in self._matchers]
        early = [row for row, its in enumerate(request_ids) if self._is_early(its)]
        if not rows and not early:
            return logits
        logits = logits.clone()
        for row in early:
            logits[row, self._stop_ids(request_ids[row])] = -torch.inf
            if not logits[row].amax() > -torch.inf:
                errors[row] = errors[row] or "min_new_tokens cannot be met: every token is to stop"
                refused.add(row)
                logits[row] = 0
        for row in rows:
            matcher = self._matchers[request_ids[row]]
            allowed = matcher.allowed(self._vocab_size)
            if matcher.error or not allowed.any():
                if not errors[row]:
                    refused.add(row)
                    errors[row] = self._cannot_follow(request_ids[row], matcher.error)
            else:
                logits[row].masked_fill_(~allowed.to(logits.device), -torch.inf)
        return logits

    def _cannot_follow(self, request_id: int, reason: str) -> str:
        constraint = self._requests[request_id].sampling.constraint
        assert constraint is not None
        num_tokens = len(self._tokens[request_id])
        return (
            f"{constraint.kind} cannot be followed beyond {num_tokens} tokens of this completion: "
            f"{reason or 'no token goes on'}; make it simpler"
        )

    def _is_early(self, request_id: int) -> bool:
        least = self._requests[request_id].sampling.min_new_tokens
        return len(self._tokens[request_id]) < least and bool(self._stop_ids(request_id))

    def _stop_ids(self, request_id: int) -> list[int]:
        return list(self._requests[request_id].sampling.stop_ids(self._eos_id))

    def _history(self, request_id: int) -> TokenHistory:
        if request_id not in self._histories:
            request = self._requests[request_id]
            history = TokenHistory(
                self._vocab_size,
                request.prompt_token_ids,
                request.sampling.logit_bias,
                self._device,
            )
            for token in self._tokens[request_id]:
                history.append(token)
            self._histories[request_id] = history
        return self._histories[request_id]
