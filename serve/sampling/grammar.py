"""Text that must follow a JSON schema or a regular expression, through llguidance.

What a grammar allows is decided token by token, as a mask over the vocabulary. Everything a caller
can get wrong is found by `Grammars.check`, before the engine hears of the request; limits hold for
a grammar's size and for the work of each token.
"""

import functools
import json
from random import Random

import llguidance
import numpy as np
import torch
from torch import Tensor

from serve.sampling.json_schema import Node, children, prepare, target
from serve.sampling.schema_rewrites import Schema
from serve.sampling_params import Constraint
from stu.tokenizer import Tokenizer

MOST_COMPILED = 16
MOST_CHARS = 2**16
"""Of a schema or expression."""
LIMITS = llguidance.LLParserLimits(
    max_grammar_size=100_000, max_lexer_states=50_000, max_items_in_row=4500
)
"""Beyond its defaults, which bound the work of a token: what a server can afford for a request."""
PROBES, PROBE_TOKENS = 3, 24
"""Texts that are begun, and their tokens, to find out whether a constraint stays within LIMITS."""
MOST_PLACES = 100
"""Schemas within a schema that are tried to find the one that is wrong."""


class Grammars:
    """Makes matchers of a tokenizer's tokens; the tokenizer must have EOS, which ends the text.

    The constraints that were used last stay compiled: completions of one request share theirs.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._compiled = functools.lru_cache(MOST_COMPILED)(self._compile)
        self._checked = functools.lru_cache(MOST_COMPILED)(self._check)
        self._vocab_size, self._eos_id = tokenizer.vocab_size, tokenizer.eos_id
        self._tokenizer: llguidance.LLTokenizer | None = None
        if tokenizer.eos_id >= 0:
            wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
            self._tokenizer = llguidance.LLTokenizer(wrapper)

    def matcher(self, constraint: Constraint) -> "GrammarMatcher":
        """For one completion. Raises ValueError for what is no schema or expression, or too large,
        or not supported."""
        return GrammarMatcher(self._compiled(constraint).deep_copy())

    def check(self, constraint: Constraint) -> None:
        """Raises ValueError as `matcher` does, and for what is over the limits of a token's work
        near its beginning."""
        self._checked(constraint)

    def _check(self, constraint: Constraint) -> None:
        random = Random(0)
        for _ in range(PROBES):
            matcher = self.matcher(constraint)
            for _ in range(PROBE_TOKENS):
                allowed = self._allowed(matcher, constraint)
                token = random.choice(allowed)
                if token == self._eos_id:
                    break
                matcher.append(token)

    def _allowed(self, matcher: "GrammarMatcher", constraint: Constraint) -> list[int]:
        allowed = matcher.allowed(self._vocab_size).nonzero()[:, 0].tolist()
        if matcher.error or not allowed:
            raise _refused(constraint, matcher.error or "no text follows it")
        return allowed

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
        if kind == "regex":
            grammar = str(llguidance.LLMatcher.grammar_from_regex(source))
        else:
            schema = _schema(source)
            grammar = _json_grammar(schema)
        compiled = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if compiled.is_error():
            reason = _reason(grammar) or GrammarMatcher(compiled).error
            if kind == "json_schema":
                reason = f"at {_place(schema, reason)}, {reason}"
            raise _refused(constraint, reason)
        # What is well formed may still allow no text at all, or take more than the limits.
        self._allowed(GrammarMatcher(compiled.deep_copy()), constraint)
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


def _refused(constraint: Constraint, reason: str) -> ValueError:
    return ValueError(f"{constraint.kind} is not allowed: {reason[:500]}")


def _schema(source: str) -> Schema:
    try:
        schema = json.loads(source)
        if isinstance(schema, bool):
            schema = {"anyOf": [schema]}
        if not isinstance(schema, dict):
            raise ValueError("it must be an object or boolean")
    except ValueError as error:
        raise ValueError(f"json_schema is not allowed: {error}") from error
    except RecursionError as error:
        raise ValueError("json_schema is not allowed: it is nested too deeply") from error
    try:
        return prepare(schema)
    except RecursionError as error:
        raise ValueError("json_schema is not allowed: it is nested too deeply") from error


def _json_grammar(schema: Schema) -> str:
    """Compact, unless the schema's own `x-guidance` says otherwise: where white space is allowed
    anywhere, a model may write nothing else."""
    compile_schema = llguidance.LLMatcher.grammar_from_json_schema
    try:
        return str(compile_schema(json.dumps(schema), {"whitespace_flexible": False}))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is not allowed: {error}") from error


def _reason(grammar: str) -> str:
    """Why a grammar cannot be compiled, or nothing."""
    is_wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    if not is_wrong:
        return ""
    return " ".join(messages[0].split()).partition(" while processing json-schema:")[0]


def _place(schema: Schema, reason: str) -> str:
    """Find the innermost schema that is refused for `reason`."""
    definitions: Schema = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    place, left, seen = "#", [Node(schema, "#")], 0
    while left and seen < MOST_PLACES:
        node = left.pop()
        inner = list(children(node))
        found = target(node.schema.get("$ref"), schema)
        inner += [] if found is None else [Node(found, str(node.schema["$ref"]))]
        for its in inner[:MOST_PLACES]:
            seen += 1
            if _reason(_json_grammar({**its.schema, **definitions})) == reason:
                place, left = its.place, [its]
                break
    return place
