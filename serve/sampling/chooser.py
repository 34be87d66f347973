"""Choice of the next tokens of requests, under their options, grammars and stop tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from serve.request import Request, TokenLogprobs
from serve.sampling.features import MOST_TOKENS, Features
from serve.sampling.sampler import DeviceSampler, Sampled, uniforms
from serve.sampling_params import Constraint
from stu.common.errors import requires_extra
from stu.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.sampling.grammar import GrammarMatcher, Grammars

NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or too large for this dtype; try "
    "another checkpoint, or float32"
)
UNIFORMS_AT_ONCE = 32
"""Random numbers that are computed for a request at once, which takes hardly longer than one."""


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
    num_begun: int = 0
    """Number of new tokens, and of those that are being sampled."""
    uniforms: list[float] = field(default_factory=list)
    """Random numbers of the tokens after these, the next one last."""
    refusal: str = ""
    """Reason why the constraint allows no token."""

    def append(self, token: int) -> None:
        """Advance by a new token."""
        self.new_token_ids.append(token)
        if len(self.new_token_ids) > self.num_begun:  # sampled elsewhere
            self.num_begun = len(self.new_token_ids)
            self.uniforms.clear()
        if self.matcher is not None:
            self.matcher.append(token)

    def begin(self) -> float:
        """Begin the next token, and return its random number."""
        params, position = self.request.sampling, self.num_begun
        self.num_begun += 1
        if params.temperature == 0:
            return 0.0
        if not self.uniforms:
            position += len(self.request.prompt_token_ids)
            self.uniforms = uniforms(params.seed, position, UNIFORMS_AT_ONCE)[::-1].tolist()
        return self.uniforms.pop()


class TokenChooser:
    """Chooses tokens for requests, which are known by their ids.

    `choose` does all of it. An engine with rows of its own lets requests `join` them, and prepares
    each step of `sampler` by `begin` and `constrain`. It may `read` the tokens after it has begun
    the next ones.

    Args:
        tokenizer: The model's tokenizer.
        device: Device of the logits.
        max_rows: Rows of the sampler at first. `choose` makes more where it needs them.
        most_new_tokens: Most new tokens of a request.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        device: torch.device,
        max_rows: int = 8,
        most_new_tokens: int = MOST_TOKENS,
    ) -> None:
        self._tokenizer, self._device = tokenizer, device
        self._most_new_tokens = most_new_tokens
        self._states: dict[int, _State] = {}
        self._rows: dict[int, int] = {}
        self.sampler = self._make_sampler(max_rows)

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
        state, row = self._states[request_id], self._rows.get(request_id)
        state.append(token)
        is_early = len(state.new_token_ids) < state.request.sampling.min_new_tokens
        if row is not None and state.matcher is None and not is_early:
            self.sampler.unmask(row)

    def remove(self, request_id: int) -> None:
        """Forget a request, which leaves its row."""
        self.leave(request_id)
        del self._states[request_id]

    def join(self, request_id: int, row: int) -> None:
        """Give a row of the sampler to a request."""
        state = self._states[request_id]
        self.sampler.set(row, state.request, state.new_token_ids, state.stop_ids)
        self._rows[request_id] = row

    def leave(self, request_id: int) -> None:
        """Clear the row of a request, if it has one."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self.sampler.clear(row)

    def begin(self, request_ids: Sequence[int]) -> list[float]:
        """Begin the next token of each request, and return the random numbers for them."""
        return [self._states[request_id].begin() for request_id in request_ids]

    def constrain(self, request_ids: Sequence[int]) -> None:
        """Write what constraints of requests allow after their tokens to the requests' rows."""
        states = {self._rows[request_id]: self._states[request_id] for request_id in request_ids}
        words = {}
        for row, state in states.items():
            if state.matcher is not None:
                words[row] = state.matcher.allowed_words(self._tokenizer.vocab_size)
                if state.matcher.error or not words[row].any():
                    state.refusal = _cannot_follow(state)
        if words:
            self.sampler.allow(list(words), np.stack(list(words.values())))

    def can_sample(self, request_ids: Sequence[int]) -> bool:
        """Return whether the next tokens of these requests can be sampled before their last ones
        are appended, which constraints do not allow."""
        return all(self._states[request_id].matcher is None for request_id in request_ids)

    def possible(self, request_id: int, tokens: Sequence[int]) -> list[int]:
        """Return the first of `tokens`, as far as they may follow in a request's text without
        ending it."""
        state = self._states[request_id]
        count = next((i for i, own in enumerate(tokens) if own in state.stop_ids), len(tokens))
        if state.matcher is not None:
            count = state.matcher.num_allowed(tokens[:count])
        return list(tokens[:count])

    def begin_rows(self, request_ids: Sequence[int]) -> tuple[list[int], list[float], Features]:
        """Begin the next token of each request, which have joined rows and have no constraints.
        Return their rows, the random numbers for them, and the work that their step needs."""
        rows = [self._rows[request_id] for request_id in request_ids]
        return rows, self.begin(request_ids), self.sampler.features(rows)

    def sample(
        self, logits: Tensor, rows: Sequence[int], uniforms: Sequence[float], features: Features
    ) -> tuple[Tensor, Sampled]:
        """Sample the next token of each row, without waiting for the device, and return the rows on
        the device too.

        logits: `[B, vocab_size]`, a row for each of `rows`.
        """
        upload = self.sampler.tables.upload
        places, numbers = upload(torch.tensor(rows)), torch.tensor(uniforms, dtype=torch.float64)
        return places, self.sampler.sample(logits, places, upload(numbers), features)

    def read(self, request_ids: Sequence[int], sampled: Sampled) -> list[Choice]:
        """Return the tokens that were sampled for requests, without appending them."""
        states = [self._states[request_id] for request_id in request_ids]
        tokens = sampled.tokens.tolist()
        logprobs: Sequence[TokenLogprobs | None] = [None] * len(states)
        if sampled.logprobs is not None:
            counts = [state.request.sampling.logprobs for state in states]
            logprobs = sampled.logprobs.of(tokens, counts)
        choices = []
        flags = zip(sampled.is_finite.tolist(), sampled.is_allowed.tolist(), strict=True)
        for state, token, own, (is_finite, is_allowed) in zip(
            states, tokens, logprobs, flags, strict=True
        ):
            refusal = "" if is_allowed and not state.refusal else _refusal(state)
            error = refusal if is_finite else NOT_FINITE
            choices.append(Choice(token, own, error, is_finite and bool(refusal)))
        return choices

    def choose(self, request_ids: Sequence[int], logits: Tensor) -> list[Choice]:
        """Return each request's next token, without appending it.

        logits: `[B, vocab_size]`, a row for each request.
        """
        self._make_rows(request_ids)
        numbers = self.begin(request_ids)
        self.constrain(request_ids)
        # Requests that need the same work are sampled together: others need not do it.
        groups: dict[Features, list[int]] = {}
        for place, request_id in enumerate(request_ids):
            features = self.sampler.features([self._rows[request_id]])
            groups.setdefault(features, []).append(place)
        choices: dict[int, Choice] = {}
        upload = self.sampler.tables.upload
        for features, places in groups.items():
            ids = [request_ids[place] for place in places]
            rows = torch.tensor([self._rows[request_id] for request_id in ids])
            own = torch.tensor([numbers[place] for place in places], dtype=torch.float64)
            own_logits = logits
            if len(groups) > 1:
                own_logits = logits.index_select(0, upload(torch.tensor(places)))
            sampled = self.sampler.sample(own_logits, upload(rows), upload(own), features)
            choices.update(zip(places, self.read(ids, sampled), strict=True))
        return [choices[place] for place in range(len(request_ids))]

    @cached_property
    def _grammars(self) -> "Grammars":
        with requires_extra("serve"):  # llguidance
            from serve.sampling.grammar import Grammars
        return Grammars(self._tokenizer)

    def _make_sampler(self, max_rows: int) -> DeviceSampler:
        vocab_size = self._tokenizer.vocab_size
        return DeviceSampler(max_rows, vocab_size, self._device, self._most_new_tokens)

    def _make_rows(self, request_ids: Sequence[int]) -> None:
        """Give rows to those of these requests that have none, and take them from others."""
        if len(request_ids) > self.sampler.max_rows:
            self._rows.clear()
            self.sampler = self._make_sampler(2 * len(request_ids))
        new = [request_id for request_id in request_ids if request_id not in self._rows]
        if not new:
            return
        if len(new) + len(self._rows) > self.sampler.max_rows:
            for request_id in set(self._rows).difference(request_ids):
                self.leave(request_id)
        free = sorted(set(range(self.sampler.max_rows)).difference(self._rows.values()))
        for request_id, row in zip(new, free, strict=False):
            self.join(request_id, row)


def _refusal(state: _State) -> str:
    if state.request.sampling.constraint is None:
        return "min_new_tokens cannot be met: every token is to stop"
    return state.refusal or _cannot_follow(state)


def _cannot_follow(state: _State) -> str:
    constraint, matcher = state.request.sampling.constraint, state.matcher
    assert constraint is not None
    assert matcher is not None
    return (
        f"{constraint.kind} cannot be followed beyond {len(state.new_token_ids)} tokens of this "
        f"completion: {matcher.error or 'no token continues it'}; make it simpler"
    )
