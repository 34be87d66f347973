"""Constraints on text by a schema, an expression, a grammar or tools, through llguidance.

A grammar gives a mask over the vocabulary for each token. Limits hold for the size of a grammar and
for the work of each token.
"""

import functools
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from random import Random
from typing import TypeVar

import llguidance
import numpy as np
import torch
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from serve.sampling.json_schema import Node, children, prepare, target
from serve.sampling.schema_rewrites import Schema
from serve.sampling.tool_grammar import schemas_of, text_of, tool_grammar, wrong_parameters
from serve.sampling_params import Constraint
from stu.common.errors import UserError
from stu.tokenizer import Tokenizer

MOST_COMPILED = 16
MOST_CHARS = 2**16
"""Longest schema or expression."""
LIMITS = llguidance.LLParserLimits(
    max_grammar_size=100_000, max_lexer_states=50_000, max_items_in_row=4500
)
"""Limits for one request of a server; llguidance's defaults also bound the work of a token."""
STACK_BYTES = 2**29
"""llguidance recurses along rules and references, of which MOST_CHARS have some 8,000; a usual
stack of 8 MiB ends after some 1,000. Memory is reserved alone until it is used."""
CHARS_OF_USUAL_STACK = MOST_CHARS // 4
"""Longest constraint that a stack of 8 MiB is surely enough for."""
PROBES, PROBE_TOKENS = 3, 24
"""Random texts, and tokens of each, that check whether a constraint stays within LIMITS."""
_STACK_SIZE = threading.Lock()
Result = TypeVar("Result")
MOST_PLACES = 100
"""Most inner schemas that are tried to find the one that is wrong."""


class Grammars:
    """Compiles constraints for one tokenizer, whose EOS ends the text.

    The constraints that were used last stay compiled, so the completions of a request share theirs.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        compile_safely = functools.partial(_on_large_stack, self._compile)
        self._compiled = functools.lru_cache(MOST_COMPILED)(compile_safely)
        self._checked = functools.lru_cache(MOST_COMPILED)(self._check)
        self._vocab_size, self._eos_id = tokenizer.vocab_size, tokenizer.eos_id
        self._tokenizer: llguidance.LLTokenizer | None = None
        if tokenizer.eos_id >= 0:
            wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
            self._tokenizer = llguidance.LLTokenizer(wrapper)

    def matcher(self, constraint: Constraint) -> "GrammarMatcher":
        """Return a matcher for one completion. Raises UserError for a constraint that is malformed,
        too large or not supported."""
        return GrammarMatcher(self._compiled(constraint).deep_copy())

    def check(self, constraint: Constraint) -> None:
        """Raise UserError as `matcher` does, and for a constraint that exceeds the limits of a
        token's work near the beginning of a text."""
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
            raise _refused(constraint.kind, matcher.error or "no text follows it")
        return allowed

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        kind, source = constraint.kind, constraint.source
        if self._tokenizer is None:
            raise _refused(kind, "the model's tokenizer has no EOS token to end the text")
        if len(source) > MOST_CHARS:
            raise _refused(kind, f"it has {len(source)} characters and may have {MOST_CHARS}")
        if kind == "regex":
            grammar = str(llguidance.LLMatcher.grammar_from_regex(source))
        elif kind == "choice":
            texts = "|".join(map(re.escape, json.loads(source)))
            grammar = str(llguidance.LLMatcher.grammar_from_regex(texts))
        elif kind in ("grammar", "tools"):
            lark = tool_grammar(source) if kind == "tools" else _lark(source)
            grammar = str(llguidance.LLMatcher.grammar_from_lark(lark))
        else:
            schema = _schema(source)
            grammar = _json_grammar(schema)
        compiled = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if compiled.is_error():
            reason = _reason(grammar) or GrammarMatcher(compiled).error
            if kind == "json_schema":
                reason = f"at {_place(schema, reason)}, {reason}"
            elif kind == "tools":
                _refuse_part(source)
            raise _refused(kind, reason)
        # A well-formed constraint may still allow no text at all, or exceed the limits.
        self._allowed(GrammarMatcher(compiled.deep_copy()), constraint)
        return compiled


def _on_large_stack(work: Callable[[Constraint], Result], constraint: Constraint) -> Result:
    """Return `work(constraint)`, called in a thread with a stack of STACK_BYTES. Where the address
    space is limited, a usual stack does for short constraints; raises UserError for others."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work(constraint))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run)
    with _STACK_SIZE:  # it is one for all threads that begin
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        except RuntimeError as error:
            if len(constraint.source) > CHARS_OF_USUAL_STACK:
                reason = "it is too long for the address space of the server (ulimit -v)"
                raise _refused(constraint.kind, reason) from error
        finally:
            threading.stack_size(usual)
    if thread.ident is None:  # it has not begun
        return work(constraint)
    thread.join()
    return future.result()


class GrammarMatcher:
    """Position of a completion in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> Tensor:
        """Return which tokens may come next: bool `[vocab_size]`, on the CPU."""
        bits = np.unpackbits(self.allowed_words(vocab_size).view(np.uint8), bitorder="little")
        return torch.from_numpy(bits[:vocab_size].astype(bool))

    def allowed_words(self, vocab_size: int) -> np.ndarray:
        """Return them as a bit mask, the lowest bit first: int32 `[ceil(vocab_size / 32)]`."""
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        return words[: math.ceil(vocab_size / 32)]

    def append(self, token: int) -> None:
        """Advance by `token`."""
        self._matcher.consume_token(token)

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens`, from the first on, may come next."""
        return int(self._matcher.validate_tokens(list(tokens)))

    @property
    def error(self) -> str:
        """Reason why it cannot continue (a limit), or nothing."""
        text = str(self._matcher.get_error()) if self._matcher.is_error() else ""
        return text.partition("\n")[0]


class _Vocabulary:
    """A tokenizer with the interface that llguidance expects."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = next(iter(tokenizer.start_ids), None)
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text]
        for token in self.special_token_ids:  # they have no bytes, but need a name
            self.tokens[token] = tokenizer.token_text(token).encode()
        special = set(self.special_token_ids)
        self._ids = {text: i for i, text in enumerate(self.tokens) if i not in special}
        self._most_bytes = max(map(len, self._ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """Return tokens whose bytes are those of `text`, which may be any part of an answer."""
        data = text if isinstance(text, bytes) else text.encode()
        try:
            tokens = self._tokenizer.encode(data.decode())
        except (UnicodeDecodeError, UserError):  # a part of a character, or outside the alphabet
            return self._longest(data)
        # Tokenizers that put a space before texts are for whole texts.
        is_exact = b"".join([self.tokens[token] for token in tokens]) == data
        return tokens if is_exact else self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        """Return the longest token that `data` begins with, and so on, while there is one."""
        tokens: list[int] = []
        while data:
            ends = range(min(len(data), self._most_bytes), 0, -1)
            token = next((self._ids[data[:end]] for end in ends if data[:end] in self._ids), None)
            if token is None:
                break
            tokens.append(token)
            data = data[len(self.tokens[token]) :]
        return tokens


def _refused(kind: str, reason: object) -> UserError:
    return UserError(kind, message=f"{kind} is not allowed: {str(reason)[:500]}")


def _schema(source: str) -> Schema:
    try:
        schema = json.loads(source)
    except ValueError as error:
        raise _refused("json_schema", error) from error
    except RecursionError as error:
        raise _refused("json_schema", "it is nested too deeply") from error
    if isinstance(schema, bool):
        schema = {"anyOf": [schema]}
    if not isinstance(schema, dict):
        raise _refused("json_schema", "it must be an object or boolean")
    try:
        return prepare(schema)
    except RecursionError as error:
        raise _refused("json_schema", "it is nested too deeply") from error


def _lark(source: str) -> str:
    """Return a grammar in Lark, given in Lark or in GBNF."""
    try:
        return any_to_lark(source)
    except Exception as error:  # its errors about a grammar have no class of their own
        raise _refused("grammar", f"{type(error).__name__}: {error}") from error


def _json_grammar(schema: Schema) -> str:
    """Return the grammar of a schema. It allows no white space unless the schema's `x-guidance`
    does: where white space is allowed anywhere, a model may write nothing else."""
    compile_schema = llguidance.LLMatcher.grammar_from_json_schema
    try:
        return str(compile_schema(json.dumps(schema), {"whitespace_flexible": False}))
    except (ValueError, RecursionError) as error:
        raise _refused("json_schema", error) from error


def _refuse_part(source: str) -> None:
    """Raise UserError for the first schema of tools that cannot be followed: that of answers
    without calls, or the parameters of a tool."""
    text = text_of(source)
    if text is not None and (reason := _reason(_json_grammar(text))):
        raise _refused("json_schema", f"at {_place(text, reason)}, {reason}")
    for name, schema in schemas_of(source):
        try:
            reason = _reason(_json_grammar(schema))
        except UserError as error:
            raise wrong_parameters(name, str(error)) from error
        if reason:
            raise wrong_parameters(name, f"at {_place(schema, reason)}, {reason}")


def _reason(grammar: str) -> str:
    """Return why a grammar cannot be compiled, or nothing."""
    is_wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    if not is_wrong:
        return ""
    return " ".join(messages[0].split()).partition(" while processing json-schema:")[0]


def _place(schema: Schema, reason: str) -> str:
    """Return the place of the innermost schema that is refused for `reason`."""
    definitions: Schema = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    place, left, seen = "#", [Node(schema, "#")], 0
    while left and seen < MOST_PLACES:
        node = left.pop()
        inner = list(children(node))
        found = target(node.schema.get("$ref"), schema)
        inner += [] if found is None else [Node(found, str(node.schema["$ref"]))]
        for child in inner[:MOST_PLACES]:
            seen += 1
            if _reason(_json_grammar({**child.schema, **definitions})) == reason:
                place, left = child.place, [child]
                break
    return place
