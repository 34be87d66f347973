"""Limits of the requests and tokens that a client may use in a minute.

A client's allowance is full at first and refills evenly: with 60 requests a minute, one each
second, up to 60. So a client that has waited may send 60 at once and 60 more in the minute that
follows, and no more than 60 a minute from then on. A request is charged for its prompts and all new
tokens that it asks for, so requests that run together cannot use more than that, and gets back what
it did not use when it ends.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from serve.server.access.keys import Key
from stu.common.errors import UserError

MOST_FULL = 10_000
"""Clients from which on those are forgotten whose allowances are full."""

ROUNDING = 1e-6
"""Missing part of an allowance that is none."""

Kind = Literal["requests", "tokens"]


class RateLimited(Exception):
    """A client has used up an allowance.

    Args:
        kind: Which one.
        limit: What it may use in a minute.
        asked: What its request needs.
        seconds: Time until the request would be allowed.
    """

    def __init__(self, kind: Kind, limit: int, asked: int, seconds: float) -> None:
        self.kind, self.seconds = kind, seconds
        super().__init__(
            f"rate limit reached: {limit} {kind} per minute, and this request needs {asked}: try "
            f"again in {seconds:.3g} seconds"
        )

    @property
    def headers(self) -> dict[str, str]:
        """Headers that tell clients when to come again."""
        return {
            "retry-after": str(max(1, math.ceil(self.seconds))),
            "retry-after-ms": str(max(1, math.ceil(1000 * self.seconds))),
        }


class Allowance:
    """Requests or tokens that a client may still use."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._left, self._at = float(per_minute), now

    def left(self, now: float) -> float:
        """Return what is left."""
        refilled = self._left + (now - self._at) * self.per_minute / 60
        self._left, self._at = min(float(self.per_minute), refilled), now
        return self._left

    def take(self, amount: float, now: float) -> None:
        """Use some of it; a negative amount gives back."""
        self._left = self.left(now) - amount

    def seconds_until(self, amount: float, now: float) -> float:
        """Return the time until so much is left."""
        missing = amount - self.left(now)
        return missing * 60 / self.per_minute if missing > ROUNDING else 0.0


@dataclass(frozen=True)
class Charge:
    """Tokens that a request was charged for."""

    tokens: Allowance | None
    num_tokens: int
    clock: Callable[[], float]

    def settle(self, num_used: int) -> None:
        """Give back the tokens that the request did not use."""
        if self.tokens is not None:
            self.tokens.take(num_used - self.num_tokens, self.clock())


UNLIMITED = Charge(None, 0, time.monotonic)
"""Charge of a request that no limit holds for."""


class RateLimits:
    """Allowances of all clients.

    Args:
        requests_per_minute: Limit for clients whose key names no other. None: none.
        tokens_per_minute: The same for tokens.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._defaults: dict[Kind, int | None] = {
            "requests": requests_per_minute,
            "tokens": tokens_per_minute,
        }
        self._clock = clock
        self._allowances: dict[tuple[str, Kind], Allowance] = {}

    def charge(
        self, client: str, key: Key | None, num_tokens: int, headers: dict[str, str]
    ) -> Charge:
        """Charge a client for a request and its tokens.

        Args:
            client: Name of the client.
            key: Its key, if it has one.
            num_tokens: Tokens of its prompts, and all new ones that it asks for.
            headers: Gets OpenAI's headers about the limits of the client.

        Raises:
            RateLimited: The client has to wait; nothing is charged.
            UserError: The request needs more tokens than a full allowance has.
        """
        now = self._clock()
        limits = dict(self._defaults)
        if key is not None:
            limits["requests"] = key.requests_per_minute or limits["requests"]
            limits["tokens"] = key.tokens_per_minute or limits["tokens"]
        asked: dict[Kind, int] = {"requests": 1, "tokens": num_tokens}
        if (most := limits["tokens"]) is not None and num_tokens > most:
            raise UserError(
                "max_new_tokens",
                message=f"prompt and new tokens are {num_tokens}, more than the limit of {most} "
                "tokens per minute: ask for fewer new tokens, or shorten the prompt",
                code="rate_limit_exceeded",
            )
        allowances = {
            kind: self._allowance(client, kind, limit, now)
            for kind, limit in limits.items()
            if limit is not None
        }
        try:
            for kind, allowance in allowances.items():
                if (seconds := allowance.seconds_until(asked[kind], now)) > 0:
                    raise RateLimited(kind, allowance.per_minute, asked[kind], seconds)
            for kind, allowance in allowances.items():
                allowance.take(asked[kind], now)
        finally:
            for kind, allowance in allowances.items():
                left = max(0, math.floor(allowance.left(now)))
                headers[f"x-ratelimit-limit-{kind}"] = str(allowance.per_minute)
                headers[f"x-ratelimit-remaining-{kind}"] = str(left)
                full = allowance.seconds_until(allowance.per_minute, now)
                headers[f"x-ratelimit-reset-{kind}"] = duration(full)
        return Charge(allowances.get("tokens"), num_tokens, self._clock)

    def _allowance(self, client: str, kind: Kind, per_minute: int, now: float) -> Allowance:
        found = self._allowances.get((client, kind))
        if found is None:
            if len(self._allowances) >= MOST_FULL:
                self._forget_full(now)
            found = self._allowances[client, kind] = Allowance(per_minute, now)
        elif found.per_minute != per_minute:  # the keys have been read again
            found.left(now)
            found.per_minute = per_minute
        return found

    def _forget_full(self, now: float) -> None:
        self._allowances = {
            owner: allowance
            for owner, allowance in self._allowances.items()
            if allowance.left(now) < allowance.per_minute
        }


def duration(seconds: float) -> str:
    """Return a time as OpenAI's headers have it: `120ms`, `7.66s` or `1m30s`."""
    milliseconds = math.ceil(1000 * seconds)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    shown = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{shown}" if minutes else shown
