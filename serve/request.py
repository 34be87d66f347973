"""What the engine is asked, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve.config import is_whole
from serve.sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt to decode. Raises ValueError for a field that no model could be asked."""

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

    def __post_init__(self) -> None:
        for name in ("tokens", "stop_tokens"):
            ids = getattr(self, name)
            if not isinstance(ids, list | tuple) or not all(map(is_whole, ids)):
                raise ValueError(
                    f"{name}={_shown(ids)} is not allowed: it must be a list of token ids, whole "
                    "numbers >= 0"
                )
            # The caller's list may change.
            object.__setattr__(self, name, tuple(ids))
        if not self.tokens:
            raise ValueError("tokens=[] is not allowed: start the prompt with BOS")
        count, stops = self.max_new_tokens, self.stop_strings
        if not is_whole(count) or count < 1:
            raise ValueError(
                f"max_new_tokens={count!r} is not allowed: it must be a whole number >= 1"
            )
        if not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"sampling={self.sampling!r} is not allowed: give SamplingParams")
        if not isinstance(stops, list | tuple) or not all(s and isinstance(s, str) for s in stops):
            raise ValueError(
                f"stop_strings={_shown(stops)} is not allowed: it must be a list of texts, each of "
                "a character or more"
            )
        if not isinstance(self.priority, int):
            raise ValueError(
                f"priority={self.priority!r} is not allowed: it must be a whole number"
            )


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


def _shown(value: object) -> str:
    """A value, however long, in an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
