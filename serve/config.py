"""The settings of an engine."""

import math
from dataclasses import dataclass

INVARIANT_ROWS = 8
"""Rows that go through the model together under `batch_invariant`."""


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may use, and how it shares it out."""

    cache_gib: float | None = None
    """GiB for what running requests remember (see `serve.cache.budget`). None: half of the memory
    that is free once the model is loaded."""
    page_len: int = 32
    """Positions in a cache page, and the smallest tile of FutureFill: a power of two."""
    max_running: int = 32
    """Requests that decode together."""
    prompt_tokens_per_step: int = 2048
    """Prompt tokens that one step takes in, beside a token of each running request: more fill the
    cache sooner, fewer let running requests go on more evenly. A token of a prompt whose log
    probabilities are asked for counts as four."""
    expected_new_tokens: int | None = None
    """A request gets pages for so many new tokens at first; one that goes on is set back, and its
    prompt and new tokens are taken in again with room for twice as many. More requests run together
    where most stop long before their `max_new_tokens`. None: room for all from the start."""
    batch_invariant: bool = False
    """Give a request the same tokens to the last bit whatever runs beside it, at some cost."""

    def __post_init__(self) -> None:
        gib, page_len, expected = self.cache_gib, self.page_len, self.expected_new_tokens
        is_gib = gib is None or (
            isinstance(gib, int | float) and not isinstance(gib, bool) and 0 < gib < math.inf
        )
        self._require("cache_gib", is_gib, "above 0, in GiB")
        power_of_two = is_whole(page_len) and page_len >= 2 and page_len & (page_len - 1) == 0
        self._require("page_len", power_of_two, "a power of two, at least 2")
        for name in ("max_running", "prompt_tokens_per_step"):
            count = getattr(self, name)
            self._require(name, is_whole(count) and count >= 1, "a whole number >= 1")
        is_count = expected is None or (is_whole(expected) and expected >= 1)
        self._require("expected_new_tokens", is_count, "a whole number >= 1, or null")
        is_switch = isinstance(self.batch_invariant, bool)
        self._require("batch_invariant", is_switch, "true or false")
        if self.batch_invariant and expected is not None:
            raise ValueError(
                f"expected_new_tokens={expected} cannot go with batch_invariant: taking a request "
                "in again rounds differently; leave one of them out"
            )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}")


def is_whole(value: object) -> bool:
    """Whether it is a whole number >= 0, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
