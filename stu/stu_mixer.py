"""The spectral transform unit (STU), a linear mixer, in its two forms.

Liu et al. 2024, "Flash STU: Fast Spectral Transform Units", arXiv:2409.10489.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from stu.config import ModelConfig
from stu.convolution import causal_convolution
from stu.documents import Documents
from stu.mixers import LongConvolution, Memory, PastInputs
from stu.slices.channels import ChannelRanks, Divided
from stu.slices.ranks import SliceRanks
from stu.slices.states import SliceStates, slice_states


def make_stu(config: ModelConfig) -> "STU":
    """Make the STU of the form that `config.stu_form` names."""
    return TensordotSTU(config) if config.stu_form == "tensordot" else FullSTU(config)


class STU(LongConvolution):
    """A layer that turns its input into streams, convolves each with its own spectral filter and
    combines the results."""

    needs_filters = True
    keeps_documents_apart = True
    divides_sequences = True

    def forward(
        self,
        x: Tensor,
        filters: Tensor,
        memory: Memory | None,
        documents: Documents | None = None,
    ) -> Tensor:
        return self.combine(self.convolve(self.streams(x), filters, memory, documents), x)

    def convolve_slices(self, streams: Tensor, filters: Tensor, slices: SliceRanks) -> Tensor:
        outputs: Tensor = slices.uncompiled(self._convolve_slices, streams, filters, slices)
        return outputs

    def _convolve_slices(self, streams: Tensor, filters: Tensor, slices: SliceRanks) -> Tensor:
        """Convolve this rank's slice of each stream, and add what follows from the states that
        earlier ranks send."""
        length, step = streams.shape[1], self.past.lag_step
        wide = streams.to(torch.promote_types(streams.dtype, torch.float32))
        with torch.autocast(streams.device.type, enabled=False):
            own = causal_convolution(wide, self.taps(filters[:length]), step)
            states = slice_states(slices, filters, self.basis, length, step, wide.dtype)
            added = self.from_earlier(states, wide)
        return (own + added).to(streams.dtype)

    @abstractmethod
    def streams(self, x: Tensor) -> Tensor:
        """Return the convolution's inputs: `[B, T, D] -> [S, T, C]`."""

    @abstractmethod
    def from_earlier(self, states: SliceStates, streams: Tensor) -> Tensor:
        """Return what earlier slices add to the outputs of the convolution, `[S, T, C]`."""

    @abstractmethod
    def combine(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output from the convolved streams: `[S, T, C] -> [B, T, D]`."""


class TensordotSTU(STU):
    """`y = psi * (x W)` with one filter `psi = Phi M` per channel, plus its minus branch.

    The branches share M, so their sum has the filter `2 psi[i]` at even lags and 0 at odd ones.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(PastInputs(config.width, lag_step=2, basis="mixed"))
        self.input_matrix = nn.Parameter(torch.empty(config.width, config.width))
        self.filter_matrix = nn.Parameter(torch.empty(config.num_filters, config.width))
        self.channels = slice(None)
        """Channels that this rank computes. It has the filter matrix of all of them, so that every
        rank chooses the same state."""
        self.project: nn.Module | None = None
        """Product with `input_matrix`, once it is packed."""

    def taps(self, filters: Tensor) -> Tensor:
        with torch.autocast(filters.device.type, enabled=False):
            basis, weights = self.basis(filters)
            return basis @ weights  # [L/2, K] @ [K, D]

    def basis(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * filters[::2], self.weights_of_all(filters)[:, self.channels]

    def weights_of_all(self, filters: Tensor) -> Tensor:
        return self.filter_matrix.to(filters.dtype)

    def streams(self, x: Tensor) -> Tensor:
        projected: Tensor = x @ self.input_matrix if self.project is None else self.project(x)
        return projected

    def from_earlier(self, states: SliceStates, streams: Tensor) -> Tensor:
        return states.mixed(streams, self.filter_matrix)

    def combine(self, mixed: Tensor, x: Tensor) -> Tensor:
        return mixed if self.ranks is None else self.ranks.gather(mixed)

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

    def pack(self, packed: Callable[[Tensor], nn.Module]) -> None:
        if self.project is None:
            self.project = packed(self.input_matrix.T)
            del self.input_matrix


class FullSTU(STU):
    """`y[t] = sum_k M+_k U+_k[t] + M-_k U-_k[t]`, where `U±` is x convolved with `phi_k[i]` and
    `(-1)^i phi_k[i]`."""

    def __init__(self, config: ModelConfig) -> None:
        channels = 2 * config.num_filters
        super().__init__(PastInputs(channels, streams=config.width, basis="alternating"))
        self.width, self.channels = config.width, slice(None)
        shape = config.num_filters, config.width, config.width
        self.plus_matrices = nn.Parameter(torch.empty(shape))
        self.minus_matrices = nn.Parameter(torch.empty(shape))
        count = config.num_filters
        self.stacked_matrices = ("plus_matrices", count), ("minus_matrices", count)

    def taps(self, filters: Tensor) -> Tensor:
        minus = filters.clone()
        minus[1::2] *= -1
        return torch.cat([filters, minus], dim=1)  # [L, 2 K]

    def basis(self, filters: Tensor) -> tuple[Tensor, None]:
        return filters, None

    def streams(self, x: Tensor) -> Tensor:
        channels = x[..., self.channels].transpose(1, 2).flatten(0, 1)  # [B, T, D] -> [B D, T]
        return channels[..., None].expand(-1, -1, self.past.channels)  # -> [B D, T, 2 K]

    def convolve(
        self,
        streams: Tensor,
        filters: Tensor,
        memory: Memory | None,
        documents: Documents | None = None,
    ) -> Tensor:
        if documents is None:
            return super().convolve(streams, filters, memory)
        # Channels are divided into streams document by document: copies of all streams would be
        # kept for the backward pass otherwise.
        x = streams[..., 0].view(-1, self.width, streams.shape[1]).transpose(1, 2)  # [B, T, D]
        mixed: Tensor = documents.apply(self._convolve_channels, (x,), filters)
        return mixed.transpose(1, 2).flatten(0, 1)  # [B, T, D, 2 K] -> [B D, T, 2 K]

    def _convolve_channels(self, x: Tensor, filters: Tensor) -> Tensor:
        """Convolve each channel with all filters: `[S, P, D] -> [S, P, D, 2 K]`."""
        mixed = super().convolve(self.streams(x), filters, None)  # [S D, P, 2 K]
        return mixed.view(len(x), self.width, *mixed.shape[1:]).transpose(1, 2)

    def from_earlier(self, states: SliceStates, streams: Tensor) -> Tensor:
        return states.alternating(streams[..., 0])  # all channels of a stream have one input

    def combine(self, mixed: Tensor, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        mixed = mixed.view(batch, self.width, length, -1)  # [B D, T, 2 K] -> [B, D, T, 2 K]
        matrices = torch.cat([self.plus_matrices, self.minus_matrices])
        outputs = torch.einsum("bdtk,kde->bte", mixed, matrices)
        return outputs if self.ranks is None else self.ranks.sum(outputs)

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

    @property
    def decoding_weights(self) -> int:
        return self.plus_matrices.numel() + self.minus_matrices.numel()
