"""Completions, built from the engine's outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from serve.request import FinishReason, Output, TokenLogprobs
from serve.sampling_params import SamplingParams


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt, or a piece of it."""

    text: str
    token_ids: Sequence[int]
    """New tokens, without the stop token that ended the text."""
    logprobs: Sequence[TokenLogprobs]
    """Log probabilities of `token_ids`, if requested."""
    finish_reason: FinishReason | None
    """Why the completion ended; None for a piece that is not the last."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """Log probabilities of the prompt's tokens from `Request.prompt_logprobs_from` on, if
    requested; in the first piece."""
    error: str = ""
    """Explanation of `finish_reason == "error"`."""
    embedding: Sequence[float] = ()
    """Embedding of the prompt, if requested; in the last piece."""
    cumulative_logprob: float | None = None
    """Sum of the log probabilities of the new tokens, including the stop token, if requested."""
    stop_logprobs: Sequence[TokenLogprobs] = ()
    """Log probabilities of the stop token that ended the text, if requested."""


@dataclass
class CompletionBuilder:
    """Builds the completion of a request from its outputs."""

    token_ids: list[int] = field(default_factory=list)
    """New tokens, without the stop token that ended the text."""
    texts: list[str] = field(default_factory=list)
    logprobs: list[Sequence[TokenLogprobs]] = field(default_factory=list)
    """Log probabilities of each output. A server keeps them packed, in a ninth of the memory."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
    embedding: Sequence[float] = ()
    cached_tokens: int = 0
    """Tokens of the prompt that an engine remembered."""

    def add(self, output: Output) -> None:
        """Append the next output."""
        if not self.texts:  # another engine, in which the request continues, knows less or more
            self.cached_tokens = output.cached_tokens
        self.token_ids += output.new_token_ids
        if output.ends_with_stop_token:
            self.token_ids.pop()
        self.texts.append(output.text)
        if output.logprobs:
            self.logprobs.append(output.logprobs)
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.error = output.finish_reason, output.error
        self.embedding = output.embedding

    def completion(self) -> Completion:
        """Return the completion up to now."""
        logprobs = [token for part in self.logprobs for token in part]
        num_tokens = len(self.token_ids)
        return Completion(
            "".join(self.texts),
            self.token_ids,
            logprobs[:num_tokens],
            self.finish_reason,
            self.prompt_logprobs,
            self.error,
            self.embedding,
            math.fsum(token.logprob for token in logprobs) if logprobs else None,
            logprobs[num_tokens:],
        )


def best(completions: Sequence[Completion], count: int) -> list[Completion]:
    """Return the `count` completions with the highest cumulative log probabilities, in descending
    order. Those that failed come last, and of equal ones the first comes first."""

    def rank(completion: Completion) -> tuple[bool, float]:
        return completion.finish_reason == "error", -(completion.cumulative_logprob or 0.0)

    return sorted(completions, key=rank)[:count]


def answered(completions: Sequence[Completion], params: SamplingParams) -> list[Completion]:
    """Return the completions that answer a request, of all that were generated for it. Log
    probabilities are left out if they were only to choose the best."""
    if params.num_candidates == params.n:
        return list(completions)
    found = best(completions, params.n)
    if params.logprobs is not None:
        return found
    return [replace(completion, logprobs=(), stop_logprobs=()) for completion in found]


def normalized(embedding: Sequence[float]) -> list[float]:
    """Return an embedding of length 1 in the same direction; zeros stay zeros."""
    length = math.hypot(*embedding)
    return [value / length for value in embedding] if length else list(embedding)


def piece_of(output: Output) -> Completion:
    """Return the piece of a completion that one output adds."""
    builder = CompletionBuilder()
    builder.add(output)
    return builder.completion()
