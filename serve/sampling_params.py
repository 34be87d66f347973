"""Settings of a request: length of the text, choice of tokens, and reported probabilities."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve.config import is_whole
from stu.common.errors import UserError
from stu.common.text import require_unicode

JsonWhitespace = Literal["compact", "flexible"]
MOST_LOGPROBS = 20
COUNTS = 2**31
"""Number that counts are below, so that they can be sent to other processes. The model bounds new
tokens and token ids, see `serve.request.check_request`."""
BOOL = "true or false"
NUMBERS = (
    *("temperature", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
"""Fields that hold floats."""


@dataclass(frozen=True)
class Constraint:
    """Constraint on the whole new text: a JSON schema, a regular expression, a list of allowed
    texts, a context-free grammar, or tool calls. Raises UserError for half of a surrogate pair."""

    kind: Literal["json_schema", "regex", "choice", "grammar", "tools"]
    source: str
    """The schema or the list of texts, as JSON; the expression; the grammar, in llguidance's
    variant of Lark or in GBNF; or the source of `serve.sampling.tool_grammar`."""

    def __post_init__(self) -> None:
        require_unicode(self.kind, self.source)


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request. Raises UserError for a value that no model allows."""

    temperature: float = 0.0
    """Divisor of the logits; 0 always chooses the most probable token."""
    top_k: int = 0
    """Number of most probable tokens to sample from; 0 or -1: all tokens."""
    top_p: float = 1.0
    """Cumulative probability of the most probable tokens to sample from, from 0 (only the most
    probable token) to 1 (all tokens)."""
    min_p: float = 0.0
    """Minimum probability of a token, relative to that of the most probable token; 0: all
    tokens."""
    repetition_penalty: float = 1.0
    """Divisor of positive logits, and factor of negative ones, of tokens in the prompt or the new
    text (Keskar et al. 2019); 1: no penalty."""
    presence_penalty: float = 0.0
    """Number subtracted from the logits of tokens that are in the new text."""
    frequency_penalty: float = 0.0
    """Number subtracted from a token's logit for each of its occurrences in the new text."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Numbers added to the logits, by token id."""
    max_new_tokens: int = 16
    """Maximum number of tokens to generate; 0 to compute only `prompt_logprobs` or an embedding."""
    min_new_tokens: int = 0
    """Minimum number of tokens to generate before a stop token can be chosen or a stop string can
    end the text."""
    stop: Sequence[str] = ()
    """String or strings that end the text; the text does not include them."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the text, besides EOS."""
    stop_at_eos: bool = True
    """Whether EOS ends the text."""
    n: int = 1
    """Number of completions of the prompt. An `Engine` accepts only 1."""
    best_of: int | None = None
    """Number of completions to generate, of which the `n` with the highest total log probability
    are returned, best first. None: `n`."""
    seed: int = 0
    """Seed of the random choices, from 0 to 2**64 - 1."""
    logprobs: int | None = None
    """Number of most probable tokens, at most 20, whose log probabilities are reported with that of
    each new token; None: no log probabilities."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt except the first."""
    skip_special_tokens: bool = True
    """Whether to leave tokens without text, such as BOS, out of the text; if not, their names are
    added. A stop token is always left out."""
    truncate_prompt_tokens: int | None = None
    """Number of tokens at the end of the prompt to keep; the others, including BOS, are dropped.
    None: the whole prompt."""
    constraint: Constraint | None = None
    """Schema, regular expression or grammar that the text must match."""

    def __post_init__(self) -> None:
        if self.top_k == -1:  # vLLM's way to say all
            object.__setattr__(self, "top_k", 0)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check_choice()
        self._check_length()
        self._check_reports()
        for name in ("stop", "stop_token_ids"):  # the caller's list may change
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in NUMBERS:  # an int may have too many digits to be sent
            object.__setattr__(self, name, float(getattr(self, name)))
        bias = {token: float(value) for token, value in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias)

    @property
    def num_candidates(self) -> int:
        """Number of completions to generate."""
        return self.n if self.best_of is None else self.best_of

    def stop_ids(self, eos_id: int) -> tuple[int, ...]:
        """Return all token ids that end the text; eos_id: -1 for a tokenizer without EOS."""
        return (*((eos_id,) if self.stop_at_eos and eos_id >= 0 else ()), *self.stop_token_ids)

    def _check_choice(self) -> None:
        self._require("temperature", _is_number(self.temperature), "a finite number >= 0")
        self._require(
            "top_k", _is_count(self.top_k), "a whole number from 0 (for all tokens) to 2**31 - 1"
        )
        is_share = _is_number(self.top_p) and self.top_p <= 1
        self._require("top_p", is_share, "from 0 (for the most probable token) to 1 (for all)")
        is_share = _is_number(self.min_p) and self.min_p <= 1
        self._require("min_p", is_share, "from 0 (for all tokens) to 1")
        is_factor = _is_number(self.repetition_penalty, 0.01, 100)
        self._require("repetition_penalty", is_factor, "a number from 0.01 to 100 (1 for none)")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, _is_number(getattr(self, name), -2, 2), "a number from -2 to 2")
        bias = self.logit_bias
        is_bias = isinstance(bias, Mapping) and all(
            is_whole(token) and _is_number(value, -100, 100) for token, value in bias.items()
        )
        self._require("logit_bias", is_bias, "a number from -100 to 100 for each of some token ids")
        self._require("seed", is_whole(self.seed) and self.seed < 2**64, "from 0 to 2**64 - 1")

    def _check_length(self) -> None:
        most, least, constraint = self.max_new_tokens, self.min_new_tokens, self.constraint
        self._require("max_new_tokens", is_whole(most), "a whole number >= 0")
        is_count = is_whole(least) and least <= most
        allowed = f"a whole number from 0 to {most}, the limit of new tokens"
        self._require("min_new_tokens", is_count, allowed)
        is_list = isinstance(self.stop, list | tuple)
        are_strings = is_list and all(text and isinstance(text, str) for text in self.stop)
        allowed = "a string or a list of strings, none of them empty"
        self._require("stop", are_strings, allowed)
        for text in self.stop:
            require_unicode("stop", text)
        ids = self.stop_token_ids
        are_ids = isinstance(ids, list | tuple) and all(map(is_whole, ids))
        allowed = "a list of token ids, whole numbers >= 0"
        self._require("stop_token_ids", are_ids, allowed)
        self._require("stop_at_eos", isinstance(self.stop_at_eos, bool), BOOL)
        self._require("n", _is_count(self.n, 1), "a whole number >= 1 and < 2**31")
        is_enough = self.best_of is None or _is_count(self.best_of, self.n)
        allowed = f"a whole number >= n, which is {self.n}, and < 2**31"
        self._require("best_of", is_enough, allowed)
        if constraint is not None:
            allowed = "0 with a constraint, which may allow no text so long"
            self._require("min_new_tokens", least == 0, allowed)
            allowed = "true with a constraint, whose text EOS ends"
            self._require("stop_at_eos", self.stop_at_eos, allowed)

    def _check_reports(self) -> None:
        self._require("skip_special_tokens", isinstance(self.skip_special_tokens, bool), BOOL)
        keep = self.truncate_prompt_tokens
        allowed = "a whole number >= 1 and < 2**31, or null for all"
        self._require("truncate_prompt_tokens", keep is None or _is_count(keep, 1), allowed)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            is_count = count is None or (is_whole(count) and count <= MOST_LOGPROBS)
            self._require(name, is_count, f"from 0 to {MOST_LOGPROBS}, or null for none")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(name, getattr(self, name), allowed)


def _is_count(value: object, least: int = 0) -> bool:
    return is_whole(value) and least <= value < COUNTS  # type: ignore[operator]


def _is_number(value: object, least: float = 0, most: float = sys.float_info.max) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and least <= value <= most  # type: ignore[operator]
