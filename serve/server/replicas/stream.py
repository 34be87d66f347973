"""A client's request while replicas decode it, and the ways in which it may fail."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from serve.cache.prefix_cache import Digests
from serve.request import Output, Request
from serve.server.replicas.prefixes import prefix_digests

MOST_MOVES = 5
"""Replicas that may end during a request before its next token."""
SUSPECT_MOVES = 2
"""Replicas that end during a request before it is suspected as the cause."""


class Busy(Exception):
    """Too many requests wait."""


class Unavailable(Exception):
    """No replica is available."""


class Abandoned(Unavailable):
    """Several replicas ended during a request."""


class EngineError(Exception):
    """An engine failed to decode a request."""


@dataclass(eq=False)
class Stream:
    """A request, and the outputs that its reader has yet to take."""

    number: int
    request: Request
    client: str = ""
    """Name of the client; clients take turns."""
    is_background: bool = False
    """Whether others go first: it takes no place of theirs in the queue, and its times are not
    observed."""
    new_token_ids: list[int] = field(default_factory=list)
    outputs: asyncio.Queue[Output | Exception] = field(default_factory=asyncio.Queue)
    num_moves: int = 0
    """Replicas that ended during the request since its last token."""
    scheduled: float | None = None
    """Time at which an engine first began its prefill, by the monotonic clock."""
    first_token: float | None = None
    """Time at the end of the step that generated its first token."""
    last_token: float | None = None
    """Time at the end of the last step that generated a token."""
    on_scheduled: Callable[[float], None] | None = None
    """Function to call with the time at which its prefill begins."""
    num_to_prefill: int = field(init=False)
    """Tokens that a replica has yet to prefill, as far as is known."""

    def __post_init__(self) -> None:
        self.expect_prefill(num_remembered=0)

    @property
    def priority(self) -> int:
        """Priority of the request; lower numbers go first."""
        return self.request.priority

    @property
    def is_suspect(self) -> bool:
        """Whether the request may have caused the end of replicas."""
        return self.num_moves >= SUSPECT_MOVES

    @property
    def cost(self) -> int:
        """Number of tokens that an engine has yet to prefill or to decode."""
        num_to_decode = self.request.sampling.max_new_tokens - len(self.new_token_ids)
        return self.num_to_prefill + num_to_decode

    @cached_property
    def prefix(self) -> Digests:
        """Digests of the blocks at the start of the prompt that a replica may remember."""
        return prefix_digests(self.request)

    def expect_prefill(self, num_remembered: int) -> None:
        """Note that a replica is to prefill all tokens but those that it remembers."""
        num_tokens = len(self.request.prompt_token_ids) + len(self.new_token_ids)
        self.num_to_prefill = num_tokens - num_remembered

    def move(self) -> bool:
        """Note that a replica ended during the request, and return whether another may have it.

        If not, as the request may be the cause, its reader gets Abandoned.
        """
        self.num_moves += 1
        if self.num_moves <= MOST_MOVES:
            return True
        message = f"{self.num_moves} replicas ended during this request, which may be the cause"
        self.outputs.put_nowait(Abandoned(message))
        return False

    def schedule(self, moment: float) -> None:
        """Note that an engine has begun its prefill; another one may do so again later."""
        if self.scheduled is None:
            self.scheduled = moment
            if self.on_scheduled is not None:
                self.on_scheduled(moment)

    def take(self, output: Output, moment: float) -> None:
        """Pass an output on to the reader, with the time at the end of its step."""
        self.num_to_prefill = 0
        if output.new_token_ids:
            self.num_moves = 0
            self.new_token_ids += output.new_token_ids
            self.first_token = self.first_token or moment
            self.last_token = moment
        self.outputs.put_nowait(output)

    def rest(self) -> Request:
        """Return the request for the tokens that are still to be decoded."""
        is_new = len(self.new_token_ids) == len(self.request.new_token_ids)
        if is_new and self.client == self.request.client:
            return self.request  # a copy would take 20 milliseconds to check a long prompt
        return replace(self.request, new_token_ids=tuple(self.new_token_ids), client=self.client)
