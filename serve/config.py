"""The settings of an engine."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may use, and how it shares it out."""

    cache_gib: float | None = None
    """GiB for what running requests remember (see `serve.cache_size`). None: half of the memory
    that is free once the model is loaded."""
    page_len: int = 32
    """Positions in a cache page, and the smallest tile of FutureFill: a power of two."""
    max_running: int = 32
    """Requests that decode together."""
    prompt_tokens_per_step: int = 2048
    """Prompt tokens that one step takes in, beside a token of each running request: more fill the
    cache sooner, fewer let running requests go on more evenly."""
    expected_new_tokens: int | None = None
    """A request gets pages for so many new tokens at first; one that goes on is set back, and its
    prompt and new tokens are taken in again with room for twice as many. More requests run together
    where most stop long before their `max_new_tokens`. None: room for all from the start."""
    batch_invariant: bool = False
    """Give a request the same tokens to the last bit whatever runs beside it, at some cost."""

    def __post_init__(self) -> None:
        gib = self.cache_gib
        self._require("cache_gib", gib is None or 0 < gib < math.inf, "above 0, in GiB")
        power_of_two = self.page_len >= 2 and self.page_len & (self.page_len - 1) == 0
        self._require("page_len", power_of_two, "a power of two, at least 2")
        self._require("max_running", self.max_running >= 1, "at least 1")
        self._require("prompt_tokens_per_step", self.prompt_tokens_per_step >= 1, "at least 1")
        expected = self.expected_new_tokens
        self._require("expected_new_tokens", expected is None or expected >= 1, "at least 1")
        if self.batch_invariant and expected is not None:
            raise ValueError(
                f"expected_new_tokens={expected} cannot go with batch_invariant: taking a request "
                "in again rounds differently; leave one of them out"
            )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}")
