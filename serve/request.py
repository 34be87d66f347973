"""What the engine is asked, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve.config import is_whole
from serve.sampling_params import MOST_LOGPROBS, Constraint, SamplingParams
from stu.config import ModelConfig

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt to decode. Raises ValueError for a field that no model could be asked."""

    tokens: Sequence[int]
    """The prompt's token ids; at least one, BOS if there is nothing else."""
    max_new_tokens: int
    """0: only what its prompt's tokens are worth (see `prompt_logprobs`) is found out."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_strings: Sequence[str] = ()
    """Decoding ends before the first of these that appears in the new text."""
    stop_tokens: Sequence[int] = ()
    """Decoding ends at the first of these ids (EOS, if it is to end anything); it has no text."""
    priority: int = 0
    """Requests with a lower number go first; equal ones in the order they came."""
    prompt_logprobs: int | None = None
    """Report the log probability of each of the prompt's tokens but the first, and those of so many
    most probable ones at its place."""
    constraint: Constraint | None = None
    """What the new text must follow; it needs EOS among the stop tokens."""
    min_new_tokens: int = 0
    """No stop token is chosen, and no stop string ends it, before it has so many."""
    client: str = ""
    """Who asks. Clients whose requests have one priority get as many rows each, as far as they have
    requests for them."""
    given: Sequence[int] = ()
    """New tokens that this request has from another engine, which went away: it goes on after
    them, as it would have."""

    def __post_init__(self) -> None:
        for name in ("tokens", "stop_tokens", "given"):
            ids = getattr(self, name)
            if not isinstance(ids, list | tuple) or not _are_whole(ids):
                raise ValueError(
                    f"{name}={_shown(ids)} is not allowed: it must be a list of token ids, whole "
                    "numbers >= 0"
                )
            # The caller's list may change.
            object.__setattr__(self, name, tuple(ids))
        if not self.tokens:
            raise ValueError("tokens=[] is not allowed: start the prompt with BOS")
        count, stops = self.max_new_tokens, self.stop_strings
        if not is_whole(count):
            raise ValueError(
                f"max_new_tokens={count!r} is not allowed: it must be a whole number >= 0"
            )
        least = self.min_new_tokens
        if not (is_whole(least) and least <= count):
            raise ValueError(
                f"min_new_tokens={least!r} is not allowed: it must be a whole number from 0 to "
                f"max_new_tokens={count}"
            )
        if self.constraint is not None and least:
            raise ValueError(
                f"min_new_tokens={least} is not allowed with a constraint, which may allow no text "
                "so long: it must be 0"
            )
        if self.given and len(self.given) >= count:
            raise ValueError(
                f"given={_shown(self.given)} is not allowed: these are max_new_tokens={count} "
                "tokens already, or more"
            )
        if not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"sampling={self.sampling!r} is not allowed: give SamplingParams")
        if not isinstance(stops, list | tuple) or not all(s and isinstance(s, str) for s in stops):
            raise ValueError(
                f"stop_strings={_shown(stops)} is not allowed: it must be a list of texts, each of "
                "a character or more"
            )
        most = self.prompt_logprobs
        if most is not None and not (is_whole(most) and most <= MOST_LOGPROBS):
            raise ValueError(
                f"prompt_logprobs={most!r} is not allowed: it must be from 0 to {MOST_LOGPROBS}, "
                "or null for none"
            )
        if not isinstance(self.priority, int):
            raise ValueError(
                f"priority={self.priority!r} is not allowed: it must be a whole number"
            )


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before any sampling setting."""

    token: int
    logprob: float
    """Of the token that was chosen."""
    top: dict[int, float]
    """The most probable tokens and theirs, the most probable first, of equal ones the lower id."""


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
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """One for each of the prompt's tokens but the first, if the request asks for them: in the first
    of its outputs that has anything."""
    finish_reason: FinishReason | None = None
    """None while the request goes on; its last output has one."""
    error: str = ""
    """With `finish_reason == "error"`: what went wrong and what to do."""
    is_refused: bool = False
    """Whether the error is the request's own, and not the engine's."""


class ContextLengthError(ValueError):
    """A prompt and its new tokens are more than the model can hold."""

    code = "context_length_exceeded"


def require_room(request: Request, max_seq_len: int, what: str = "prompt") -> None:
    """Raises ContextLengthError unless `request`, whose tokens `what` names, fits a context."""
    num_tokens, count = len(request.tokens), request.max_new_tokens
    if num_tokens + count <= max_seq_len:
        return
    room = max_seq_len - num_tokens
    fix = f"lower max_new_tokens to {room} or shorten the prompt"
    # Gateways know these first words, and these last ones, and fall back to another model.
    raise ContextLengthError(
        f"This model's maximum context length is {max_seq_len} tokens (max_seq_len={max_seq_len}), "
        f"and a {what} of {num_tokens} tokens and max_new_tokens={count} are {num_tokens + count}: "
        f"{fix if room > 0 else 'the prompt is too long, shorten it'}"
    )


def check_request(request: Request, model: ModelConfig, eos_id: int) -> None:
    """Raises ValueError for what no engine of the model can decode."""
    vocab_size, longest = model.vocab_size, model.max_seq_len
    for name, ids in {
        "prompt": request.tokens,
        "stop_tokens": request.stop_tokens,
        "given": request.given,
        "logit_bias": request.sampling.logit_bias,
    }.items():
        if max(ids, default=0) >= vocab_size:
            raise ValueError(
                f"{name} has the id {max(ids)}, and the vocabulary ids 0 to {vocab_size - 1}: "
                "use the model's own tokenizer"
            )
    if request.constraint is not None and eos_id not in request.stop_tokens:
        raise ValueError(
            f"stop_tokens={list(request.stop_tokens)} is not allowed with a constraint: EOS "
            f"({eos_id}) must be among them"
        )
    require_room(request, longest)


def _are_whole(ids: Sequence[int]) -> bool:
    """`all(map(is_whole, ids))`, many times as fast."""
    return set(map(type, ids)) <= {int} and min(ids, default=0) >= 0


def _shown(value: object) -> str:
    """A value, however long, in an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
