"""What the engine is asked, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve.sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt to decode."""

    tokens: Sequence[int]
    """The prompt's token ids; at least one, BOS if there is nothing else."""
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_strings: Sequence[str] = ()
    """Decoding ends before the first of these that appears in the new text."""
    stop_tokens: Sequence[int] = ()
    """Decoding ends at the first of these ids (EOS, if it is to end anything); it has no text."""
    priority: int = 0
    """Requests with a lower number go first; equal ones in the order they came."""


@dataclass(frozen=True)
class Output:
    """What one engine step added to one request."""

    request_id: int
    tokens: Sequence[int] = ()
    """New token ids: what has no text (a stop token) and what a stop string cut off included."""
    text: str = ""
    """New text in whole characters. All texts of a request, joined, are its completion."""
    logprobs: Sequence[TokenLogprobs] = ()
    """One for each of `tokens`, if the request asks for them."""
    finish_reason: FinishReason | None = None
    """None while the request goes on; its last output has one."""
    error: str = ""
    """With `finish_reason == "error"`: what went wrong and what to do."""
