"""Choice of the next tokens of requests, under their options, grammars and stop tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from serve.request import Request, TokenLogprobs
from serve.sampling.processors import TokenHistory, needs_history
from serve.sampling.sampler import sample, token_logprobs
from serve.sampling_params import Constraint
from stu.common.errors import requires_extra
from stu.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.sampling.grammar import GrammarMatcher, Grammars

NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or too large for this dtype; try "
    "another checkpoint, or float32"
)


class Choice(NamedTuple):
    """The next token of one request."""

    token: int
    logprobs: TokenLogprobs | None
    """Log probabilities, if the request asks for them."""
    error: str
    """Reason why no token can be chosen; empty if one was."""
    is_refused: bool
    """Whether the request is at fault for the error."""


@dataclass
class _State:
    """A request, and its new tokens so far."""

    request: Request
    new_token_ids: list[int]
    stop_ids: list[int]
    matcher: "GrammarMatcher | None"
    history: TokenHistory | None = None
    """Made at the first choice of a request that needs one."""

    @property
    def is_early(self) -> bool:
        """Whether no stop token may be chosen yet."""
        least = self.request.sampling.min_new_tokens
        return bool(self.stop_ids) and len(self.new_token_ids) < least

    def append(self, token: int) -> None:
        """Advance by a new token."""
        self.new_token_ids.append(token)
        if self.history is not None:
            self.history.append(token)
        if self.matcher is not None:
            self.matcher.append(token)


class TokenChooser:
    """Chooses tokens for requests, which are known by their ids."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        self._tokenizer, self._device = tokenizer, device
        self._states: dict[int, _State] = {}

    def compile(self, constraint: Constraint) -> None:
        """Compile a constraint for later use. Raises UserError for one that is not allowed."""
        self._grammars.matcher(constraint)

    def add(self, request_id: int, request: Request) -> None:
        """Add a request. Raises UserError for a constraint that is not allowed."""
        params = request.sampling
        matcher = None if params.constraint is None else self._grammars.matcher(params.constraint)
        stop_ids = list(params.stop_ids(self._tokenizer.eos_id))
        self._states[request_id] = _State(request, [], stop_ids, matcher)
        for token in request.new_token_ids:
            self.append(request_id, token)

    def append(self, request_id: int, token: int) -> None:
        """Advance a request by its next token."""
        self._states[request_id].append(token)

    def remove(self, request_id: int) -> None:
        """Forget a request."""
        del self._states[request_id]

    def choose(self, request_ids: Sequence[int], logits: Tensor) -> list[Choice]:
        """Return each request's next token, without appending it.

        logits: `[B, vocab_size]`, a row for each request.
        """
        states = [self._states[request_id] for request_id in request_ids]
        params = [state.request.sampling for state in states]
        positions = [
            len(state.request.prompt_token_ids) + len(state.new_token_ids) for state in states
        ]
        is_finite = logits.amax(-1).isfinite()
        errors = ["" if finite else NOT_FINITE for finite in is_finite.tolist()]
        if any(errors):
            logits = logits.masked_fill(~is_finite[:, None], 0)
        histories = {
            row: self._history(state)
            for row, state in enumerate(states)
            if needs_history(params[row])
        }
        refused: set[int] = set()
        allowed = _constrained(states, logits, errors, refused)
        tokens = sample(allowed, params, positions, histories).tolist()
        logprobs = token_logprobs(logits, tokens, [own.logprobs for own in params])
        return [
            Choice(token, logprobs[row], errors[row], row in refused)
            for row, token in enumerate(tokens)
        ]

    @cached_property
    def _grammars(self) -> "Grammars":
        with requires_extra("serve"):  # llguidance
            from serve.sampling.grammar import Grammars
        return Grammars(self._tokenizer)

    def _history(self, state: _State) -> TokenHistory:
        if state.history is None:
            request, vocab_size = state.request, self._tokenizer.vocab_size
            bias = request.sampling.logit_bias
            history = TokenHistory(vocab_size, request.prompt_token_ids, bias, self._device)
            for token in state.new_token_ids:
                history.append(token)
            state.history = history
        return state.history


def _constrained(
    states: Sequence[_State], logits: Tensor, errors: list[str], refused: set[int]
) -> Tensor:
    """Return logits without stop tokens that come too early and tokens that a grammar forbids.

    A row that has no token left gets an error and joins `refused`.
    """
    if not any(state.is_early or state.matcher for state in states):
        return logits
    logits = logits.clone()
    for row, state in enumerate(states):
        if state.is_early:
            logits[row, state.stop_ids] = -torch.inf
            if not logits[row].amax() > -torch.inf:
                errors[row] = errors[row] or "min_new_tokens cannot be met: every token is to stop"
                refused.add(row)
                logits[row] = 0
        if state.matcher is None:
            continue
        allowed = state.matcher.allowed(logits.shape[1])
        if not state.matcher.error and allowed.any():
            logits[row].masked_fill_(~allowed.to(logits.device), -torch.inf)
        elif not errors[row]:
            refused.add(row)
            errors[row] = _cannot_follow(state, state.matcher.error)
    return logits


def _cannot_follow(state: _State, reason: str) -> str:
    constraint = state.request.sampling.constraint
    assert constraint is not None
    return (
        f"{constraint.kind} cannot be followed beyond {len(state.new_token_ids)} tokens of this "
        f"completion: {reason or 'no token continues it'}; make it simpler"
    )
