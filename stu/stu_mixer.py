"""The spectral transform unit (STU), a linear mixer, in its two forms.

Liu et al. 2024, "Flash STU: Fast Spectral Transform Units", arXiv:2409.10489.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from stu.config import ModelConfig
from stu.layers import joined
from stu.mixers import LongConvolution, PastInputs
from stu.sequences.base import Sequences
from stu.slices.channels import ChannelRanks, Divided

SUMMED_CHANNELS = 16
"""Channels of an STU in full form whose products a CPU adds up in the model's dtype. Sums of more
are in float64."""


def make_stu(config: ModelConfig) -> "TensordotSTU | FullSTU":
    """Make the STU of the form that `config.stu_form` names."""
    return TensordotSTU(config) if config.stu_form == "tensordot" else FullSTU(config)


class TensordotSTU(LongConvolution):
    """`y = psi * (x W)` with one filter `psi = Phi M` per channel, plus its minus branch.

    The branches share M, so their sum has the filter `2 psi[i]` at even lags and 0 at odd ones.
    """

    needs_filters = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(PastInputs(config.width, lag_step=2, basis="mixed"))
        self.input_matrix = nn.Parameter(torch.empty(config.width, config.width))
        self.filter_matrix = nn.Parameter(torch.empty(config.num_filters, config.width))
        self.channels = slice(None)
        """Channels that this rank computes. It has the filter matrix of all of them, so that every
        rank chooses the same state."""
        self.project: nn.Module | None = None
        """Product with `input_matrix`, once it is packed."""

    def forward(self, x: Tensor, filters: Tensor, sequences: Sequences) -> Tensor:
        projected: Tensor = x @ self.input_matrix if self.project is None else self.project(x)
        mixed = sequences.convolve(self, projected, filters)
        return mixed if self.ranks is None else self.ranks.gather(mixed)

    def taps(self, filters: Tensor) -> Tensor:
        with torch.autocast(filters.device.type, enabled=False):
            basis, weights = self.basis(filters)
            return basis @ weights  # [L/2, K] @ [K, D]

    def basis(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * filters[::2], self.weights_of_all(filters)[:, self.channels]

    def weights_of_all(self, filters: Tensor) -> Tensor:
        return self.filter_matrix.to(filters.dtype)

    def initialize(self, depth_scale: float) -> None:
        nn.init.xavier_normal_(self.input_matrix)
        nn.init.xavier_normal_(self.filter_matrix)

    @property
    def matrices(self) -> dict[str, int]:
        return {"input_matrix": 1}

    @property
    def divided(self) -> dict[str, Divided]:
        return {"input_matrix": Divided(1)}

    def take_part(self, ranks: ChannelRanks) -> None:
        super().take_part(ranks)
        self.channels = ranks.own(self.past.channels)
        self.past = replace(self.past, channels=self.channels.stop - self.channels.start)
        self.remembers = (self.past,)

    def pack(self, packed: Callable[[Tensor], nn.Module] | None) -> None:
        if self.project is None and packed is not None:
            self.project = packed(self.input_matrix.T)
            del self.input_matrix


class FullSTU(LongConvolution):
    """`y[t] = sum_k M+_k U+_k[t] + M-_k U-_k[t]`, where `U±` is x convolved with `phi_k[i]` and
    `(-1)^i phi_k[i]`."""

    needs_filters = True
    arranged: Tensor | None
    """Both matrices, once they are arranged for decoding: `[D, 2 K, D]` if `by_channel`, else
    `[2 K, D, D]`."""
    by_channel = False
    """Whether `arranged` has the layout for a CPU, which adds up groups of channels. It keeps this
    layout when the model moves to another device."""

    def __init__(self, config: ModelConfig) -> None:
        channels = 2 * config.num_filters
        super().__init__(PastInputs(channels, streams=config.width, basis="alternating"))
        self.width, self.channels = config.width, slice(None)
        shape = config.num_filters, config.width, config.width
        self.plus_matrices = nn.Parameter(torch.empty(shape))
        self.minus_matrices = nn.Parameter(torch.empty(shape))
        count = config.num_filters
        self.stacked_matrices = ("plus_matrices", count), ("minus_matrices", count)
        self.register_buffer("arranged", None, persistent=False)

    def forward(self, x: Tensor, filters: Tensor, sequences: Sequences) -> Tensor:
        mixed = sequences.convolve(self, x[..., self.channels], filters)  # [B, T, D, 2 K]
        if self.arranged is not None:
            product = _sum_of_groups if self.by_channel else _product
            outputs = product(mixed, self.arranged)
            return (outputs if self.ranks is None else self.ranks.sum(outputs)).to(x.dtype)
        matrices = torch.cat([self.plus_matrices, self.minus_matrices])
        outputs = torch.einsum("btdk,kde->bte", mixed, matrices)
        return outputs if self.ranks is None else self.ranks.sum(outputs)

    def taps(self, filters: Tensor) -> Tensor:
        minus = filters.clone()
        minus[1::2] *= -1
        return torch.cat([filters, minus], dim=1)  # [L, 2 K]

    def basis(self, filters: Tensor) -> tuple[Tensor, None]:
        return filters, None

    def streams(self, inputs: Tensor) -> Tensor:
        channels = inputs.transpose(1, 2).flatten(0, 1)  # [B, T, D] -> [B D, T]
        return channels[..., None].expand(-1, -1, self.past.channels)  # -> [B D, T, 2 K]

    def joined(self, streams: Tensor) -> Tensor:
        return streams.view(-1, self.width, *streams.shape[1:]).transpose(1, 2)  # [B, T, D, 2 K]

    def initialize(self, depth_scale: float) -> None:
        for matrix in (*self.plus_matrices, *self.minus_matrices):
            nn.init.xavier_normal_(matrix)

    @property
    def divided(self) -> dict[str, Divided]:
        return {"plus_matrices": Divided(1), "minus_matrices": Divided(1)}

    def take_part(self, ranks: ChannelRanks) -> None:
        super().take_part(ranks)
        self.channels = ranks.own(self.width)
        self.width = self.channels.stop - self.channels.start
        self.past = replace(self.past, streams=self.width)
        self.remembers = (self.past,)

    def pack(self, packed: Callable[[Tensor], nn.Module] | None) -> None:
        if self.arranged is None:
            plus, minus = self.plus_matrices.detach(), self.minus_matrices.detach()
            self.by_channel = _adds_groups(plus)
            if self.by_channel:
                self.arranged = torch.cat([plus.transpose(0, 1), minus.transpose(0, 1)], dim=1)
            else:
                self.arranged = joined(self.plus_matrices, self.minus_matrices)
            del self.plus_matrices, self.minus_matrices

    @property
    def decoding_weights(self) -> int:
        if self.arranged is not None:
            return self.arranged.numel()
        return self.plus_matrices.numel() + self.minus_matrices.numel()


def _adds_groups(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _product(mixed: Tensor, matrices: Tensor) -> Tensor:
    """Return `[B, T, E]`, the sum over channels and filters of `mixed [B, T, D, 2 K]` times
    `matrices [2 K, D, E]`."""
    return mixed.transpose(2, 3).flatten(2) @ matrices.flatten(0, 1)


def _sum_of_groups(mixed: Tensor, matrices: Tensor) -> Tensor:
    """Return the same sum for `matrices [D, 2 K, E]`, of groups of channels that are added in
    float64.

    Where each rank has a multiple of `SUMMED_CHANNELS`, and so whole groups, the sum of several
    ranks is then that of one rank to the last bit. Or products with weights of 8 bits would round
    some of their inputs differently.
    """
    batch, length = mixed.shape[:2]
    total = mixed.new_zeros(batch * length, matrices.shape[2], dtype=torch.float64)
    for first in range(0, len(matrices), SUMMED_CHANNELS):
        channels = slice(first, first + SUMMED_CHANNELS)
        rows = mixed[:, :, channels].flatten(2).flatten(0, 1)  # [B T, 16 * 2 K]
        total += rows.contiguous() @ matrices[channels].flatten(0, 1)
    return total.view(batch, length, -1)
