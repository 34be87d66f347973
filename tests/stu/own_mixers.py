"""Mixers from outside the package, whose long convolutions differ from its own."""

import torch
from torch import Tensor

from stu.config import ModelConfig
from stu.mixers import PastInputs
from stu.stu_mixer import TensordotSTU


class FadingSTU(TensordotSTU):
    """An STU whose basis decays faster, and has states too."""

    def basis(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        basis, weights = super().basis(filters)
        lags = torch.arange(len(basis), dtype=basis.dtype)
        return basis * 0.9 ** lags[:, None], weights


class TwoStreams(TensordotSTU):
    """An STU whose halves of the channels share filters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.past = PastInputs(config.width // 2, lag_step=2, streams=2, basis="mixed")
        self.channels, self.remembers = slice(0, config.width // 2), (self.past,)

    def streams(self, inputs: Tensor) -> Tensor:
        return torch.stack(inputs.chunk(2, 2), 1).flatten(0, 1)  # [B, T, D] -> [2 B, T, D / 2]

    def joined(self, streams: Tensor) -> Tensor:
        return torch.cat(streams.unflatten(0, (-1, 2)).unbind(1), 2)
