"""Static steps of spectral states: sums within a page, and ends of pages, over index tensors.

Outputs are pulled: what is pending, plus the sum over the page's inputs. `MixedStates.step` pushes
each input to the pending outputs after it instead; what is kept at the end of a page is the same.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.cache.static_step import StaticStep
from serve.kernels.alternating_field import alternating_field
from serve.kernels.near_field import near_field
from serve.kernels.page_end import page_end

TIME, ENDS = 0, 1
"""Places among the numbers that rows share: the time, and from there on the layers whose pages end
in this step, filled up with -1."""


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
    """Static step of spectral states. A row's own number counts the steps since it joined.

    Args:
        pending: What the page begins with, pending outputs or narrow states.
        coefficients: Weights of a state's coordinates in it, as of `serve.kernels.page_end`.
    """

    ends_pages = True
    num_own = 1

    def __init__(self, tensors: StateTensors, pending: Tensor, coefficients: Tensor) -> None:
        self._states, self._inputs = tensors.states, tensors.inputs
        self._pending, self._coefficients = pending, coefficients
        self._decays, self._offsets = tensors.decays, tensors.offsets
        self._page_len = tensors.page_len
        num_rows, num_layers = tensors.states.shape[:2]
        self._null_row = num_rows - 1
        self.num_shared = ENDS + -(-num_layers // tensors.page_len)
        shape = num_rows, num_layers
        self._joined = torch.zeros(shape, dtype=torch.int64, device=pending.device)
        """Place at which a row joined, in the page of a layer that ends, `[rows, layers]`."""

    def begin(self, rows: Tensor, shared: Tensor, own: Tensor) -> None:
        self._rows = rows.clamp(max=self._null_row)
        self._places = (shared[TIME] + self._offsets) % self._page_len  # [layers]
        self._ages, self._ends = own[:, 0], shared[ENDS:]

    @abstractmethod
    def step(self, layer: int, inputs: Tensor) -> Tensor:
        """Return the outputs of one token of the rows, `[B S, C]` both ways."""

    def end_pages(self) -> None:
        layers = self._ends.clamp(min=0)
        joined = (self._page_len - 1 - self._ages).clamp(min=0)  # 0 if in an earlier page
        joined = joined[:, None].expand(-1, len(layers))
        self._joined.index_put_((self._rows[:, None], layers), joined)
        tensors = self._states, self._inputs, self._pending
        tables = self._decays, self._coefficients
        page_end(*tensors, *tables, self._joined, self._ends, self._rows)


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
        super().__init__(tensors, pending, coefficients)
        self._near = near

    def step(self, layer: int, inputs: Tensor) -> Tensor:
        place = self._places[layer : layer + 1]
        tensors = self._inputs, self._pending, self._near
        return near_field(*tensors, layer, self._rows, place, inputs)


class AlternatingStep(StateStep):
    """Static step of `AlternatingStates`.

    Args:
        narrow: Narrow states `[rows, layers, signals, m, S]`.
        into_narrow: Product that makes them of states, `[m, r]`.
        reach: Contribution of narrow states to each place of a page, `[page_len, K, m]`.
        near: Contribution of the inputs of a page, `[page_len, K, page_len]`.
    """

    def __init__(
        self,
        tensors: StateTensors,
        narrow: Tensor,
        into_narrow: Tensor,
        reach: Tensor,
        near: Tensor,
    ) -> None:
        super().__init__(tensors, narrow, into_narrow.contiguous())
        self._reach, self._near = reach.contiguous(), near

    def step(self, layer: int, inputs: Tensor) -> Tensor:
        place = self._places[layer : layer + 1]
        new = inputs[:, 0].view(-1, self._inputs.shape[-1])  # all channels have the same: [B, S]
        tensors = self._inputs, self._pending, self._reach, self._near
        return alternating_field(*tensors, layer, self._rows, place, self._ages, new)
