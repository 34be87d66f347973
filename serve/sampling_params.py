"""The settings by which a request chooses its tokens."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from serve.config import is_whole

JsonWhitespace = Literal["compact", "flexible"]
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Constraint:
    """What the text of a completion must follow."""

    kind: Literal["json_schema", "regex"]
    source: str
    """The schema, as JSON, or the expression."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens. Raises ValueError for a value that is not allowed."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most probable token always."""
    top_k: int = 0
    """Choose among this many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Then among the fewest most probable ones that hold this share of the probability: 1: all, 0:
    the most probable one."""
    min_p: float = 0.0
    """Then among those at least this share as probable as the most probable one; 0: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the new text are divided by it if positive, else multiplied
    (Keskar et al. 2019); 1: none."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the new text."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the new text, once for each time they are there."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    logprobs: int | None = None
    """Report each new token's log probability, and those of so many most probable ones."""
    seed: int = 0
    """With a token's position, all that decides its random number."""

    def __post_init__(self) -> None:
        self._require("temperature", _is_number(self.temperature), "a finite number >= 0")
        is_count = is_whole(self.top_k) and self.top_k < 2**31
        self._require("top_k", is_count, "a whole number from 0 (for all tokens) to 2**31 - 1")
        is_share = _is_number(self.top_p) and self.top_p <= 1
        self._require("top_p", is_share, "from 0 (for the most probable token) to 1 (for all)")
        is_share = _is_number(self.min_p) and self.min_p <= 1
        self._require("min_p", is_share, "from 0 (for all tokens) to 1")
        is_factor = _is_number(self.repetition_penalty, 0.01, 100)
        self._require("repetition_penalty", is_factor, "a number from 0.01 to 100 (1 for none)")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, _is_number(getattr(self, name), -2, 2), "a number from -2 to 2")
        bias = self.logit_bias
        is_bias = isinstance(bias, Mapping) and all(
            is_whole(token) and _is_number(value, -100, 100) for token, value in bias.items()
        )
        self._require("logit_bias", is_bias, "a number from -100 to 100 for each of some token ids")
        is_count = self.logprobs is None or is_whole(self.logprobs)
        is_count = is_count and (self.logprobs or 0) <= MOST_LOGPROBS
        self._require("logprobs", is_count, f"from 0 to {MOST_LOGPROBS}, or null for none")
        self._require("seed", is_whole(self.seed) and self.seed < 2**64, "from 0 to 2**64 - 1")

    @property
    def needs_history(self) -> bool:
        """Whether the logits depend on more than the model."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return bool(self.logit_bias) or penalties != (1, 0, 0)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}")


def _is_number(value: object, least: float = 0, most: float = sys.float_info.max) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and least <= value <= most  # type: ignore[operator]
