"""Layers of a block other than its mixer, norms and MLPs, and the costs of a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.config import ModelConfig
from stu.slices.channels import Divided


@dataclass(frozen=True)
class Costs:
    """Costs of one pass of a layer, for each token."""

    dense: float = 0.0
    """Floating-point operations of products with weights."""
    convolution: float = 0.0
    """Floating-point operations of FFTs."""
    attention: float = 0.0
    """Floating-point operations of queries with keys, and of scores with values."""
    fft_bytes: float = 0.0
    """Bytes that FFTs read and write, with the copies before and after them."""

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.dense + other.dense,
            self.convolution + other.convolution,
            self.attention + other.attention,
            self.fft_bytes + other.fft_bytes,
        )


def make_norm(config: ModelConfig) -> "RMSNorm | LayerNorm":
    """Make a norm of the kind that `config.blocks` has."""
    kind = LayerNorm if config.blocks == "plain" else RMSNorm
    return kind(config.width, config.norm_eps)


def make_mlp(config: ModelConfig) -> "GatedMLP | PlainMLP":
    """Make an MLP of the kind that `config.blocks` has."""
    return PlainMLP(config) if config.blocks == "plain" else GatedMLP(config)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, with the mean in float32 or wider.

    Zhang, Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, computed in float32 or wider.

    Ba, Kiros, Hinton 2016, "Layer Normalization", arXiv:1607.06450.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, weight, bias = x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(wide, (x.shape[-1],), weight, bias, self.eps).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """Return GELU in its approximation by tanh."""
    return F.gelu(x, approximate="tanh")


class GatedMLP(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))` with a hidden width of `mlp_ratio * width`."""

    activation: Callable[[Tensor], Tensor] = staticmethod(gelu)
    """Function of `gate(x)`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.gate = nn.Linear(config.width, hidden, bias=False)
        self.up = nn.Linear(config.width, hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    @property
    def matrices(self) -> dict[str, int]:
        """As `stu.mixers.Mixer.matrices`."""
        return {"gate.weight": 0, "up.weight": 0, "down.weight": 0}

    @property
    def divided(self) -> dict[str, Divided]:
        """As `stu.mixers.Mixer.divided`; ranks sum the outputs of `down`."""
        return {"gate.weight": Divided(0), "up.weight": Divided(0), "down.weight": Divided(1)}

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return gated

    def initialize(self, std: float, depth_scale: float) -> None:
        """Draw normal weights from torch's global generator; those of `down` are scaled by
        `depth_scale`."""
        nn.init.normal_(self.gate.weight, std=std)
        nn.init.normal_(self.up.weight, std=std)
        nn.init.normal_(self.down.weight, std=std * depth_scale)


class PlainMLP(nn.Module):
    """`down(gelu_tanh(up(x)))` with biases and a hidden width of `mlp_ratio * width`."""

    activation: Callable[[Tensor], Tensor] = staticmethod(gelu)
    """As `GatedMLP.activation`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.up, self.down = nn.Linear(config.width, hidden), nn.Linear(hidden, config.width)

    @property
    def matrices(self) -> dict[str, int]:
        """As `stu.mixers.Mixer.matrices`."""
        return {"up.weight": 0, "down.weight": 0}

    @property
    def divided(self) -> dict[str, Divided]:
        """As `GatedMLP.divided`."""
        return {"up.weight": Divided(0), "up.bias": Divided(0), "down.weight": Divided(1)}

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.down(self.activation(self.up(x)))
        return outputs

    def initialize(self, std: float, depth_scale: float) -> None:
        """Draw normal weights as `GatedMLP` does; biases are 0."""
        for linear, scale in ((self.up, 1.0), (self.down, depth_scale)):
            nn.init.normal_(linear.weight, std=std * scale)
            nn.init.zeros_(linear.bias)


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Return `cat([first, second])`, of which both become contiguous parts, if they are not yet.
    They are of one shape and dtype."""
    end = first.storage_offset() + first.numel()
    one_storage = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if not (one_storage and second.storage_offset() == end):
        # As bytes, since torch does not join all floats of 8 bits.
        parts = [own.detach().contiguous().view(torch.int8) for own in (first, second)]
        first.data, second.data = torch.cat(parts).view(first.dtype).chunk(2)
    return first.detach().as_strided((2 * len(first), *first.shape[1:]), first.stride())
