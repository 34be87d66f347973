"""The shape of a Flash-STU model: one frozen, validated dataclass, and its JSON form."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from stu.common.text import nearest


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the weights of a model and the function they compute."""

    vocab_size: int
    """Rows of the embedding: the number of token ids."""
    width: int = 512
    """Model width D: channels of the residual stream."""
    num_layers: int = 8
    """Blocks; each is a mixer and a gated MLP."""
    layout: Literal["hybrid", "stu", "hyena", "attention"] = "hybrid"
    """`hybrid`: even blocks mix with STU, odd ones with windowed attention. The others: all blocks
    mix with STU, with Hyena (order 2), with windowed attention."""
    stu_form: Literal["tensordot", "full"] = "tensordot"
    """`tensordot`: one filter per channel (STU-T). `full`: a D x D matrix per spectral filter."""
    num_filters: int = 24
    """Spectral filters K, of STU layers."""
    max_seq_len: int = 4096
    """Longest context L in tokens, prompt and generated tokens together."""
    mlp_ratio: int = 4
    """Hidden width of the gated MLP, in units of `width`."""
    num_heads: int = 8
    """Attention heads; `width` is divided among them."""
    window_tokens: int = 1024
    """Keys a token attends to on its left, besides itself."""
    softcap: float = 50.0
    """Attention scores are squashed into (-softcap, softcap)."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_filters", "max_seq_len"):
            _require(self, name, _is_count(getattr(self, name)), "a whole number >= 1")
        for name in ("mlp_ratio", "num_heads", "window_tokens"):
            _require(self, name, _is_count(getattr(self, name)), "a whole number >= 1")
        is_layout = self.layout in ("hybrid", "stu", "hyena", "attention")
        _require(self, "layout", is_layout, "'hybrid', 'stu', 'hyena' or 'attention'")
        _require(self, "stu_form", self.stu_form in ("tensordot", "full"), "'tensordot' or 'full'")
        _require(self, "softcap", _is_positive(self.softcap), "a positive number")
        _require(self, "norm_eps", _is_positive(self.norm_eps), "a positive number")
        if self.stu_layers and self.num_filters > self.max_seq_len:
            raise ValueError(
                f"num_filters={self.num_filters} is more than max_seq_len={self.max_seq_len} "
                "filters can span: lower num_filters or raise max_seq_len"
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"width={self.width} is not divisible by num_heads={self.num_heads}: "
                "choose a num_heads that divides the width"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the blocks that mix with attention."""
        if self.layout == "attention":
            return tuple(range(self.num_layers))
        return tuple(range(1, self.num_layers, 2)) if self.layout == "hybrid" else ()

    @property
    def convolution_layers(self) -> tuple[int, ...]:
        """Indices of the blocks that mix with a long convolution, STU or Hyena."""
        return tuple(i for i in range(self.num_layers) if i not in self.attention_layers)

    @property
    def stu_layers(self) -> tuple[int, ...]:
        """Indices of the blocks that mix with STU."""
        return () if self.layout == "hyena" else self.convolution_layers

    @property
    def streams_per_sequence(self) -> int:
        """Sequences that a long convolution makes of one: one, or one of each channel."""
        return self.width if self.stu_layers and self.stu_form == "full" else 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Build from JSON values; an unknown key is refused with the nearest valid one."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"unknown model setting {key!r}{nearest(key, known)}")
        if "vocab_size" not in values:
            raise ValueError("model setting 'vocab_size' is missing: give the tokenizer's size")
        return cls(**values)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf  # type: ignore[operator]


def _require(config: ModelConfig, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r} is not allowed: it must be {allowed}")
