"""The spectral state cache: long convolutions of sequences of any length in constant memory.

The past of a channel is its state, `r` coordinates from which every later output follows
(`stu.realisation`). It is advanced once a page, not once a token: a page's outputs are pending
ones, which the state gives when the page begins, and direct sums of the page's own inputs; when it
ends, the state takes these inputs in.

Pages are aligned to the engine's clock, which counts steps, and staggered over the layers: at most
`ceil(layers / page_len)` layers end a page in a step, for all rows at once, so that every step does
the same work whatever the rows' positions. A row that joins within a page keeps its state as it is
until the page ends. A layer has several signals, each with a state: with `lag_step` 2 one for even
and one for odd places of the clock, which never mix.

States are in float64, and so are the sums that advance them: decays, and products of decays and
inputs. The outputs of a page that follow from a state are summed in float64 too, and rounded once
(`AlternatingStates` rounds coordinates of the state that do not cancel instead, and sums them in
the dtype of the filters). Sums over the inputs of a page, and the convolution within a chunk of a
prompt, are in the dtype of the model's filters, float32 or float64.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from serve.cache.base import Cache, Snapshot
from serve.cache.page_pool import OutOfPages
from serve.cache.row_clocks import RowClocks, Run
from serve.cache.state_steps import ENDS, TIME, StateTensors
from serve.cache.static_step import Numbers
from stu.common.errors import UserError
from stu.realisation import Realisation

MOST_INPUTS = 8192
"""Inputs of a signal that one product takes into a state."""


class SpectralStates(Cache):
    """States of the long convolutions of all layers; each row is one block of constant size.

    A block of a layer has `signals * C` channels with `rank` float64 numbers each, and twice
    `page_len / lag_step` numbers for the page that is being decoded.

    Args:
        realisation: State-space form of the filters that all layers' taps are made of.
        layers: Number of layers.
        channels: Channels of a signal, C.
        max_rows: Blocks.
        page_len: Positions of a page.
        dtype: Type of inputs and outputs.
        device: Device of the blocks.
    """

    signals: int
    """States of a channel."""

    def __init__(
        self,
        realisation: Realisation,
        layers: int,
        channels: int,
        max_rows: int,
        page_len: int,
        lag_step: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if page_len % lag_step:
            raise UserError("page_len", page_len, f"a multiple of {lag_step}")
        self._page_len, self._lag_step = page_len, lag_step
        self._slots = page_len // lag_step
        self._max_rows = max_rows
        # The last row is for padding.
        self._states = torch.zeros(
            (max_rows + 1, layers, self.signals, realisation.rank, channels),
            dtype=torch.float64,
            device=device,
        )
        """States `[rows, layers, signals, r, C]` before the page that is being decoded. Those of a
        row that is not in the batch are of the signals as its next token sees them."""
        shape = layers, self.signals, self._slots, max_rows + 1, channels
        self._inputs = torch.zeros(shape, dtype=dtype, device=device).permute(3, 0, 1, 2, 4)
        """Inputs of the page, `[rows, layers, signals, page_len / lag_step, C]`. Rows, which step
        together, are next to each other in memory."""
        self._page = torch.empty(shape[1:3] + shape[4:], dtype=torch.float64, device=device)
        """A page's inputs, or outputs, in the dtype of sums, `[signals, slots, C]`."""
        self._decays = torch.from_numpy(realisation.decays(MOST_INPUTS + 1)).to(device)
        """Factors of a state's coordinates after 0, 1, .. more inputs, `[n, r]`."""
        self._into = self._decays[:-1].flip(0).T.contiguous()
        """Shares of inputs in a state, `[r, n]`: the last columns are of the newest inputs."""
        self._into_page = self._into[:, -self._slots :].expand(self.signals, -1, -1)
        """The same for a page's inputs, `[signals, r, slots]`."""
        left = [
            [self._slots - self._slots_before(place, signal) for signal in range(self.signals)]
            for place in range(page_len)
        ]
        self._rest = self._decays[torch.tensor(left, device=device)].unsqueeze(-1)
        """Decays from each place of a page to its end, `[page_len, signals, r, 1]`."""
        self._offsets = [
            layer * page_len // layers if layers <= page_len else layer % page_len
            for layer in range(layers)
        ]
        """Places in its page of each layer at time 0."""
        self._clocks = RowClocks(max_rows)
        self._joined_at = np.zeros((max_rows, layers), dtype=np.int64)
        """Place at which a row joined, in the page that is being decoded; else 0."""
        self._joined_time = np.zeros(max_rows, dtype=np.int64)
        """Time at which a row joined."""
        self._lengths = [0] * max_rows
        """Tokens of each row that have been restored or prefilled, or are being prefilled."""
        self._admitted: set[int] = set()
        self._rows: list[int] = []
        self._groups: dict[tuple[int, int], list[Run]] = {}
        """Runs of the rows that step together, by the first one's place and their number."""

    @property
    def capacity(self) -> int:
        return self._max_rows

    @property
    def num_used(self) -> int:
        return len(self._admitted)

    @property
    def num_free(self) -> int:
        return self.capacity - self.num_used

    def owned(self, row: int) -> int:
        return int(row in self._admitted)

    def pages_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        return 1

    def check_integrity(self, rows: Collection[int]) -> None:
        assert self._admitted == set(rows), "a block belongs to a row that has ended"
        assert set(self._rows) <= self._admitted, "a row of the batch has no block"

    def admit(self, row: int, prompt_tokens: int, new_tokens: int) -> None:
        if not self.num_free:
            raise OutOfPages(f"all {self.capacity} blocks are in use")
        assert row not in self._admitted, f"row {row} is in use"
        self._admitted.add(row)
        self._lengths[row] = 0

    def release(self, row: int) -> None:
        assert row not in self._rows, f"row {row} is still in the batch"
        self._admitted.remove(row)

    def begin_chunk(self, row: int, num_tokens: int) -> None:
        self._lengths[row] += num_tokens

    def steps_until_aligned(self, num_tokens: int) -> int:
        return (num_tokens - self._clocks.time) % self._page_len

    def skip(self, num_steps: int) -> None:
        assert not self._rows, "rows of the batch would miss steps"
        self._clocks.time += num_steps

    def join(self, row: int, ahead: int = 0) -> None:
        self._inputs[row] = 0
        self._clocks.start(row, ahead)
        self._joined_time[row] = time = self._clocks.of(row)
        for layer, offset in enumerate(self._offsets):
            place = (time + offset) % self._page_len
            self._joined_at[row, layer] = place
            self._turn(self._states[row, layer], place)
            self._begin_page(row, layer, place)
        self._change_rows(sorted([*self._rows, row]))

    def leave(self, row: int) -> None:
        self._change_rows([other for other in self._rows if other != row])
        # Nothing is left behind, not even NaN.
        self._states[row], self._inputs[row] = 0, 0

    def snapshot(self, row: int, num_tokens: int) -> Snapshot:
        states = self._states[row].clone()
        if row not in self._rows:
            return Snapshot(num_tokens, (states,))
        time = self._clocks.of(row)
        for layer, offset in enumerate(self._offsets):
            place, joined_at = (time + offset) % self._page_len, self._joined_at[row, layer]
            for signal, state in enumerate(states[layer]):
                ends = self._slots_before(joined_at, signal), self._slots_before(place, signal)
                slots = slice(*ends)
                state.copy_(self._taken_in(state, self._inputs[row, layer, signal, slots]))
            self._turn(states[layer], -place)
        return Snapshot(num_tokens, (states,))

    def restore(self, row: int, snapshot: Snapshot) -> None:
        (self._states[row],) = snapshot.tensors
        self._lengths[row] = snapshot.num_tokens

    def begin_step(self, rows: list[int], alone: bool) -> None:
        assert rows == self._rows, "a token of each row is needed"

    def advance(self) -> None:
        for run in self._group(0, len(self._rows)):
            for layer in self._ending(run.ahead):
                for row in range(run.rows.start, run.rows.stop):
                    self._end_page(row, layer)
        self._clocks.time += 1

    def begin_static(self, rows: Sequence[int], shared: Numbers, own: Numbers) -> bool:
        assert list(rows) == self._rows, "a token of each row is needed"
        ending, time = self._ending(), self._clocks.time
        shared[TIME], shared[ENDS:] = time, -1
        shared[ENDS : ENDS + len(ending)] = ending
        own[:, 0] = time - self._joined_time[rows]
        return bool(ending)

    def advance_static(self) -> None:
        self._joined_at[np.ix_(self._rows, self._ending())] = 0
        self._clocks.time += 1

    def page_ends(self, ahead: int = 0) -> list[int]:
        """Return for each layer the number of steps from now until its page ends, in rows that are
        ahead by some steps."""
        time = self._clocks.time + ahead
        return [self._page_len - (time + offset) % self._page_len for offset in self._offsets]

    def _ending(self, ahead: int = 0) -> list[int]:
        """Return the layers whose pages end with the step that begins or has begun."""
        return [layer for layer, steps in enumerate(self.page_ends(ahead)) if steps == 1]

    def _tensors(self) -> StateTensors:
        """Return the storage and tables that a static step uses."""
        offsets = torch.tensor(self._offsets, device=self._inputs.device)
        decays = self._decays[: self._page_len + 1]
        return StateTensors(self._states, self._inputs, decays, offsets, self._page_len)

    def _end_page(self, row: int, layer: int) -> None:
        """Advance the states of a row to the end of a layer's page, and begin the next one.

        Row by row, a state is in the processor's cache until all is done, and nothing depends on
        the other rows.
        """
        rest = self._rest[self._joined_at[row, layer]]
        inputs = self._page.copy_(self._inputs[row, layer])
        self._states[row, layer].mul_(rest).baddbmm_(self._into_page, inputs)
        self._joined_at[row, layer] = 0
        self._begin_page(row, layer, 0)

    def _taken_in(self, state: Tensor, inputs: Tensor) -> Tensor:
        """Return a state `[r, C]` after at most `MOST_INPUTS` more inputs `[n, C]`."""
        count = len(inputs)
        into = self._into[:, self._into.shape[1] - count :]
        return torch.addmm(self._decays[count, :, None] * state, into, inputs.double())

    def _slots_before(self, place: int, signal: int) -> int:
        """Return the number of a signal's slots in a page that are before a place."""
        return -(-(place - signal % self._lag_step) // self._lag_step)

    def _change_rows(self, rows: list[int]) -> None:
        self._rows = rows
        self._groups.clear()

    def _group(self, first: int, count: int) -> list[Run]:
        """Return the runs of `count` rows of the batch, or as many as there are, from `first`."""
        key = first, count
        if key not in self._groups:
            self._groups[key] = self._clocks.runs(self._rows[first : first + count])
        return self._groups[key]

    def prefill(self, row: int, layer: int, inputs: Tensor) -> Tensor:
        """Return the outputs of the chunk that begins, and take its inputs into the state: both
        `[S, T, C]` as in `stu.mixers.Memory.continue_convolution`."""
        continues = self._lengths[row] > inputs.shape[1]
        if not continues:
            self._states[row, layer].zero_()
        parts = []
        for part in torch.split(inputs, MOST_INPUTS, dim=1):
            parts.append(self._prefill(self._states[row, layer], layer, part, continues))
            continues = True
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @abstractmethod
    def _prefill(self, states: Tensor, layer: int, inputs: Tensor, continues: bool) -> Tensor:
        """Return the outputs of inputs `[S, T, C]`, and take them into states `[signals, r, C]`.

        continues: Whether the states are of earlier inputs, and not 0.
        """

    @abstractmethod
    def step(self, layer: int, inputs: Tensor, first: int = 0) -> Tensor:
        """Return the outputs of one token of the rows from the `first` of the batch.

        inputs: `[B S, C]`, as the outputs. Those beyond the rows of the batch are padding.
        """

    @abstractmethod
    def _turn(self, states: Tensor, place: int) -> None:
        """Turn states `[signals, r, C]`, in place, from those of the signals as the next token sees
        them to those of the clock, where the next token is at `place`; or back, for `-place`."""

    @abstractmethod
    def _begin_page(self, row: int, layer: int, place: int) -> None:
        """Make a row ready for the page that begins, or for what is left of it from a place."""
