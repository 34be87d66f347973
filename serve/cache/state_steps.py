"""Static steps of spectral states: sums within a page, and ends of pages, over index tensors.

Outputs are pulled: what is pending, plus the sum over the page's inputs. `MixedStates.step` pushes
each input to the pending outputs after it instead; what is kept at the end of a page is the same.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.cache.static_step import StaticStep
from serve.config import INVARIANT_ROWS
from serve.kernels.near_field import near_field
from serve.kernels.page_end import page_end

TIME, ENDS = 0, 1
"""Places among the numbers that rows share: the time, and from there on the layers whose pages end
in this step, filled up with -1."""
ENDED_AT_ONCE = 32
"""Most rows whose states are gathered together."""


@dataclass(frozen=True)
class StateTensors:
    """Storage and tables of a cache of spectral states. The last row is for padding."""

    states: Tensor
    """States `[rows, layers, signals, r, C]`."""
    inputs: Tensor
    """Inputs of the page, `[rows, layers, signals, slots, C]`."""
    decays: Tensor
    """Factors of a state's coordinates after 0, 1, .. more inputs, `[> slots, r]`."""
    offsets: Tensor
    """Places in its page of each layer at time 0, `[layers]`."""
    page_len: int


class StateStep(StaticStep):
    """Static step of spectral states. A row's own number counts the steps since it joined."""

    ends_pages = True
    num_own = 1

    def __init__(self, tensors: StateTensors) -> None:
        self._states, self._inputs = tensors.states, tensors.inputs
        self._decays, self._offsets = tensors.decays, tensors.offsets
        self._page_len = tensors.page_len
        num_rows, num_layers = tensors.states.shape[:2]
        self._null_row = num_rows - 1
        self.num_shared = ENDS + -(-num_layers // tensors.page_len)

    def begin(self, rows: Tensor, shared: Tensor, own: Tensor) -> None:
        self._rows = rows.clamp(max=self._null_row)
        self._places = (shared[TIME] + self._offsets) % self._page_len  # [layers]
        self._ages, self._ends = own[:, 0], shared[ENDS:]

    @abstractmethod
    def step(self, layer: int, inputs: Tensor) -> Tensor:
        """Return the outputs of one token of the rows, `[B S, C]` both ways."""

    def _joined_at(self) -> Tensor:
        """Return the places, in the pages that end, at which rows joined; else 0, `[B]`."""
        return (self._page_len - 1 - self._ages).clamp(min=0)


class MixedStep(StateStep):
    """Static step of `MixedStates`.

    Args:
        pending: Pending outputs, in the shape of the inputs.
        near: Taps within a page, `[layers, slots, C]`.
        coefficients: Weights of the coordinates in the next output, `[layers, r, C]`.
    """

    def __init__(
        self, tensors: StateTensors, pending: Tensor, near: Tensor, coefficients: Tensor
    ) -> None:
        super().__init__(tensors)
        self._pending, self._near, self._coefficients = pending, near, coefficients
        shape = tensors.states.shape[:2]
        self._joined = torch.zeros(shape, dtype=torch.int64, device=pending.device)
        """Place at which a row joined, in the page of a layer that ends, `[rows, layers]`."""

    def step(self, layer: int, inputs: Tensor) -> Tensor:
        place = self._places[layer : layer + 1]
        tensors = self._inputs, self._pending, self._near
        return near_field(*tensors, layer, self._rows, place, inputs)

    def end_pages(self) -> None:
        layers = self._ends.clamp(min=0)
        joined = self._joined_at()[:, None].expand(-1, len(layers))
        self._joined.index_put_((self._rows[:, None], layers), joined)
        tensors = self._states, self._inputs, self._pending
        tables = self._decays, self._coefficients
        page_end(*tensors, *tables, self._joined, self._ends, self._rows)


class AlternatingStep(StateStep):
    """Static step of `AlternatingStates`.

    Args:
        alone: Advance rows in groups of a fixed size.
        narrow: Narrow states `[rows, layers, signals, m, S]`.
        into_narrow: Product that makes them of states, `[m, r]`.
        reach: Contribution of narrow states to each place of a page, `[page_len, K, m]`.
        near: Contribution of the inputs of a page, `[page_len, K, page_len]`.
        signs: Signs of an even and of an odd place, `[2]`.
    """

    def __init__(
        self,
        tensors: StateTensors,
        alone: bool,
        narrow: Tensor,
        into_narrow: Tensor,
        reach: Tensor,
        near: Tensor,
        signs: Tensor,
    ) -> None:
        super().__init__(tensors)
        self._narrow, self._into_narrow = narrow, into_narrow
        self._reach, self._near, self._signs = reach, near, signs
        self._ended_at_once = INVARIANT_ROWS if alone else ENDED_AT_ONCE
        self._into = tensors.decays[: tensors.page_len].flip(0).T.contiguous()

    def step(self, layer: int, inputs: Tensor) -> Tensor:
        place, rows, streams = self._places[layer : layer + 1], self._rows, self._inputs.shape[-1]
        signal = inputs[:, 0].view(-1, streams).to(self._inputs.dtype)  # [B, S]
        sign = self._signs.index_select(0, place % 2)
        own = self._inputs[:, layer]  # [rows, 2, page_len, S]
        own[:, 0].index_put_((rows, place), signal)
        own[:, 1].index_put_((rows, place), signal * sign)
        steps = torch.minimum(place, self._ages)  # since the state, which is of where a row joined
        narrow = self._narrow[:, layer].index_select(0, rows)
        mixed = self._reach.index_select(0, steps)[:, None] @ narrow  # [B, 2, K, S]
        mixed = mixed + self._near.index_select(0, place) @ own.index_select(0, rows)
        mixed = torch.stack([mixed[:, 0], mixed[:, 1] * sign], 1).to(inputs.dtype)
        return mixed.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)  # [B S, 2 K]

    def end_pages(self) -> None:
        parts = self._rows, self._joined_at()
        for layer in torch.split(self._ends, 1):
            for rows, joined in zip(
                *(torch.split(part, self._ended_at_once) for part in parts), strict=True
            ):
                self._end_page(layer, rows, joined)

    def _end_page(self, layer: Tensor, rows: Tensor, joined_at: Tensor) -> None:
        """Finish the page of a layer `[1]` for some rows, unless the layer is -1."""
        ends, layer = (layer >= 0), layer.clamp(min=0)
        states, narrow = self._states[rows, layer], self._narrow[rows, layer]  # [B, 2, .., S]
        # A row that joined in this page has decayed since then only.
        rest = self._decays.index_select(0, self._page_len - joined_at)[:, None, :, None]
        taken = torch.matmul(self._into, self._inputs[rows, layer].double())
        after = torch.where(ends, taken.addcmul_(rest, states), states)
        self._states.index_put_((rows, layer), after)
        reached = torch.matmul(self._into_narrow, after).to(narrow.dtype)
        self._narrow.index_put_((rows, layer), torch.where(ends, reached, narrow))
