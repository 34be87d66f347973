"""The configuration of a model: a frozen, validated dataclass and its JSON form."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from stu.common.errors import UserError
from stu.common.text import nearest
from stu.layouts import layout_names, mixer_names

Weights = Literal["float", "int8"]
"""Format of the matrices that activations are multiplied with."""

LATER_FIELDS = {"blocks", "filter_bands", "filter_floor"}
"""Fields that the first versions of model directories do not have."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the weights of a model and the function they compute."""

    vocab_size: int
    """Number of token ids: the rows of the embedding."""
    width: int = 512
    """Model width D: channels of the residual stream."""
    num_layers: int = 8
    """Number of blocks, each with a mixer and an MLP."""
    layout: str = "hybrid"
    """Mixers of the blocks: `hybrid` (STU in even blocks, sliding-window attention in odd ones), or
    the same one in all blocks: `stu`, `hyena` (of order 2) or `attention` (sliding-window)."""
    stu_form: Literal["tensordot", "full"] = "tensordot"
    """Form of STU layers. `tensordot`: one filter per channel (STU-T). `full`: a D x D matrix per
    spectral filter."""
    num_filters: int = 24
    """Number of spectral filters K of STU layers."""
    max_seq_len: int = 4096
    """Longest context L in tokens, prompt and new tokens together."""
    mlp_ratio: int = 4
    """Hidden width of the MLP, as a multiple of `width`."""
    num_heads: int = 8
    """Number of attention heads, which divide `width` among them."""
    window_tokens: int = 1024
    """Number of tokens before the current one that attention sees."""
    softcap: float = 50.0
    """Bound on attention scores, which are squashed smoothly into (-softcap, softcap)."""
    norm_eps: float = 1e-5
    """Epsilon of the norms, added to the mean square or the variance."""
    blocks: Literal["gated", "plain"] = "gated"
    """Layers around the mixers. `gated`: RMSNorm and a gated MLP, without biases. `plain`:
    LayerNorm and an MLP without a gate, with biases, as in HyenaDNA; only for the layout
    `hyena`."""
    filter_bands: int = 16
    """Number of frequencies in the positional features from which Hyena's filters are computed."""
    filter_floor: float = 0.0
    """Number added to the window of Hyena's filters, which otherwise decays towards 0."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_filters", "max_seq_len"):
            _require(self, name, _is_count(getattr(self, name)), "a whole number >= 1")
        for name in ("mlp_ratio", "num_heads", "window_tokens", "filter_bands"):
            _require(self, name, _is_count(getattr(self, name)), "a whole number >= 1")
        layouts = layout_names()
        _require(self, "layout", self.layout in layouts, f"one of {', '.join(layouts)}")
        _require(self, "stu_form", self.stu_form in ("tensordot", "full"), "tensordot or full")
        _require(self, "blocks", self.blocks in ("gated", "plain"), "gated or plain")
        is_plain, fits = self.blocks == "plain", {*self.mixers} == {"hyena"}
        _require(self, "blocks", fits or not is_plain, "gated, as the layout is not hyena")
        floor = self.filter_floor
        _require(self, "filter_floor", floor == 0 or _is_positive(floor), "a number >= 0")
        _require(self, "softcap", _is_positive(self.softcap), "a positive number")
        _require(self, "norm_eps", _is_positive(self.norm_eps), "a positive number")
        if "stu" in self.mixers and self.num_filters > self.max_seq_len:
            raise UserError(
                "num_filters",
                self.num_filters,
                f"at most max_seq_len={self.max_seq_len}",
                "lower num_filters or raise max_seq_len",
            )
        if self.width % self.num_heads:
            raise UserError(
                "num_heads", self.num_heads, f"a number that divides width={self.width}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def mixers(self) -> tuple[str, ...]:
        """Name of the mixer of each block."""
        names = mixer_names(self.layout)
        return tuple(names[i % len(names)] for i in range(self.num_layers))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    def stored(self) -> dict[str, Any]:
        """Return the fields to store. Later additions are left out at their defaults, so that older
        versions of stu read the file too."""
        defaults = {field.name: field.default for field in fields(self)}
        values = self.to_dict().items()
        return {k: v for k, v in values if k not in LATER_FIELDS or v != defaults[k]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Build a configuration from JSON values. Raises UserError for an unknown key, naming the
        nearest known one."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(key, message=f"unknown model setting {key!r}{nearest(key, known)}")
        if "vocab_size" not in values:
            raise UserError(
                "vocab_size",
                message="model setting 'vocab_size' is missing: give the tokenizer's size",
            )
        return cls(**values)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf  # type: ignore[operator]


def _require(config: ModelConfig, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(name, getattr(config, name), allowed)
