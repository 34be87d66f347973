"""Scores: log probabilities of texts under a model."""

import math
from dataclasses import dataclass

from serve.completion import Completion
from serve.prompts import encode_prompt
from serve.request import Request, are_token_ids, require_in_vocabulary
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.tokenizer import Tokenizer, encode_text


@dataclass(frozen=True)
class Score:
    """Log probability of a text."""

    logprob: float
    """Sum of the natural log probabilities of its tokens."""
    num_tokens: int
    """Number of scored tokens."""
    num_bytes: int
    """Number of bytes of the text in UTF-8."""

    @property
    def bits_per_byte(self) -> float | None:
        """Negative log probability to base 2, divided by the number of bytes; None for an empty
        text."""
        return -self.logprob / math.log(2) / self.num_bytes if self.num_bytes else None

    @property
    def perplexity(self) -> float | None:
        """Inverse of the geometric mean of the tokens' probabilities; None without tokens."""
        if not self.num_tokens:
            return None
        try:
            return math.exp(-self.logprob / self.num_tokens)
        except OverflowError:
            return math.inf


class Scoring:
    """A text to score: a prompt after its first token, or a completion after its prompt.

    The first token of a text is BOS, if the tokenizer has one. Without, the text's own first token
    has no probability, and is left out of the score.

    The tokens of a completion are those of its own text, as if they had been generated.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text, or token ids, which are used as they are.
        completion: Text or token ids. None: the prompt is scored.

    Raises UserError for a prompt or completion that is not allowed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: object, completion: object = None) -> None:
        self._tokenizer = tokenizer
        self._text = prompt if completion is None else completion
        self._lacks_first = completion is None and not tokenizer.start_ids
        tokens = encode_prompt(tokenizer, prompt)
        num_given = len(tokens)
        if completion is not None:
            tokens += _encode_completion(tokenizer, completion)
        self.request = Request(
            tokens,
            SamplingParams(max_new_tokens=0, prompt_logprobs=0),
            prompt_logprobs_from=1 if completion is None else num_given,
        )
        """Request for the log probabilities."""

    def score(self, answer: Completion) -> Score:
        """Return the score, given what an engine returned for the request."""
        logprobs = answer.prompt_logprobs
        if isinstance(self._text, str) and not self._lacks_first:
            num_bytes = len(self._text.encode())
        else:
            num_bytes = sum(len(self._tokenizer.token_bytes(token.token)) for token in logprobs)
        return Score(math.fsum(token.logprob for token in logprobs), len(logprobs), num_bytes)


def _encode_completion(tokenizer: Tokenizer, completion: object) -> list[int]:
    if isinstance(completion, str):
        tokens = encode_text(tokenizer, "completion", completion)
        if b"".join(map(tokenizer.token_bytes, tokens)) != completion.encode():
            raise UserError(
                "completion",
                completion,
                "a list of token ids, as the model's tokenizer changes texts: it adds a space "
                "before them, or normalises them",
            )
        return tokens
    if isinstance(completion, list | tuple) and are_token_ids(completion):
        require_in_vocabulary("completion", completion, tokenizer.vocab_size)
        return list(completion)
    raise UserError("completion", completion, "a string or a list of token ids")
