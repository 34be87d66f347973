"""Layers of a block other than its mixer: RMSNorm and the gated MLP."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.config import ModelConfig


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


class GatedMLP(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))` with a hidden width of `mlp_ratio * width`."""

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

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))
        return gated

    def initialize(self, std: float, depth_scale: float) -> None:
        """Draw normal weights from torch's global generator; those of `down` are scaled by
        `depth_scale`."""
        nn.init.normal_(self.gate.weight, std=std)
        nn.init.normal_(self.up.weight, std=std)
        nn.init.normal_(self.down.weight, std=std * depth_scale)
