"""What comes of a request, gathered from the engine's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve.request import FinishReason, Output, Request, TokenLogprobs


@dataclass(frozen=True)
class Completion:
    """What came of one request, or a piece of it."""

    text: str
    num_tokens: int
    """Without a stop token."""
    logprobs: Sequence[TokenLogprobs]
    """Of these tokens, if they were asked for."""
    finish_reason: FinishReason | None
    """None for a piece that is not the last."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """Of the prompt's tokens but the first, if they were asked for; in the first piece."""


@dataclass
class Gathering:
    """A request's outputs so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[Sequence[TokenLogprobs]] = field(default_factory=list)
    """As they came, which may be packed."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReason | None = None

    def add(self, output: Output) -> None:
        """The next output."""
        self.tokens += output.tokens
        self.texts.append(output.text)
        if output.logprobs:
            self.logprobs.append(output.logprobs)
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = output.finish_reason

    @property
    def num_tokens(self) -> int:
        """New tokens so far, without a stop token."""
        is_stopped = self.tokens[-1:] and self.tokens[-1] in self.request.stop_tokens
        return len(self.tokens) - bool(is_stopped)

    def completion(self) -> Completion:
        """All of it. A stop token has no text, and is not counted."""
        logprobs = [its for part in self.logprobs for its in part]
        return Completion(
            "".join(self.texts),
            self.num_tokens,
            logprobs[: self.num_tokens],
            self.finish_reason,
            self.prompt_logprobs,
        )


def piece_of(request: Request, output: Output) -> Completion:
    """What one output adds."""
    gathering = Gathering(request)
    gathering.add(output)
    return gathering.completion()
