"""Long convolutions with spectral filters over slices: the past of earlier ranks comes as a state.

Each rank convolves its own slice. It also takes its inputs into a state of constant size
(`stu.realisation`), which it sends to all later ranks. These let it decay over the slices between,
add up what they receive, and add to their outputs what follows from the sum.

States are sent in orthonormal coordinates. With the decays of a slice `E = Q R`, `[slots, r]`, the
state after its inputs `u` is `E^T flip(u) = R^T w`, where `w = Q^T flip(u)` is sent. So sums over
positions are as exact in float32 as the convolution is; those over the coordinates of a state,
where terms cancel, are in float64.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stu.common.errors import UserError
from stu.realisation import RANKS, NoRealisation, Realisation, fitting_realisation
from stu.slices.ranks import SliceRanks, exchange

logger = logging.getLogger(__name__)


class SliceStates:
    """The part of this rank's outputs that the inputs of earlier slices add.

    Args:
        realisation: State-space form of the K filters.
        ranks: The ranks that have the slices.
        length: Positions of a slice.
        lag_step: Distance between the taps of a filter, in positions.
        dtype: Type of inputs and outputs, float32 or float64.
        device: Device of inputs and outputs.
    """

    def __init__(
        self,
        realisation: Realisation,
        ranks: SliceRanks,
        length: int,
        lag_step: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._ranks, self._length, self._lag_step = ranks, length, lag_step
        first = ranks.rank * length
        self._turn = first % lag_step
        """Phase of the sequence to which the first position of the slice belongs."""
        decays = torch.from_numpy(realisation.decays(-(-length // lag_step))).to(device)
        basis, self._narrow = torch.linalg.qr(decays)  # [slots, m] and [m, r], m <= r
        self._basis = basis.to(dtype)
        self._into = self._basis.flip(0).T.contiguous()
        """Shares of inputs in a state, `[m, slots]`: the last columns are of the newest inputs."""
        self._outputs = torch.from_numpy(realisation.outputs).to(device)
        slots = [
            [
                _slots(first, phase, lag_step) - _slots((other + 1) * length, phase, lag_step)
                for phase in range(lag_step)
            ]
            for other in range(ranks.rank)
        ]
        counts = torch.tensor(slots, dtype=torch.float64, device=device).view(-1, 1, lag_step, 1, 1)
        rates = torch.from_numpy(realisation.rates).to(device)
        self._decays = torch.exp(-rates[:, None] * counts)
        """Decays from the end of each earlier slice to this one, `[earlier, 1, phases, r, 1]`."""
        odd = (first + torch.arange(length, device=device)) % 2
        self._signs = (1 - 2 * odd)[:, None].to(dtype)  # [T, 1]

    def mixed(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Return the addition for filters `filters @ weights`: `[B, T, C]` both ways.

        weights: `[K, C]`.
        """
        phases = [inputs[:, phase :: self._lag_step] for phase in range(self._lag_step)]
        # The first position of a slice may belong to any phase of the sequence.
        own = self._own(phases).roll(self._turn, 1)
        states = self._incoming(own).roll(-self._turn, 1)  # [B, phases, r, C]
        coefficients = self._outputs.T @ weights.double()  # [r, K] @ [K, C]
        narrow = (self._narrow @ (coefficients * states)).to(inputs.dtype)
        added: Tensor = self._basis @ narrow  # [B, phases, slots, C]
        return added.transpose(1, 2).flatten(1, 2)[:, : self._length]

    def alternating(self, inputs: Tensor) -> Tensor:
        """Return the addition for each filter, and for each with the sign `(-1)^i` at lag i:
        `[S, T] -> [S, T, 2 K]`."""
        signal = inputs.T[None]  # [1, T, S]
        own = self._own([signal, self._signs * signal])
        states = self._incoming(own)[0]  # [2, r, S]
        products = self._outputs[:, :, None] * states[:, None]  # [2, K, r, S]
        narrow = (self._narrow @ products).to(inputs.dtype)
        reach = torch.stack([self._basis, self._signs * self._basis])  # [2, T, m]
        return torch.einsum("atm,akms->stak", reach, narrow).flatten(2)

    def _own(self, signals: Sequence[Tensor]) -> Tensor:
        """Return the states of signals `[B, slots, C]` in orthonormal coordinates,
        `[B, signals, m, C]`."""
        slots = self._into.shape[1]
        return torch.stack([self._into[:, slots - u.shape[1] :] @ u for u in signals], dim=1)

    def _incoming(self, own: Tensor) -> Tensor:
        """Return the states `[B, signals, r, C]` before the slice, in float64, where those of the
        own inputs alone are `own`."""
        ranks = self._ranks
        parts = [own[None, :][: int(other > ranks.rank)] for other in range(ranks.size)]
        shapes = [(int(other < ranks.rank), *own.shape) for other in range(ranks.size)]
        received = torch.cat(exchange(ranks, parts, shapes))  # [earlier, B, signals, m, C]
        carried: Tensor = self._decays * (self._narrow.T @ received.double())
        return carried.sum(0)


Basis = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Function of the model's filters, as `stu.mixers.LongConvolution.basis`."""


@dataclass
class _Kept:
    """Each layer's basis and states' tables, and the filters that they are for."""

    filters: Tensor
    version: int
    copy: Tensor
    tables: dict[Basis, tuple[Tensor, SliceStates]]

    def fits(self, filters: Tensor) -> bool:
        """Return whether the filters are the same, if only in value."""
        if filters is self.filters and filters._version == self.version:
            return True
        # Training with ddp writes the first rank's buffers into those of the others at each step.
        self.filters, self.version = filters, filters._version
        return torch.equal(filters, self.copy)


@torch.inference_mode(False)  # training cannot use tables that a validation has made
@torch.no_grad()
def slice_states(
    ranks: SliceRanks,
    filters: Tensor,
    basis: Basis,
    length: int,
    lag_step: int,
    dtype: torch.dtype,
) -> SliceStates:
    """Return the tables for slices of `length` positions, which are computed once for the filters
    of all layers with equal bases; collective then.

    basis: The layer's; it must not change while `filters` do not.
    Raises UserError if no state gives their taps.
    """
    key = SliceStates, length, lag_step, dtype, filters.device
    kept: _Kept | None = ranks.kept.get(key)
    if kept is None or not kept.fits(filters):
        kept = ranks.kept[key] = _Kept(filters, filters._version, filters.clone(), {})
    if basis not in kept.tables:
        made, _ = basis(filters)
        own = next((own for own in kept.tables.values() if are_equal(own[0], made)), None)
        if own is None:
            found = common_realisation(ranks, made, dtype)
            own = made, SliceStates(found, ranks, length, lag_step, dtype, filters.device)
        kept.tables[basis] = own
    return kept.tables[basis][1]


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two bases are the same."""
    return torch.equal(first, second)


def common_realisation(ranks: SliceRanks, basis: Tensor, dtype: torch.dtype) -> Realisation:
    """Return the first rank's realisation of filters `basis [N, K]`; collective.

    It is not searched for on each rank: processors round differently, and rates must be the same.
    Raises UserError on all ranks if there is none.
    """
    num_filters = basis.shape[1]
    # The rank, the rates and the outputs.
    sent = torch.zeros(1 + RANKS[-1] * (1 + num_filters), dtype=torch.float64)
    failure = None
    if ranks.rank == 0:
        try:
            found, error = fitting_realisation(basis, [None], dtype)
        except NoRealisation as reason:
            failure = reason
        else:
            numbers = np.concatenate([[found.rank], found.rates, found.outputs.ravel()])
            sent[: len(numbers)] = torch.from_numpy(numbers)
            logger.info(
                "slices of sequences know the earlier ones by spectral states of rank %d; taps "
                "differ by at most %.1e of their filter's largest",
                found.rank,
                error,
            )
    sent = sent.to(basis.device)
    parts = [sent[: len(sent) if ranks.rank == 0 else 0]] * ranks.size
    shapes = [(len(sent) if other == 0 else 0,) for other in range(ranks.size)]
    received = torch.cat(ranks.swap(parts, shapes)).cpu().numpy()
    rank = int(received[0])
    if rank == 0:
        why = f" ({failure})" if failure else ""
        raise UserError(
            "parallel.context",
            ranks.size,
            message=f"parallel.context={ranks.size}: the model's filters have no state of constant "
            f"size{why}, by which a slice of a sequence could know the earlier ones: take 1",
        ) from failure
    rates, outputs = received[1 : 1 + rank], received[1 + rank :][: num_filters * rank]
    return Realisation(rates, outputs.reshape(num_filters, rank), np.empty((0, num_filters)))


def _slots(position: int, phase: int, lag_step: int) -> int:
    """Return the number of positions of a phase before a position."""
    return -(-(position - phase) // lag_step)
