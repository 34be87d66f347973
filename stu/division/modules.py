"""Modules of which each of several ranks computes a part."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.slices.channels import ChannelRanks


class SummedOutputs(nn.Module):
    """A layer that ranks compute from their own parts of its inputs, or of its hidden units: the
    sum of what they get, and the bias."""

    bias: nn.Parameter | None

    def __init__(self, inner: nn.Module, ranks: ChannelRanks, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.inner, self.ranks = inner, ranks
        self.register_parameter("bias", bias)
        self.is_summed = False
        """Whether `inner` returns the sum already."""

    @property
    def matrices(self) -> dict[str, int]:
        """As `stu.mixers.Mixer.matrices`."""
        own: dict[str, int] = self.inner.matrices  # type: ignore[assignment]
        return {f"inner.{name}": dim for name, dim in own.items()}

    def forward(self, x: Tensor) -> Tensor:
        summed = self.inner(x) if self.is_summed else self.ranks.sum(self.inner(x))
        return summed if self.bias is None else summed + self.bias


class DividedEmbedding(nn.Embedding):
    """An embedding of which each rank has the rows of some tokens.

    weight: This rank's rows, as many as each other rank has.
    """

    def __init__(self, weight: Tensor, ranks: ChannelRanks) -> None:
        super().__init__(len(weight), weight.shape[1], _weight=weight)
        self.ranks = ranks

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens - self.ranks.rank * len(self.weight)
        are_own = (rows >= 0) & (rows < len(self.weight))
        looked_up = F.embedding(torch.where(are_own, rows, 0), self.weight)
        return self.ranks.sum(looked_up.masked_fill(~are_own[..., None], 0))
