"""From logits to token ids, the same for a request whatever else is in its batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens. Raises ValueError for a value that is not allowed."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most probable token always."""
    top_k: int = 0
    """Choose among this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Then among the fewest most probable ones that hold this share of the probability; 1 for all."""
    seed: int = 0
    """With a token's position, all that decides its random number."""

    def __post_init__(self) -> None:
        self._require("temperature", _is_number(self.temperature, 0), "a finite number >= 0")
        self._require("top_k", _is_whole(self.top_k), "a whole number >= 0 (0 for all tokens)")
        above_zero = _is_number(self.top_p, 0) and 0 < self.top_p <= 1
        self._require("top_p", above_zero, "above 0 and at most 1 (1 for all tokens)")
        self._require("seed", _is_whole(self.seed) and self.seed < 2**64, "from 0 to 2**64 - 1")
