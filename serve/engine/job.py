"""A request in the engine, until it ends."""

from dataclasses import dataclass, field

from serve.cache.prefix_cache import Digests
from serve.request import Request
from serve.sampling.ngrams import Ngrams

SCORED_TOKEN_COST = 4
"""Prompt tokens that are prefilled in about the time of one whose log probability is asked for."""


@dataclass(eq=False)
class Job:
    """A request that has not ended."""

    request_id: int
    request: Request
    horizon: int
    """Number of new tokens that it gets pages for at a time."""
    new_token_ids: list[int] = field(default_factory=list)
    """New tokens up to now."""
    num_seen: int = 0
    """Number of tokens, prompt and new, that its row remembers."""
    steps_left: int = 0
    """Number of steps that it still has pages for."""
    num_unread: int = 0
    """Number of new tokens that the device has chosen and the host has not read."""
    has_ended: bool = False
    row: int = -1
    """Row of the batch, from its admission until it ends or is preempted."""
    digests: Digests | None = None
    """Digests of the blocks of its tokens. None if it does not use the prefix cache."""
    snapshots_at: frozenset[int] | None = None
    """Numbers of tokens after which its prefill takes a snapshot. None: after each chunk."""
    cached_tokens: int | None = None
    """Number of tokens of its prompt that were remembered when it was first admitted."""

    ngrams: Ngrams | None = None
    """Guesses of its next tokens, once there were any."""

    def see(self) -> None:
        """Take note that its row has taken one more of its tokens, in a step."""
        self.num_seen += 1
        self.steps_left -= 1

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of the prompt, and new ones."""
        return *self.request.prompt_token_ids, *self.new_token_ids

    @property
    def num_tokens(self) -> int:
        """Number of tokens to prefill again if it is preempted: prompt and new tokens."""
        return len(self.request.prompt_token_ids) + len(self.new_token_ids)

    @property
    def num_new_seen(self) -> int:
        """Number of new tokens that its row remembers. Where there are more, they were generated
        before it was preempted, and are decoded again."""
        return self.num_seen - len(self.request.prompt_token_ids)

    @property
    def next_token(self) -> int | None:
        """Token that its row sees next; None if the host has not read it."""
        known = self.num_new_seen < len(self.new_token_ids)
        return self.new_token_ids[self.num_new_seen] if known else None

    @property
    def needs_token(self) -> bool:
        """Whether its next token is to be chosen: its row remembers all others."""
        return not self.has_ended and self.num_new_seen == len(self.new_token_ids) + self.num_unread

    @property
    def steps_to_come(self) -> int:
        """Number of new tokens that it may still get."""
        return self.request.sampling.max_new_tokens - len(self.new_token_ids)

    @property
    def order(self) -> tuple[int, int]:
        """Key to sort jobs by: the smallest is scheduled first."""
        return self.request.priority, self.request_id

    @property
    def logprobs_from(self) -> int | None:
        """Position of the first token of the prompt whose log probability is asked for, or None."""
        asks = self.request.sampling.prompt_logprobs is not None
        return self.request.prompt_logprobs_from if asks else None

    @property
    def most_skipped(self) -> int:
        """Number of its first tokens that need not be computed, if they are remembered. Like the
        cost of a token it stays the same, so that all prefills divide the prompt alike."""
        if self.request.pooling == "mean":
            return 0
        return self.num_tokens if self.logprobs_from is None else self.logprobs_from - 1

    @property
    def token_cost(self) -> int:
        """How many usual prompt tokens take as long to prefill as one of its own."""
        return SCORED_TOKEN_COST if self.logprobs_from == 1 else 1
