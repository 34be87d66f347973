"""Text that must follow a JSON schema or a regular expression, through llguidance.

What a grammar allows is decided token by token, as a mask over the vocabulary. Everything a caller
can get wrong is found by `Grammars.check`, before the engine hears of the request; limits hold for
a grammar's size and for the work of each token.
"""

import functools
import json
from dataclasses import dataclass
from typing import Literal

import llguidance
import numpy as np
import torch
from torch import Tensor

from stu.tokenizer import Tokenizer

MOST_COMPILED = 16
MOST_CHARS = 2**16
"""Of a schema or expression."""
LIMITS = llguidance.LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000)
"""Beyond its defaults, which bound the work of a token: what a server can afford for a request."""


@dataclass(frozen=True)
class Constraint:
    """What the text of a completion must follow."""

    kind: Literal["json_schema", "regex"]
    source: str
    """The schema, as JSON, or the expression."""


class Grammars:
    """Makes matchers of a tokenizer's tokens; the tokenizer must have EOS, which ends the text.

    The constraints that were used last stay compiled: completions of one request share theirs.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._checked = functools.lru_cache(MOST_COMPILED)(self._compile)
        self._tokenizer: llguidance.LLTokenizer | None = None
        if tokenizer.eos_id >= 0:
            wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
            self._tokenizer = llguidance.LLTokenizer(wrapper)

    def matcher(self, constraint: Constraint) -> "GrammarMatcher":
        """For one completion. Raises ValueError as `check` does."""
        return GrammarMatcher(self._checked(constraint).deep_copy())

    def check(self, constraint: Constraint) -> None:
        """Raises ValueError for what is no schema or expression, or too large, or not supported."""
        self._checked(constraint)

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        kind, source = constraint.kind, constraint.source
        if self._tokenizer is None:
            raise ValueError(
                f"{kind} is not allowed: the model's tokenizer has no EOS token to end the text"
            )
        if len(source) > MOST_CHARS:
            raise ValueError(
                f"{kind} of {len(source)} characters is not allowed: it must have {MOST_CHARS} at "
                "most"
            )
        grammar = _grammar(constraint)
        is_wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokenizer, limits=LIMITS
        )
        if is_wrong:
            raise ValueError(f"{kind} is not allowed: {' '.join(messages[0].split())[:500]}")
        # What is well formed may still allow no text at all, or take more than the limits.
        compiled = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        matcher = GrammarMatcher(compiled.deep_copy())
        if not matcher.allowed(self._tokenizer.vocab_size).any() or matcher.error:
            reason = matcher.error or "no text follows it"
            raise ValueError(f"{kind} is not allowed: {' '.join(reason.split())[:500]}")
        return compiled


class GrammarMatcher:
    """How far a completion has come in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> Tensor:
        """Which tokens may come next: bool `[vocab_size]`, on the CPU."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool))

    def append(self, token: int) -> None:
        """Go on after `token`."""
        self._matcher.consume_token(token)

    @property
    def error(self) -> str:
        """Why it cannot go on (a limit), or nothing; without llguidance's own state."""
        text = str(self._matcher.get_error()) if self._matcher.is_error() else ""
        return text.partition("\n")[0]


class _Vocabulary:
    """A tokenizer as llguidance takes one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i, its in enumerate(self.tokens) if not its]
        for token in self.special_token_ids:  # no bytes of a text, but they need a name
            self.tokens[token] = tokenizer.token_text(token).encode()

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())


def _grammar(constraint: Constraint) -> str:
    matcher = llguidance.LLMatcher
    if constraint.kind == "regex":
        return str(matcher.grammar_from_regex(constraint.source))
    try:
        schema = json.loads(constraint.source)
        return str(matcher.grammar_from_json_schema(json.dumps(schema)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is not allowed: {error}") from error
